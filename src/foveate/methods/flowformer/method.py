"""Flow-Attention as an attention of its own, with the sums that it decodes from as its state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from foveate.methods.flowformer.flows import (
    Flows,
    Options,
    Sums,
    causal,
    normal,
    read_all,
    read_before,
)
from foveate.ops import AttentionOutput
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full, sees_later
from foveate.parts.precision import uncast
from foveate.parts.state import State, Stateful
from foveate.parts.tokens import Tokens, queries_that_are, tokens_of

PHI = ("sigmoid", "relu")
_FIELDS = ("count", "k", "q", "k_over_o", "q_over_i", "log_z", "s")


@dataclass(frozen=True)
class Flowformer(Stateful):
    """Linear-time attention whose weights come from conserving flows; arXiv 2202.06258.

    `foveate.methods.flowformer.flows` has the equations. The mask must be causal or none, padding
    aside, which makes the causal or the normal form; cross-attention is the normal form. As many
    queries as keys are taken for the same tokens, padded alike, unless `ctx.real` tells which
    queries are real, as `foveate.Attention` does. There is no factor on scores, no softmax over
    keys and no log-sum-exp (`lse` is NaN). Rows of weights don't sum to 1: the allocation scales
    outputs by about sigmoid(1) = 0.73. Flows and sums are in fp32 or wider, under autocast too.

    Decoding keeps sums over all tokens so far, 4 D + 1 + D Dv numbers for each head however long
    the sequence, from which none can be taken back.

    Attributes:
        phi: "sigmoid", or "relu" (relu + 1e-6, as in the paper's code for the Long Range Arena).
        eps: added to every vector of a flow.
        clamp: limit of |Ohat|: a number, None, or "default", which is none in the normal form and
            10 in the causal form. The paper's code has 1 (vision, generic), 5 (language), 10
            (reinforcement learning) or none; at 1 all sources above the mean compete alike.
        competition: False is the ablation c = 1.
        allocation: False is the ablation a = 1. Both False is linear attention.
        chunk: tokens that the causal form takes at once; changes speed and memory only.

    Raises:
        InputError: a field that doesn't fit.
    """

    phi: str = "sigmoid"
    eps: float = 1e-6
    clamp: float | str | None = "default"
    competition: bool = True
    allocation: bool = True
    chunk: int = 64

    def __post_init__(self) -> None:
        whole("Flowformer", "chunk", self.chunk, least=1)
        if self.phi not in PHI:
            raise InputError(f"Flowformer(phi={self.phi!r}) is unknown; {nearest(self.phi, PHI)}")
        if not isinstance(self.eps, int | float) or not 0 <= self.eps < 1:
            raise InputError(f"Flowformer(eps={self.eps!r}): expected 0 or a little more.")
        number = isinstance(self.clamp, int | float) and not isinstance(self.clamp, bool)
        if self.clamp not in (None, "default") and not (number and float(self.clamp) > 0):
            raise InputError(
                f'Flowformer(clamp={self.clamp!r}): expected a number above 0, None or "default".'
            )

    # -- calls -------------------------------------------------------------------------------------
    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        """All tokens at once; shapes as in `Attention`."""
        with uncast(q):
            return self._full(q, k, v, ctx)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        self._check(q, k, v, ctx)
        if ctx.mask is not None:
            ctx.mask._check(q.shape[2], k.shape[2])
        if not q.shape[0] or not q.shape[2] or not k.shape[2]:
            return _output(v.new_zeros(*q.shape[:3], v.shape[3]))
        tokens = _tokens(q, k, ctx)
        fq, fk = self._features(q, k, tokens.q_real, tokens.k_real)
        wide = _grouped_values(v, fq)
        if sees_later(ctx, tokens):
            flows, competition = normal(fq, fk, tokens.q_real, tokens.k_real, self._options(False))
            values = _kept(wide, tokens.k_real) * competition[..., None]
            read = read_all(fq, fk, values)
        else:
            _check_square(q, k)
            flows, competition, _ = causal(fq, fk, tokens.q_real, self._options(True), {})
            values = _kept(wide, tokens.q_real) * competition[..., None]
            read, _ = read_before(fq, fk, values, self.chunk, None)
        return _finished(read, flows, v)

    @override
    def new_state(self) -> State:
        """No sums yet; their shapes are those of the first tokens."""
        return State([Field(name, "sequence", (), 1) for name in _FIELDS])

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """New tokens against the sums of all before; shapes as in `Stateful`."""
        with uncast(q):
            return self._step(q, k, v, ctx, state)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        self._check(q, k, v, ctx)
        _check_square(q, k)
        _check_causal(q, k, ctx, len(state))
        real = ctx.real
        if real is None:
            real = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
        fq, fk = self._features(q, k, real, real)
        sums: Sums = dict(state.held)
        matrix = sums.pop("s", None)
        flows, competition, sums = causal(fq, fk, real, self._options(True), sums)
        values = _kept(_grouped_values(v, fq), real) * competition[..., None]
        read, sums["s"] = read_before(fq, fk, values, self.chunk, matrix)
        state.held = sums
        state.length += q.shape[2]
        state.fields = tuple(
            Field(name, "sequence", tuple(x.shape[1:]), 1) for name, x in sums.items()
        )
        return _finished(read, flows, v)

    def flows(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Flows:
        """The flows of a call on a whole sequence, to look at; shapes as in `Attention`.

        The weights are a_i fq_i.fk_j c_j / I_i, with fq, fk of `features`.
        """
        ctx = Context() if ctx is None else ctx
        self._check(q, k, k, ctx)
        tokens = _tokens(q, k, ctx)
        with uncast(q):
            fq, fk = self._features(q, k, tokens.q_real, tokens.k_real)
            if sees_later(ctx, tokens):
                return normal(fq, fk, tokens.q_real, tokens.k_real, self._options(False))[0]
            _check_square(q, k)
            return causal(fq, fk, tokens.q_real, self._options(True), {})[0]

    def features(self, x: Tensor) -> Tensor:
        """phi(x), in fp32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.sigmoid() if self.phi == "sigmoid" else functional.relu(x) + 1e-6

    # -- the work ----------------------------------------------------------------------------------
    def _features(
        self, q: Tensor, k: Tensor, q_real: Tensor, k_real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, K, G, n, D) and (B, K, m, D); 0 on padding, after phi: phi(0) isn't 0."""
        fq = _kept(self.features(q).unflatten(1, (k.shape[1], -1)), q_real)
        fk = self.features(k)
        return fq, fk if bool(k_real.all()) else fk.masked_fill(~k_real[:, None, :, None], 0)

    def _options(self, causal: bool) -> Options:
        clamp = self.clamp
        if isinstance(clamp, str):
            clamp = 10.0 if causal else None
        return Options(self.eps, clamp, self.competition, self.allocation)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> None:
        check_tensors(q, k, v)
        for name in ("softcap", "sink_logits", "bias"):
            if getattr(ctx, name) is not None:
                raise InputError(
                    f"flowformer has no scores before a softmax, so {name} has no meaning here; "
                    "leave it out."
                )
        if ctx.dropout:
            raise InputError(
                "flowformer never makes its weights, so none can be dropped; use dropout=0 here "
                "and, as the paper does, dropout on the layer's output."
            )


def _tokens(q: Tensor, k: Tensor, ctx: Context) -> Tokens:
    tokens = tokens_of(q, k, ctx)
    if not is_causal_or_full(ctx, tokens):
        raise InputError(
            "flowformer is defined for causal attention and for attention to everything, but the "
            "mask is neither (a sliding window or packed documents, for example); call it per "
            "document, or use a method that keeps to any mask, such as block-sparse."
        )
    # Cross-attention's queries are other tokens than its keys, whose padding says nothing of them.
    seen = tokens.k_real.any(1, keepdim=True)
    if ctx.real is not None:
        real = ctx.real & seen
    elif q.shape[2] == k.shape[2]:
        real = queries_that_are(tokens)
    else:
        real = seen.expand(-1, q.shape[2])
    return replace(tokens, q_real=real)


def _check_square(q: Tensor, k: Tensor) -> None:
    if q.shape[2] != k.shape[2]:
        raise InputError(
            "flowformer: in the causal form a flow is measured with the queries of all tokens, but "
            f"there are {q.shape[2]} queries and {k.shape[2]} keys; decode with its own state, by "
            "foveate.Attention(..., attention='flowformer').new_cache()."
        )


def _check_causal(q: Tensor, k: Tensor, ctx: Context, past: int) -> None:
    """Refuse to step under a mask that isn't causal."""
    if ctx.mask is None:
        raise InputError("flowformer keeps sums of the past: give mask=causal() with its cache.")
    if ctx.mask.spec == "causal()" and ctx.q_positions is None:
        return
    length = past + k.shape[2]
    keys = k.new_empty(1).expand(*k.shape[:2], length, k.shape[3])  # takes no memory
    tokens = _tokens(q, keys, ctx)
    if sees_later(ctx, tokens) and bool((tokens.k_real.sum(1) > 1).any()):
        raise InputError("flowformer keeps sums of the past: give mask=causal() with its cache.")


def _kept(x: Tensor, real: Tensor) -> Tensor:
    """0 on padding, which may hold anything: x (B, K, G, n, D), real (1 or B, n)."""
    return x if bool(real.all()) else x.masked_fill(~real[:, None, None, :, None], 0)


def _grouped_values(v: Tensor, fq: Tensor) -> Tensor:
    """(B, K, 1, m, Dv), in the features' dtype."""
    return v.to(fq.dtype)[:, :, None]


def _finished(read: Tensor, flows: Flows, v: Tensor) -> AttentionOutput:
    out = read.flatten(1, 2) * (flows.allocation / flows.incoming)[..., None]
    return _output(out.to(v.dtype))


def _output(out: Tensor) -> AttentionOutput:
    wide = torch.promote_types(out.dtype, torch.float32)
    return AttentionOutput(out, out.new_full(out.shape[:3], torch.nan, dtype=wide))
