"""The circuits of attention heads as low-rank matrices, and their singular components.

Rows are tokens: a residual x is a row (D,), a head has W_Q, W_K, W_V (D, d) and W_O (d, D).

    OV = W_V W_O = sum_i s_i u_i v_i^T      what a head writes: x -> x OV;  u_i reads, v_i writes
    QK = W_Q W_K^T                          score(q, k) = x_q QK x_k^T / sqrt(d)

With rotary positions QK depends on how far the key stands behind the query:
QK(delta) = W_Q R_delta W_K^T. Grouped-query attention pairs every query head with its group's key
and value head.

No D x D matrix is formed: the SVD of a product of rank d is a QR of either factor and the SVD of a
d x d core, O(D d^2). Merullo, Eickhoff and Pavlick 2024, arXiv 2406.09519; the circuits are Elhage
et al.'s (2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.rope import Rope


class Spectrum(NamedTuple):
    """A singular value decomposition: M = u diag(s) v^T, s falling.

    u: (..., D, r), columns are read; s: (..., r); v: (..., D, r), columns are written.
    """

    u: Tensor
    s: Tensor
    v: Tensor


class Factored(NamedTuple):
    """A matrix (..., D, E) of rank r as left (..., D, r) times right (..., r, E)."""

    left: Tensor
    right: Tensor

    @property
    def transposed(self) -> Factored:
        """The transposed matrix, in factors."""
        return Factored(self.right.mT, self.left.mT)

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.left @ self.right

    def svd(self) -> Spectrum:
        """Its singular components, min(r, D, E) of them; signs are arbitrary."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.mT)
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        return Spectrum(q_left @ u, s, q_right @ vh.mT)

    def compact(self) -> Tensor:
        """(..., D, r') with ||x compact|| = ||x M|| for every row x: orthonormal rows dropped."""
        r_right: Tensor = torch.linalg.qr(self.right.mT, mode="r").R
        return self.left @ r_right.mT

    def norm(self) -> Tensor:
        """Frobenius norm, (...,)."""
        r_left: Tensor = torch.linalg.qr(self.left, mode="r").R
        r_right: Tensor = torch.linalg.qr(self.right.mT, mode="r").R
        return torch.linalg.matrix_norm(r_left @ r_right.mT)


@dataclass(frozen=True)
class Heads:
    """The maps of N heads of a model, in the order of its layers.

    Attributes:
        q, k: (N, D, d); v: (N, D, e); o: (N, e, D). Of grouped heads each has its group's k and v.
        layer, head: (N,) int64, where each stands; the heads of a layer don't see each other.
        ropes: rotary positions by layer; a layer without an entry has none.

    Raises:
        InputError: shapes don't fit together.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    layer: Tensor
    head: Tensor
    ropes: Mapping[int, Rope | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, dim, width = self.q.shape if self.q.dim() == 3 else (0, 0, 0)
        fits = (
            count > 0
            and self.k.shape == (count, dim, width)
            and self.v.shape[:2] == (count, dim)
            and self.o.shape == (count, self.v.shape[-1], dim)
            and self.layer.shape == self.head.shape == (count,)
        )
        if not fits:
            shapes = [tuple(x.shape) for x in (self.q, self.k, self.v, self.o)]
            raise InputError(
                f"Heads: expected q and k (N, D, d), v (N, D, e), o (N, e, D), layer and head "
                f"(N,); got {shapes}, {tuple(self.layer.shape)} and {tuple(self.head.shape)}."
            )

    def __len__(self) -> int:
        return len(self.q)

    @property
    def dim(self) -> int:
        """D, the width of the residual stream."""
        return int(self.q.shape[1])

    def to(self, dtype: torch.dtype) -> Heads:
        """The same in another dtype."""
        q, k, v, o = (x.to(dtype) for x in (self.q, self.k, self.v, self.o))
        return replace(self, q=q, k=k, v=v, o=o)

    def only(self, index: int) -> Heads:
        """One head alone, by its index."""
        one = slice(index, index + 1)
        q, k, v, o, layer, head = (
            x[one] for x in (self.q, self.k, self.v, self.o, self.layer, self.head)
        )
        return Heads(q, k, v, o, layer, head, self.ropes)

    def at(self, layer: int, head: int) -> int:
        """The index of a head.

        Raises:
            InputError: there is no such head.
        """
        found = ((self.layer == layer) & (self.head == head)).nonzero()
        if not len(found):
            raise InputError(
                f"There is no head {layer}.{head}: the layers are {int(self.layer.min())} to "
                f"{int(self.layer.max())}, the heads 0 to {int(self.head.max())}."
            )
        return int(found[0])

    def ov(self) -> Factored:
        """W_V W_O of every head, (N, D, D)."""
        return Factored(self.v, self.o)

    def qk(self, offset: int | None = None) -> Factored:
        """W_Q W_K^T of every head, (N, D, D).

        Args:
            offset: how far the key stands behind the query, in tokens, where positions are rotary;
                None leaves them out (an approximation, exact for an offset of 0 but for YaRN's
                scaling).
        """
        q, k = self.q, self.k
        if offset is not None and any(self.ropes.values()):
            q, k = q.clone(), k.clone()
            for layer, rope in self.ropes.items():
                mine = self.layer == layer
                if rope is None or not bool(mine.any()):
                    continue
                at = torch.full((self.dim,), offset, device=q.device)
                q[mine] = rope.rotate(q[mine][None], at)[0]
                k[mine] = rope.rotate(k[mine][None], torch.zeros_like(at))[0]
        return Factored(q, k.mT)
