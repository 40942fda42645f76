"""What methods share: the context, the two contracts, selection, estimates and caches."""

from foveate.parts.attention import Attention, Pattern
from foveate.parts.context import Context

__all__ = ["Attention", "Context", "Pattern"]
