"""The variant whose softmax is its second-order Taylor expansion, in linear time.

With s = q.k / sqrt(d), queries and keys have features phi, and o_i is a ratio of running sums:

    joint_full   phi(x) = [1, x d^-1/4, vec(x x^T) d^-1/2 / sqrt 2], weights 1 + s + s^2 / 2
    joint_diag   phi(x) = [1, x d^-1/4, x^2 d^-1/2 / sqrt 2], 1 + s + sum_l q_l^2 k_l^2 / 2d
                 o_i = phi(q_i) S_i / phi(q_i) n_i,
                 S_i = sum_{j<=i} phi(k_j)^T v_j, n_i = sum_{j<=i} phi(k_j)
    printed      the features of joint_diag, each of its three terms normalised by itself and added

joint_full (Arora et al. 2024, "Based") has weights of 1/2 or more; the others' denominators can
come near 0, where they are kept at `eps`. vec(x x^T) is symmetric: d (d + 1) / 2 numbers hold it.
Within a chunk of keys the weights are formed directly; all earlier chunks are in S and n.

Source: arXiv 2510.11602, equation 6 and its appendix (joint_diag and printed); 2402.18668
(joint_full).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.methods.deconstructing.running import in_chunks, of_nothing, seen, wide, without_lse
from foveate.ops import AttentionOutput
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.precision import uncast
from foveate.parts.state import State, Stateful

FORMS = ("joint_full", "joint_diag", "printed")


@dataclass(frozen=True)
class Approximate(Stateful):
    """Second-order Taylor attention; see the module's text.

    Attributes:
        form: "joint_full", "joint_diag" or "printed".
        chunk: keys whose weights are formed directly, which changes no result.
        eps: least absolute value of a denominator.

    Raises:
        InputError: an unknown form, or a number out of its range; when called, a mask that is
            neither causal nor full.
    """

    form: str = "joint_full"
    chunk: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"Approximate(form={self.form!r}): {nearest(str(self.form), FORMS)}")
        whole("Approximate", "chunk", self.chunk, least=1)
        if not 0 < self.eps < 1:
            raise InputError(f"Approximate(eps={self.eps!r}): expected a small number above 0.")

    def new_state(self) -> State:
        """Empty sums; they are declared once the first tokens tell their sizes."""
        return State(())

    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        """All tokens at once; shapes as in `Attention.__call__`, Lq = Lkv. There is no lse."""
        with uncast(q):
            return self._run(q, k, v, ctx, None)

    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """The next tokens."""
        with uncast(q):
            return self._run(q, k, v, ctx, state)

    def features(self, x: Tensor, scale: float) -> Tensor:
        """Features (..., F) of x (..., D): phi(q).phi(k) is the weight of a score scale * q.k."""
        one = torch.ones_like(x[..., :1])
        if self.form != "joint_full":
            return torch.cat((one, x * scale**0.5, x.square() * (scale / math.sqrt(2))), -1)
        a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        factor = scale / torch.where(a == b, 2.0, 1.0).to(x.dtype).sqrt()
        return torch.cat((one, x * scale**0.5, x[..., a] * x[..., b] * factor), -1)

    def weights(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, ...]:
        """What each term of the output weighs the values by, not normalised: (..., n, m) each."""
        s = q @ k.transpose(-1, -2) * scale
        if self.form == "joint_full":
            return (1 + s + 0.5 * s.square(),)
        squares = q.square() @ k.square().transpose(-1, -2) * (0.5 * scale * scale)
        if self.form == "joint_diag":
            return (1 + s + squares,)
        return torch.ones_like(s), s, squares

    def _terms(self, dim: int) -> tuple[slice, ...]:
        """Which features each term is made of."""
        if self.form != "printed":
            return (slice(None),)
        return slice(0, 1), slice(1, 1 + dim), slice(1 + dim, None)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State | None
    ) -> AttentionOutput:
        check_tensors(q, k, v)
        if not q.shape[2]:
            return of_nothing(q, v)
        causal, real = seen("approximate", q, k, 0 if state is None else len(state), ctx)
        scale = q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
        if not scale > 0:
            raise InputError(f"approximate: expected a scale above 0, got {scale!r}.")
        batch, groups = len(k), k.shape[1]
        rows = (
            wide(q).unflatten(1, (groups, -1)),
            wide(k)[:, :, None],
            wide(v)[:, :, None],
            None if real is None else wide(real.float())[:, None, None].expand(batch, -1, -1, -1),
        )
        if state is None and causal and q.shape[2] <= self.chunk:  # there is nothing to hand on
            out = self._out(None, None, *rows, scale=scale, causal=True)
            return without_lse(out.flatten(1, 2).to(v.dtype))
        sums: tuple[Tensor, ...] = self._before(rows[1], rows[2], scale, state)

        def run(total: Tensor, norm: Tensor, *some: Tensor) -> tuple[Tensor, ...]:
            return self._chunk(total, norm, *some, scale=scale, causal=causal)

        if not causal:  # all keys first, then all queries

            def add(
                total: Tensor, norm: Tensor, keys: Tensor, values: Tensor, kept: Tensor | None
            ) -> tuple[Tensor, ...]:
                sums = self._added(total, norm, keys, values, kept, scale)
                return (norm.new_zeros(()), *sums)

            _, sums = in_chunks(add, sums, rows[1:], (3, 3, 3), self.chunk)
        outs, (total, norm) = in_chunks(run, sums, rows, (3, 3, 3, 3), self.chunk)
        if state is not None:
            state.held = {"values": total.squeeze(2), "keys": norm.squeeze(2)}
            state.fields = tuple(
                Field(name, "sequence", tuple(x.shape[1:]), 1) for name, x in state.held.items()
            )
            state.length += q.shape[2]
        return without_lse(torch.cat(outs, 3).flatten(1, 2).to(v.dtype))

    def _before(
        self, k: Tensor, v: Tensor, scale: float, state: State | None
    ) -> tuple[Tensor, Tensor]:
        """The sums so far: (B, Hkv, 1, F, Dv) and (B, Hkv, 1, F)."""
        if state is not None and state.held:
            return state.held["values"][:, :, None], state.held["keys"][:, :, None]
        size = self.features(k[:1, :1, :, :1], scale).shape[-1]
        total = v.new_zeros(*k.shape[:3], size, v.shape[-1])
        return total, total.new_zeros(total.shape[:-1])

    def _added(
        self, total: Tensor, norm: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The sums with a chunk of keys in them."""
        phi = self.features(k, scale)
        if real is not None:
            phi = phi * real[..., None]
        return total + phi.transpose(-1, -2) @ v, norm + phi.sum(-2)

    def _chunk(
        self, total: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None,
        *, scale: float, causal: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """A chunk's output (B, Hkv, G, n, Dv), and the sums behind it."""
        out = self._out(total, norm, q, k, v, real, scale=scale, causal=causal)
        if not causal:
            return out, total, norm
        return (out, *self._added(total, norm, k, v, real, scale))

    def _out(
        self, total: Tensor | None, norm: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        real: Tensor | None, *, scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        """The output (B, Hkv, G, n, Dv) from the sums before, if any, and the chunk's own keys."""
        phi = None if total is None else self.features(q, scale)
        forms = self.weights(q, k, scale) if causal else ()
        out = torch.zeros_like(v[..., :1, :])
        for number, part in enumerate(self._terms(q.shape[-1])):
            above, below = torch.zeros_like(v[..., :1, :]), torch.zeros_like(q[..., 0])
            if phi is not None and total is not None and norm is not None:
                above = phi[..., part] @ total[..., part, :]
                below = (phi[..., part] @ norm[..., part, None]).squeeze(-1)
            if causal:
                weight = forms[number].tril()
                if real is not None:
                    weight = weight * real[..., None, :]
                above, below = above + weight @ v, below + weight.sum(-1)
            safe = torch.where(below < 0, below.clamp_max(-self.eps), below.clamp_min(self.eps))
            out = out + above / safe[..., None]
        return out
