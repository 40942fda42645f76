"""What methods share: the context, the two contracts, selection, estimates and caches."""

from foveate.parts.attention import Attention, Pattern
from foveate.parts.cache import SinkWindowCache
from foveate.parts.context import Context
from foveate.parts.rope import Rope

__all__ = ["Attention", "Context", "Pattern", "Rope", "SinkWindowCache"]
