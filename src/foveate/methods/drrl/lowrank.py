"""Truncated singular value decompositions of queries and keys, as factors that are never formed.

    X = U diag(sigma) W^T,   X_r keeps r terms,   S_r = Q_r K_r^T / sqrt(d)
      = [Q W_q (W_q^T W_k)] [K W_k]^T / sqrt(d),   n x r times r x n

Erden 2025, "Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self Attention in
Large Language Models", arXiv 2512.15973, with the factors that its released code lacks (it forms
Q_r and saves nothing). Truncating Q and K one by one isn't the best of rank r for S; that is

    S_r = Q Gq^(-1/2) U_r U_r^T Gq^(1/2) K^T,   Gq^(1/2) Gk^(1/2) = U diag(s) V^T,  G = X^T X

"joint" here. All bases are nested: rank r is the first r columns of one of rank r' > r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.kv_cache import TokenCache, token_field
from foveate.parts.precision import uncast

SVDS = ("gram", "full", "partial")
_ITERATIONS, _OVERSAMPLE = 8, 8


class Spectrum(NamedTuple):
    """sigma (..., d), falling; W (..., d, d), its columns in the same order."""

    sigma: Tensor
    w: Tensor


class Maps(NamedTuple):
    """left, right (..., d, d): S_r = (Q left[:, :r]) (K right[:, :r])^T; sigma (..., d) of S."""

    left: Tensor
    right: Tensor
    sigma: Tensor


def gram(x: Tensor) -> Tensor:
    """X^T X in fp32 or wider; x (..., n, d)."""
    with uncast(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.mT @ wide


def grouped_gram(q: Tensor, kv_heads: int) -> Tensor:
    """Of all queries that share a key head: q (B, Hq, n, d) to (B, Hkv, d, d)."""
    return gram(q).unflatten(1, (kv_heads, -1)).sum(2)


def of_gram(g: Tensor) -> Spectrum:
    """Sigma and W of any X with X^T X = g (..., d, d), positive semidefinite."""
    values, vectors = torch.linalg.eigh(g.double())
    sigma = values.flip(-1).clamp_min(0).sqrt()
    return Spectrum(sigma.to(g.dtype), vectors.flip(-1).to(g.dtype))


@torch.no_grad()
def spectrum(x: Tensor, svd: str = "gram", rank: int | None = None) -> Spectrum:
    """Sigma and W of x (..., n, d).

    Args:
        x: any dtype; the work is done in fp32 or wider.
        svd: "gram" (eigenvectors of X^T X), "full" (torch's svd) or "partial" (subspace iteration
            for the first `rank`; what follows is an arbitrary orthonormal rest, its sigma the root
            of the mean square of those that weren't found, so that all of ||X||_F is there).
        rank: for "partial".

    Raises:
        InputError: another svd.
    """
    if svd not in SVDS:
        raise InputError(f"drrl(svd={svd!r}): expected one of {', '.join(SVDS)}.")
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    width = wide.shape[-1]
    if svd == "gram":
        return of_gram(gram(wide))
    if svd == "full":
        sigma = torch.linalg.svdvals(wide)
        _, _, wt = torch.linalg.svd(wide, full_matrices=True) if wide.shape[-2] < width else (
            torch.linalg.svd(wide, full_matrices=False)
        )  # fmt: skip
        sigma = torch.nn.functional.pad(sigma, (0, width - sigma.shape[-1]))
        return Spectrum(sigma, wt.mT)
    return _partial(wide, width if rank is None else min(rank, width))


def _partial(x: Tensor, rank: int) -> Spectrum:
    """Block subspace iteration on X^T X, from the same start every time."""
    width = x.shape[-1]
    block = min(width, rank + _OVERSAMPLE)
    start = torch.randn(width, block, generator=torch.Generator().manual_seed(0))
    v = start.to(x).expand(*x.shape[:-2], width, block)
    for _ in range(_ITERATIONS):
        v = torch.linalg.qr(x.mT @ (x @ v)).Q
    inner = of_gram(gram(x @ v))
    first = v @ inner.w
    more = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    more = more.to(x).expand(*x.shape[:-2], width, width)
    rest = torch.linalg.qr(torch.cat((first[..., :rank], more), -1)[..., :width]).Q
    w = torch.cat((first[..., :rank], rest[..., rank:]), -1)
    sigma = inner.sigma[..., :rank]
    left = (x.square().sum((-2, -1)) - sigma.square().sum(-1)).clamp_min(0)
    even = (left / max(1, width - rank)).sqrt()[..., None].expand(*left.shape, width - rank)
    return Spectrum(torch.cat((sigma, even), -1), w)


def _roots(g: Tensor) -> tuple[Tensor, Tensor]:
    """g^(1/2), g^(-1/2) of a positive semidefinite g, in float64; what has no weight stays 0."""
    values, vectors = torch.linalg.eigh(g.double())
    kept = values > values[..., -1:].clamp_min(1e-300) * 1e-12
    root = values.clamp_min(1e-300).sqrt()
    half, less = (
        (vectors * x.where(kept, 0.0)[..., None, :]) @ vectors.mT for x in (root, 1 / root)
    )
    return half, less


def joint_maps(gram_q: Tensor, gram_k: Tensor) -> Maps:
    """The best factors of every rank for S = Q K^T, from both Gram matrices (..., d, d)."""
    root, less = _roots(gram_q)
    u, sigma, _ = torch.linalg.svd(root @ _roots(gram_k)[0])
    made = (less @ u, root @ u, sigma)
    return Maps(*(x.to(gram_q.dtype) for x in made))


def grouped(x: Tensor, maps: Tensor, kv_heads: int) -> Tensor:
    """X (B, Hq, n, d) by the maps of their key heads (B, Hkv, d, r): (B, Hq, n, r), x's dtype."""
    made = x.unflatten(1, (kv_heads, -1)) @ maps.to(x.dtype)[:, :, None]
    return made.flatten(1, 2)


def separate_left(q: Tensor, wq: Tensor, wk: Tensor, rank: int) -> Tensor:
    """Q W_q (W_q^T W_k), both bases cut to r.

    Args:
        q: (B, Hq, n, d).
        wq: (B, Hq, d, d).
        wk: (B, Hkv, d, d).
        rank: r.
    """
    wk = wk.repeat_interleave(q.shape[1] // wk.shape[1], 1)
    wq, wk = wq[..., :rank], wk[..., :rank]
    return (q @ wq.to(q.dtype)) @ (wq.mT @ wk).to(q.dtype)


def energy(sigma: Tensor, ranks: Tensor) -> Tensor:
    """NER(r) = sum_(k <= r) sigma_k^2 / sum sigma_k^2: sigma (..., d), ranks (R,) to (..., R)."""
    total = sigma.square().cumsum(-1)
    at = (ranks.to(sigma.device).clamp(max=sigma.shape[-1]) - 1).clamp_min(0)
    return total[..., at] / total[..., -1:].clamp_min(torch.finfo(sigma.dtype).tiny)


class Projected:
    """Keys on a basis, kept while the basis is: what a longer call or a higher rank adds, no more.

    Attributes:
        right: (B, Hkv, d, d).
        cache: keys so far on the first columns; None before any.
        macs: multiply-adds done for each sequence and head.
    """

    def __init__(self, right: Tensor) -> None:
        self.right, self.macs = right, 0
        self.cache: TokenCache | None = None

    def upto(self, k: Tensor, rank: int) -> Tensor:
        """(B, Hkv, n, rank) of all keys k (B, Hkv, n, d), of which the first m are known."""
        right, width = self.right.to(k.dtype), k.shape[-1]
        known = 0 if self.cache is None else len(self.cache)
        columns = 0 if self.cache is None else self.cache.fields[0].shape[1]
        if rank > columns:
            before = [] if self.cache is None else [self.cache.entries["kw"]]
            more = k[:, :, :known] @ right[..., columns:rank]
            self.macs += known * width * (rank - columns)
            self.cache, columns = TokenCache([token_field("kw", k.shape[1], rank)]), rank
            if known:
                self.cache.append({"kw": torch.cat((*before, more), -1)})
        assert self.cache is not None
        self.macs += (k.shape[2] - known) * width * columns
        held = self.cache.append({"kw": k[:, :, known:] @ right[..., :columns]})["kw"]
        return held[..., :rank]

    def pick(self, rows: Tensor) -> Projected:
        """Of some sequences."""
        made = Projected(self.right[rows])
        made.cache = self.cache
        if made.cache is not None:
            made.cache.reorder(rows)
        return made
