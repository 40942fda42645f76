"""Attention without sinks, and with those it has put to use.

Su et al. 2026, arXiv 2604.10098, survey what is done about the mass that heads park on the first
token. What keeps sinks is in `foveate.methods.attention_sink`; sink logits are part of the core op;
gates, key/value biases and register tokens are options of `foveate.Attention` and of the models.
"""

from foveate.methods.sinks.normalisers import (
    ClippedSoftmax,
    EluAttention,
    Entmax,
    SigmoidAttention,
    Softpick,
)
from foveate.methods.sinks.redistribution import Redistribution

__all__ = [
    "ClippedSoftmax",
    "EluAttention",
    "Entmax",
    "Redistribution",
    "SigmoidAttention",
    "Softpick",
]
