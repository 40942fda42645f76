"""sortLSH: similar queries and keys get neighbouring places (HyperAttention, section 3.1).

The bits c_p(x) = [x . W_p > 0] of r Gaussian projections name a bucket, sum_p c_p 2^p. Buckets are
ordered so that neighbours differ in one bit, as the reflected Gray code
G_1 = [0, 1], G_r = G_{r-1} ++ (reversed(G_{r-1}) + 2^(r-1)) lists them: G_r[i] = i xor (i >> 1).
A row is sorted by the place of its bucket in G_r, which is the inverse of that formula.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gray_code(bits: int) -> Tensor:
    """(2 ** bits,) buckets in the order in which neighbours differ in one bit."""
    places = torch.arange(1 << bits)
    return places ^ (places >> 1)


def bucket_ranks(bits: int) -> Tensor:
    """(2 ** bits,) place of each bucket in `gray_code`."""
    return torch.argsort(gray_code(bits))


def projections(dim: int, bits: int, generator: torch.Generator) -> Tensor:
    """W (dim, bits), Gaussian; one for all heads, queries and keys. On the generator's device."""
    return torch.randn(dim, bits, generator=generator, device=generator.device)


def hash_ranks(x: Tensor, projection: Tensor) -> Tensor:
    """Place of each row's bucket, (B, H, L) int64, for x (B, H, L, D); hashed in fp32."""
    bits = projection.shape[1]
    signs = x.detach().float() @ projection > 0
    bucket = (signs * (1 << torch.arange(bits, device=x.device))).sum(-1)
    return bucket_ranks(bits).to(x.device)[bucket]


def order_of(ranks: Tensor) -> Tensor:
    """Stable sort: (B, H, L) int64 index of the row at each sorted place."""
    length = ranks.shape[-1]
    # Unique keys need no stable sort, which is slower.
    keys = ranks * length + torch.arange(length, device=ranks.device)
    small = int(ranks.max()) + 1 < (1 << 31) // max(1, length) if ranks.numel() else True
    return torch.sort(keys.int() if small else keys).values.long() % max(1, length)
