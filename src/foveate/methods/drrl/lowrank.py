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
from foveate.parts.precision import uncast

SVDS = ("gram", "full", "partial")
_ITERATIONS, _OVERSAMPLE = 8, 8


class Spectrum(NamedTuple):
    """sigma (..., d), falling; W (..., d, d), its columns in the same order."""

    sigma: Tensor
    w: Tensor


class Maps(NamedTuple):
    """left, right (..., d, d): S_r = (Q left[:, :r]) (K right[:, :r])^T."""

    left: Tensor
    right: Tensor


def gram(x: Tensor) -> Tensor:
    """X^T X in fp32 or wider; x (..., n, d)."""
    with uncast(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.mT @ wide


def grouped_gram(q: Tensor, kv_heads: int) -> Tensor:
    """Of all queries that share a key head: q (B, Hq, n, d) to (B, Hkv, d, d)."""
    return gram(q).unflatten(1, (kv_heads, -1)).sum(2)


def of_gram(g: Tensor) -> Spectrum:
    """sigma and W of any X with X^T X = g (..., d, d), positive semidefinite."""
    values, vectors = torch.linalg.eigh(g.double())
    sigma = values.flip(-1).clamp_min(0).sqrt()
    return Spectrum(sigma.to(g.dtype), vectors.flip(-1).to(g.dtype))


@torch.no_grad()
def spectrum(x: Tensor, svd: str = "gram", rank: int | None = None) -> Spectrum:
    """sigma and W of x (..., n, d).

    Args:
        x: any dtype; the work is done in fp32 or wider.
        svd: "gram" (eigenvectors of X^T X), "full" (torch's svd) or "partial" (subspace iteration
            for the first `rank`; what follows is an arbitrary orthonormal rest with sigma 0).
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
    rest = torch.linalg.qr(torch.cat((first[..., :rank], start_rest(first, width)), -1)).Q
    w = torch.cat((first[..., :rank], rest[..., rank:]), -1)
    sigma = torch.nn.functional.pad(inner.sigma[..., :rank], (0, width - rank))
    return Spectrum(sigma, w)


def start_rest(like: Tensor, width: int) -> Tensor:
    """Columns from which an orthonormal rest is made."""
    more = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    return more.to(like).expand(*like.shape[:-2], width, width)[..., : width]


def _root(g: Tensor, power: float) -> Tensor:
    """g^power of a positive semidefinite g, in float64; directions without weight stay 0."""
    values, vectors = torch.linalg.eigh(g.double())
    kept = values > values[..., -1:].clamp_min(1e-300) * 1e-12
    return (vectors * values.clamp_min(1e-300).pow(power).where(kept, 0.0)[..., None, :]) @ vectors.mT


def joint_maps(gram_q: Tensor, gram_k: Tensor) -> Maps:
    """The best factors of every rank for S = Q K^T, from both Gram matrices (..., d, d)."""
    root = _root(gram_q, 0.5)
    u = torch.linalg.svd(root @ _root(gram_k, 0.5))[0]
    return Maps((_root(gram_q, -0.5) @ u).to(gram_q.dtype), (root @ u).to(gram_q.dtype))


def key_maps(spectrum_k: Spectrum) -> Maps:
    """Keys truncated, queries as they are: S_r = Q K_r^T."""
    return Maps(spectrum_k.w, spectrum_k.w)


def grouped(x: Tensor, maps: Tensor, kv_heads: int) -> Tensor:
    """x (B, Hq, n, d) by the maps of their key heads (B, Hkv, d, r): (B, Hq, n, r), x's dtype."""
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
        held: (B, Hkv, m, c), keys so far on the first c columns.
        macs: multiply-adds done for each sequence and head.
    """

    def __init__(self, right: Tensor, held: Tensor | None = None) -> None:
        self.right, self.held, self.macs = right, held, 0

    def upto(self, k: Tensor, rank: int) -> Tensor:
        """(B, Hkv, n, rank) of all keys k (B, Hkv, n, d), of which the first m are known."""
        right, width = self.right.to(k.dtype), k.shape[-1]
        held = k.new_zeros(*k.shape[:2], 0, rank) if self.held is None else self.held
        known, columns = held.shape[2:]
        if rank > columns:
            more = k[:, :, :known] @ right[..., columns:rank]
            held = torch.cat((held, more), -1)
            self.macs += known * width * (rank - columns)
            columns = rank
        if k.shape[2] > known:
            held = torch.cat((held, k[:, :, known:] @ right[..., :columns]), 2)
            self.macs += (k.shape[2] - known) * width * columns
        self.held = held
        return held[..., :rank]
