"""The two relations of tokens: similarity in the layer, and the attention layer before it.

Similarity-Aware      S_ij = softmax_j(u_i^T W_s u_j / tau)                 algorithm 2
Attention-Aware       Abar = sum_h w_{h,i} A_h                              algorithm 3
both                  rbar(i) = sum_j S_ij r(u_j),  or Abar_ij

Neither matrix is held. S is an attention with queries u_i, keys W_s u_j and values r(u_j), run by
the core op; Abar r(u) is the layer's own attention run again with r(u) in the place of its values,
head by head, and then averaged. The mask is the layer's: causal in a language model (a similarity
that looks ahead would leak the future), without padding and other documents.

Cost for N tokens: 2 N D^2 + 2 N^2 (D + E) operations by similarity; 2 H N^2 (D_h + E) by attention,
whose weights are made again. Kept of a token in decoding: E + D numbers, or E.

Nguyen et al. 2025, arXiv 2505.00792.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from foveate.methods.full import Full
from foveate.ops.errors import InputError
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.kv_cache import Entries, token_field
from foveate.parts.precision import uncast
from foveate.parts.routing import Around, Relation

HEADS = ("mean", "learned", "posterior")


class SimilarityRelation(Relation):
    """S_ij = softmax_j(u_i^T W_s u_j / tau); W_s begins as the identity.

    Args:
        dim: D.
        tau: temperature.
        learned: whether W_s is trained; else it stays the identity.
        normalize: whether u is scaled to norm sqrt(D) first, so that a token's score with itself,
            D / tau, doesn't grow with the norm.
    """

    def __init__(self, dim: int, tau: float, *, learned: bool = True, normalize: bool = False):
        super().__init__()
        self.dim, self.tau, self.normalize = dim, tau, normalize
        self.form = nn.Parameter(torch.eye(dim)) if learned else None

    def reset_parameters(self) -> None:
        """W_s = I."""
        if self.form is not None:
            nn.init.eye_(self.form)

    @override
    def fields(self, experts: int) -> tuple[Field, ...]:
        return token_field("routes", 1, experts), token_field("similar", 1, self.dim)

    @override
    def forward(self, u: Tensor, routes: Tensor, around: Around) -> Tensor:
        if self.normalize:
            u = functional.normalize(u, dim=-1) * sqrt(self.dim)
        with uncast(u):
            keys = u if self.form is None else functional.linear(u, self.form.to(u.dtype))
        held = {"routes": routes[:, None], "similar": keys[:, None]}
        if around.cache is not None:
            held = around.cache.append(held)
        known = around.ctx
        ctx = Context(
            mask=known.mask,
            q_positions=known.q_positions,
            kv_positions=known.kv_positions,
            phase=known.phase,
            scale=1 / self.tau,
            backend=known.backend,
            store=known.store,
        )
        with uncast(u):
            out, lse = Full()(u[:, None], held["similar"], held["routes"], ctx)
        return torch.where((lse == -torch.inf)[:, 0, :, None], routes, out[:, 0])

    @override
    def extra_repr(self) -> str:
        """What torch prints of it."""
        shown = ", normalized" if self.normalize else ""
        return f"{self.dim}, tau={self.tau:g}, learned={self.form is not None}{shown}"


class AttentionRelation(Relation):
    """Abar = sum_h w_{h,i} A_h, of the attention layer in the same block.

    The paper's rule for w isn't told in what could be read of it; these are offered:

        mean        w = 1 / H
        learned     w = softmax of one number for each head, which begin equal
        posterior   w_{h,i} = softmax_h(-||u_i - o_{h,i}||^2 / (2 s^2)), o_{h,i} head h's part of
                    the attention layer's y: the responsibility of head h for u_i

    Rows whose weights don't sum to 1 (a learnt sink takes a part) are scaled to it.

    Args:
        heads: H.
        how: one of the three.
        spread: s.
    """

    wants_weights = True

    def __init__(
        self, heads: int, how: Literal["mean", "learned", "posterior"], spread: float = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.how, self.spread = heads, how, spread
        self.weight = nn.Parameter(torch.zeros(heads)) if how == "learned" else None

    def reset_parameters(self) -> None:
        """All heads alike."""
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    @override
    def fields(self, experts: int) -> tuple[Field, ...]:
        return (token_field("routes", 1, experts),)

    @override
    def forward(self, u: Tensor, routes: Tensor, around: Around) -> Tensor:
        if around.again is None:
            raise InputError(
                "An attention-aware router needs the attention layer's weights: use it in a "
                "foveate.nn.Block behind foveate.Attention."
            )
        held: Entries = {"routes": routes[:, None]}
        if around.cache is not None:
            held = around.cache.append(held)
        by_head = around.again(held["routes"][:, 0])  # (B, H, L, E)
        shares = self._shares(u, around)
        mixed = by_head.mean(1) if shares is None else (shares[..., None] * by_head).sum(1)
        total = mixed.sum(-1, keepdim=True)
        return torch.where(total > 0, mixed / total.where(total > 0, 1.0), routes)

    def _shares(self, u: Tensor, around: Around) -> Tensor | None:
        """w, broadcastable to (B, H, L); None is the mean."""
        if self.weight is not None:
            return self.weight.to(u.dtype).softmax(0)[None, :, None]
        if self.how == "mean":
            return None
        assert around.again is not None
        far = [(u - o.to(u.dtype)).square().sum(-1) for o in around.again.projected()]
        return (torch.stack(far, 1) / (-2 * self.spread**2)).softmax(1)

    @override
    def extra_repr(self) -> str:
        """What torch prints of it."""
        shown = f", spread={self.spread:g}" if self.how == "posterior" else ""
        return f"{self.heads} heads, {self.how}{shown}"
