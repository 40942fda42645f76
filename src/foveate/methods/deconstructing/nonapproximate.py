"""The variant whose weights depend on the key alone, so that a running softmax is all there is.

One scalar score for each key position and head, of the query and key of the *same* position:

    s_j  = sum_l q_jl k_jl / sqrt(d),   q = SiLU(H W_Q), k = H W_K
    A_ij = exp(s_j) / sum_{t<=i} exp(s_t),   o_i = sum_{j<=i} A_ij v_j

Row i is row i - 1 rescaled, with one entry more. With m the greatest score so far,
D = sum exp(s_t - m) and N = sum exp(s_t - m) v_t, o_i = N / D: a state of d + 2 numbers a head.
Positions would cancel in s_j: there are none. The log-sum-exp m + log D is that of a softmax over
these scores, so that results over disjoint keys merge as usual.

Source: arXiv 2510.11602, variant "Non-approximate".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.methods.deconstructing.running import in_chunks, of_nothing, seen, wide
from foveate.ops import AttentionOutput
from foveate.ops.check import check_tensors
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.norm import rms
from foveate.parts.precision import uncast
from foveate.parts.state import State, Stateful


@dataclass(frozen=True)
class NonApproximate(Stateful):
    """A running softmax over one score for each key; see the module's text.

    Attributes:
        silu: q = SiLU(H W_Q) as in the paper, not H W_Q.
        norm: divide q and k by their root mean square before (as QK-RMSNorm does in the paper's
            1.7B model, which keeps deep uniform stacks from diverging; here without weights).
        chunk: keys whose weights are formed directly, which changes no result.

    Raises:
        InputError: chunk is below 1; when called, a mask that is neither causal nor full.
    """

    rotary: ClassVar[bool] = False

    silu: bool = True
    norm: bool = False
    chunk: int = 64

    def __post_init__(self) -> None:
        whole("NonApproximate", "chunk", self.chunk, least=1)

    def new_state(self) -> State:
        """Empty sums; they are declared once the first tokens tell their sizes."""
        return State(())

    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        """All tokens at once; shapes as in `Attention.__call__`, Lq = Lkv, q and k not rotated."""
        with uncast(q):
            return self._run(q, k, v, ctx, None)

    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """The next tokens."""
        with uncast(q):
            return self._run(q, k, v, ctx, state)

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Scores s (B, Hq, L) in fp32 or wider, from q (B, Hq, L, D) and k (B, Hkv, L, D)."""
        q, k = wide(q), wide(k)
        if self.norm:
            q, k = q / rms(q, 1e-6), k / rms(k, 1e-6)
        if self.silu:
            q = functional.silu(q)
        groups = q.unflatten(1, (k.shape[1], -1))
        return ((groups * k[:, :, None]).sum(-1) * scale).flatten(1, 2)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State | None
    ) -> AttentionOutput:
        check_tensors(q, k, v)
        if not q.shape[2]:
            return of_nothing(q, v)
        causal, real = seen("non-approximate", q, k, 0 if state is None else len(state), ctx)
        scale = q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
        s = self.scores(q, k, scale).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, L)
        if real is not None:
            s = s.masked_fill(~real[:, None, None], -torch.inf)
        rows = wide(v)[:, :, None]
        if not causal:
            some = (s > -torch.inf).any(-1, keepdim=True)
            weight = torch.where(some, s, 0.0).softmax(-1) * some
            out = (weight[..., None, :] @ rows).expand(*s.shape, -1)
            lse = s.logsumexp(-1, keepdim=True).expand(s.shape)
            return AttentionOutput(out.flatten(1, 2).to(v.dtype), lse.flatten(1, 2))
        outs, sums = in_chunks(_chunk, self._before(s, rows, state), (s, rows), (3, 3), self.chunk)
        if state is not None:
            top, below, above = sums
            state.held = {"values": above, "weights": below, "top": top}
            state.fields = tuple(
                Field(name, "sequence", tuple(x.shape[1:]), 1) for name, x in state.held.items()
            )
            state.length += q.shape[2]
        made = torch.cat(outs, 3).flatten(1, 2)
        return AttentionOutput(made[..., :-1].to(v.dtype), made[..., -1])

    def _before(self, s: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
        """m, D and N so far: (B, Hkv, G), (B, Hkv, G), (B, Hkv, G, Dv)."""
        if state is not None and state.held:
            return state.held["top"], state.held["weights"], state.held["values"]
        below = s.new_zeros(s.shape[:3])
        return below - torch.inf, below, s.new_zeros(*s.shape[:3], v.shape[-1])


def _chunk(
    top: Tensor, below: Tensor, above: Tensor, s: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A chunk's outputs and lse (B, Hkv, G, n, Dv + 1), and m, D, N behind it.

    Args:
        top, below, above: m, D and N before it.
        s: (B, Hkv, G, n).
        v: (B, Hkv, 1, n, Dv).
    """
    with torch.no_grad():  # any m gives the same ratio
        tops = torch.maximum(s.cummax(-1).values, top[..., None])
        safe = tops.masked_fill(tops == -torch.inf, 0.0)
    n = s.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=s.device).triu(1)
    weight = (s[..., None, :] - safe[..., None]).masked_fill(later, -torch.inf).exp()
    old = (top[..., None] - safe).exp()
    d = weight.sum(-1) + old * below[..., None]
    numerator = weight @ v + old[..., None] * above[..., None, :]
    some = d > 0  # a row of padding sees nothing: out 0, lse -inf, and no gradient
    divisor = torch.where(some, d, 1.0)
    out = numerator / divisor[..., None]
    lse = torch.where(some, safe + divisor.log(), -torch.inf)
    return torch.cat((out, lse[..., None]), -1), tops[..., -1], d[..., -1], numerator[..., -1, :]
