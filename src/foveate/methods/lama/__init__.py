"""LAMA: attention that pools, with a rank-1 bilinear form for each head; and what it is held to."""

from foveate.methods.lama.method import LAMA, LowRankPooler
from foveate.methods.lama.self_attentive import SelfAttentive, SelfAttentivePooler

__all__ = ["LAMA", "LowRankPooler", "SelfAttentive", "SelfAttentivePooler"]
