"""Trainable dynamic mask attention: keys chosen by an importance that is learnt from values."""

from foveate.methods.dma.attention import DMA, DynamicMask
from foveate.methods.dma.state import KeptKeys

__all__ = ["DMA", "DynamicMask", "KeptKeys"]
