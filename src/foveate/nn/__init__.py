"""Layers to build models from: the one composable attention, feed-forward, MoE, blocks."""

from foveate.nn.attention import Attention
from foveate.nn.biformer import BiLevelRoutingAttention, GridAttention
from foveate.nn.block import Block
from foveate.nn.ema import GatedEMA
from foveate.nn.feedforward import GELU, SwiGLU
from foveate.nn.mixer import MixerLayer
from foveate.nn.moe import MoE, Router
from foveate.nn.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    neighborhood_attention,
)
from foveate.nn.output import LayerOutput
from foveate.parts.routing import advance

__all__ = [
    "GELU",
    "Attention",
    "BiLevelRoutingAttention",
    "Block",
    "GatedEMA",
    "GridAttention",
    "LayerOutput",
    "MixerLayer",
    "MoE",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Router",
    "SwiGLU",
    "advance",
    "neighborhood_attention",
]
