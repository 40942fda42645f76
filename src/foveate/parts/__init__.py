"""What methods share: the context, the two contracts, selection, estimates and caches."""

from foveate.parts.attention import Attention, AttentionRecipe, Heads, Pattern
from foveate.parts.cache import SinkWindowCache
from foveate.parts.context import Context
from foveate.parts.rope import Rope
from foveate.parts.state import State, StateCache, Stateful

__all__ = [
    "Attention",
    "AttentionRecipe",
    "Context",
    "Heads",
    "Pattern",
    "Rope",
    "SinkWindowCache",
    "State",
    "StateCache",
    "Stateful",
]
