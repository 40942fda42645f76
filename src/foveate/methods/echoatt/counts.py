"""What followers save, exactly: weights, FLOPs and cache.

Of each follower (D width, h query heads, h_kv key/value heads, d head width, n tokens):

    weights            D (h d + h_kv d)
    projection FLOPs   2 n D (h d + h_kv d)
    score FLOPs        2 n^2 h d, and one softmax (where the map is stored, or in decoding)
    cache              h_kv d numbers for each token; all layers together keep 1 - |F| / (2 L)

Rajabzadeh et al. 2024, arXiv 2409.14595; TinyLlama's 5, 9 and 17 followers give the paper's 2.14,
3.86 and 7.29% of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Saved:
    """What one follower saves.

    Attributes:
        dim: D.
        heads: h.
        kv_heads: h_kv.
        head_dim: d.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def parameters(self) -> int:
        """Weights of W_Q and W_K."""
        return self.dim * self.head_dim * (self.heads + self.kv_heads)

    @property
    def cache(self) -> int:
        """Numbers for each token."""
        return self.kv_heads * self.head_dim

    def projection_flops(self, tokens: int) -> int:
        """Of n tokens."""
        return 2 * tokens * self.parameters

    def score_flops(self, pairs: int) -> int:
        """Of so many (query, key) pairs, n^2 without a mask."""
        return 2 * pairs * self.heads * self.head_dim


def cache_share(followers: int, layers: int) -> Fraction:
    """Of the original cache that is left: 1 - |F| / (2 L)."""
    return 1 - Fraction(followers, 2 * layers)


def map_bytes(heads: int, length: int, element: int) -> int:
    """Bytes of a stored map of one sample, without a mask: h n^2 numbers."""
    return heads * length * length * element
