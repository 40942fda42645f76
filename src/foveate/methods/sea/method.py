"""SEA: a small linear network estimates where attention goes, exact attention runs only there.

    S (H, L, K), s1, s2 = estimator(q, k, v);      A = softmax_K(S)
    M       = the best bins of A, stretched to the keys that each row sees       about k a row
    P       = softmax of q k^T / sqrt d over M,    Cs = sigmoid(s1) P v
    O       = sigmoid(s2) Cs + (1 - sigmoid(s2)) Cbar

Cbar is the running mean of v (causal), or sum_j w_j v_j with w the mean of A over queries,
stretched. Lee et al. 2023, arXiv 2310.01777. Everything is linear in L; M has no gradient, so the
estimator learns from a dense teacher: see `losses` and `foveate.models.distil`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.sea.compress import GROUPS, bins_of, budgets, keep_best
from foveate.methods.sea.estimator import REACH, Estimate, Estimator, Past
from foveate.methods.sea.layout import Stretch, layout_of
from foveate.methods.sea.lora import Lora, Split
from foveate.methods.sea.performer import Sums
from foveate.methods.sea.state import SeaState
from foveate.methods.sea.trace import Trace
from foveate.ops import AttentionOutput, Layout, attention
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import AttentionRecipe, Heads
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.form import check_prompt, check_step, is_causal_or_full
from foveate.parts.state import State, Stateful
from foveate.parts.tokens import tokens_of

JITTER, JITTERED = 0.75, 0.1


@dataclass(frozen=True)
class SEA(AttentionRecipe):
    """Sparse attention where an estimate of fixed width says; see the module's text.

    Attributes:
        k: keys that a query and head keep on average (64).
        width: K, of the estimate; a multiple of 4 (256; the paper has 128 for BERT).
        divisor: nbf; the Performer has int(d ln d / nbf) features (8; 1 for BERT).
        causal: the form that is built; each has weights of its own.
        group: among which bins the best are chosen: "causal_batch" (a row over all heads), the
            only choice of the causal form; "batch" (all), "head", "query"; None is the paper's.
        max_length: rows of the causal form's learnt table of positions.
        oversample: above 1, so many times as many bins are chosen, and each so-many-th key of them
            visited; without training.
        lora: rank of changes of q, k and v for the estimator and of q and k for the scores, made
            from the layer's input; 0 is none. With a rotation they are added after it.
        normalise_average: whether the bidirectional Cbar's weights are made to sum to 1; in the
            released code they sum to about L / K.
        redraw: training calls after which the Performer's features are drawn anew.

    Raises:
        InputError: a field that doesn't fit.
    """

    k: int = 64
    width: int = 256
    divisor: float = 8.0
    causal: bool = True
    group: str | None = None
    max_length: int = 4096
    oversample: int = 1
    lora: int = 0
    normalise_average: bool = False
    redraw: int = 1000

    def __post_init__(self) -> None:
        least = {"k": 1, "width": 4, "max_length": 1, "oversample": 1, "lora": 0, "redraw": 1}
        for name, bound in least.items():
            whole("SEA", name, getattr(self, name), least=bound)
        if self.width % 4:
            raise InputError(f"SEA(width={self.width}): expected a multiple of 4.")
        if not 0 < self.divisor < float("inf"):
            raise InputError(f"SEA(divisor={self.divisor!r}): expected a number above 0.")
        if self.group is not None and self.group not in GROUPS:
            raise InputError(f"SEA(group={self.group!r}): expected {', '.join(GROUPS)}, or None.")
        if self.causal and self.group not in (None, "causal_batch", "query"):
            raise InputError(
                f"SEA(group={self.group!r}) chooses among later rows too, so that routing would "
                "see the future; leave it out, or build the form with causal=False."
            )

    @property
    def chosen_group(self) -> str:
        """`group`, or the paper's."""
        return self.group or ("causal_batch" if self.causal else "batch")

    @override
    def build(self, heads: Heads) -> SEAAttention:
        return SEAAttention(self, heads)


class SEAAttention(Stateful, nn.Module):
    """SEA in a layer; made by `SEA.build`.

    Args:
        recipe: hyper-parameters.
        heads: sizes of the layer.

    Attributes:
        trace: a list takes a `Trace` of each call that isn't decoding; None takes none.
    """

    def __init__(self, recipe: SEA, heads: Heads) -> None:
        nn.Module.__init__(self)
        self.recipe, self.heads = recipe, heads
        self.estimator = Estimator(
            heads.query,
            (heads.key_dim, heads.value_dim),
            recipe.width,
            recipe.divisor,
            causal=recipe.causal,
            max_length=recipe.max_length,
            redraw=recipe.redraw,
        )
        self.lora = Lora(heads, recipe.lora) if recipe.lora else None
        self.trace: list[Trace] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend; see `foveate.parts.Attention`. There is no log-sum-exp: it is NaN."""
        return Stateful.__call__(self, q, k, v, ctx)

    # -- what is refused -------------------------------------------------------------------------
    def _checked(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        """Which tokens are real, (B, L).

        Raises:
            InputError: a call that SEA doesn't define.
        """
        _plain(ctx)
        if q.shape[2] != k.shape[2]:
            raise InputError(
                f"sea estimates from a sequence's own queries, but there are {q.shape[2]} queries "
                f"and {k.shape[2]} keys; decode with foveate.Attention's new_cache()."
            )
        tokens = tokens_of(q, k, ctx)
        if not is_causal_or_full(ctx, tokens):
            raise InputError(
                "sea estimates whole rows: give causal(), no mask, or either with padding(), not "
                f"{ctx.mask!r}."
            )
        if tokens.causal is not self.recipe.causal and q.shape[2] > 1:
            form = "causal" if self.recipe.causal else "bidirectional"
            raise InputError(
                f"This sea was built for {form} attention (causal={self.recipe.causal}), but the "
                "mask says otherwise (no mask is everything)."
            )
        return tokens.q_real.expand(len(q), -1)

    def _fits(self, length: int) -> None:
        if self.recipe.causal and length > self.recipe.max_length:
            raise InputError(
                f"sea has positions for {self.recipe.max_length:,} tokens, but the sequence has "
                f"{length:,}; build it with a greater max_length."
            )

    # -- all at once -----------------------------------------------------------------------------
    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        real = self._checked(q, k, ctx)
        self._fits(q.shape[2])
        if self.training and ctx.phase == "train":
            self.estimator.count_call()
        if not self.recipe.causal:
            return self._bidirectional(q, k, v, real, ctx)
        start = real.int().argmax(1)
        at = torch.arange(q.shape[2], device=q.device) - start[:, None]
        work = torch.promote_types(q.dtype, torch.float32)
        past = self.estimator.new_past(v, len(q), work)
        split = self._split(q, k, v, ctx)
        estimate, _ = self._estimate(split, at, past)
        mean = _running_mean(v, at)
        return self._attend(split, v, estimate, at, real, start, mean, ctx)

    def _split(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Split:
        return Split(q, k, v, q, k) if self.lora is None else self.lora(q, k, v, ctx.hidden)

    def _estimate(self, split: Split, at: Tensor, past: Past) -> tuple[Estimate, Past]:
        group = split.q.shape[1] // split.k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (split.k, split.v))
        return self.estimator.causally(split.q, k, v, at, past)

    def _attend(
        self,
        split: Split,
        v: Tensor,
        estimate: Estimate,
        at: Tensor,
        real: Tensor,
        shift: Tensor,
        mean: Tensor,
        ctx: Context,
    ) -> AttentionOutput:
        """Exact attention where the estimate says, gated, and the average context beside it."""
        seen = (at + 1).clamp_min(0) * real
        how = Stretch(seen, shift, split.k_score.shape[2], self._jitter(split.k_score, ctx))
        keep = self._keep(estimate, seen, real)
        how = replace(how, thin=1 if self.training else self.recipe.oversample)
        with torch.no_grad():
            layout = layout_of(keep, how)
        out = self._mixed(split, v, estimate, layout, mean, ctx)
        if self.trace is not None:
            self.trace.append(
                Trace(split.q_score, split.k_score, estimate.scores, out.out, seen, shift, real,
                      self.recipe.causal, _scale(split.q, ctx), layout, how.jitter)
            )  # fmt: skip
        return out

    def _jitter(self, k: Tensor, ctx: Context) -> Tensor | None:
        """Now and then, in training, keys read bins a little beside theirs."""
        if not (self.training and self.recipe.causal and ctx.phase == "train"):
            return None
        if float(torch.rand((), generator=ctx.generator)) >= JITTERED:
            return None
        drawn = torch.rand(k.shape[2], generator=ctx.generator, dtype=torch.float64)
        return ((drawn * 2 - 1) * JITTER).to(k.device)

    @torch.no_grad()
    def _keep(self, estimate: Estimate, seen: Tensor, real: Tensor) -> Tensor:
        """Which bins are kept, (B, H, L, K)."""
        recipe, heads, length = self.recipe, estimate.scores.shape[1], seen.shape[1]
        work = torch.promote_types(estimate.scores.dtype, torch.float32)
        probs = torch.softmax(estimate.scores.to(work), -1)
        rows = seen if recipe.chosen_group in ("query", "causal_batch") else seen[:, 0]
        k = recipe.k * (1 if self.training else recipe.oversample)
        budget = budgets(
            k, rows.clamp_min(1), recipe.width, heads, recipe.chosen_group, length
        )  # fmt: skip
        return keep_best(probs, budget, recipe.chosen_group, real)

    def _mixed(
        self,
        split: Split,
        v: Tensor,
        estimate: Estimate,
        layout: Layout,
        mean: Tensor,
        ctx: Context,
    ) -> AttentionOutput:
        if ctx.stats is not None:
            ctx.stats(layer=ctx.layer, layout=layout, build_seconds=0.0, attend_seconds=0.0)
        sparse = attention(
            split.q_score, split.k_score, v, layout=layout, scale=ctx.scale, dropout=ctx.dropout,
            backend=ctx.backend,
        ).out  # fmt: skip
        work = torch.promote_types(v.dtype, torch.float32)
        one, two = torch.sigmoid(estimate.gates.to(work))[..., None].unbind(3)
        group = sparse.shape[1] // mean.shape[1]
        mean = mean.repeat_interleave(group, 1)
        out = (two * one * sparse.to(work) + (1 - two) * mean.to(work)).to(sparse.dtype)
        return AttentionOutput(out, out.new_full(out.shape[:3], torch.nan, dtype=work))

    # -- without causality -----------------------------------------------------------------------
    def _bidirectional(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, ctx: Context
    ) -> AttentionOutput:
        """Sequences of different lengths run apart: the CNN resizes a sequence as a whole."""
        if bool(real.all()):
            return self._whole(self._split(q, k, v, ctx), v, ctx)
        split = self._split(q, k, v, ctx)
        start, count = real.int().argmax(1).tolist(), real.sum(1).tolist()
        outs = []
        for b, (first, n) in enumerate(zip(start, count)):
            part = (slice(b, b + 1), slice(None), slice(first, first + n))
            made = self._whole(Split(*(x[part] for x in split)), v[part], ctx)
            spare = (0, 0, first, q.shape[2] - first - n)
            outs.append(nn.functional.pad(made.out, spare))
        out = torch.cat(outs)
        lse = out.new_full(out.shape[:3], torch.nan, dtype=made.lse.dtype)
        return AttentionOutput(out, lse)

    def _whole(self, split: Split, v: Tensor, ctx: Context) -> AttentionOutput:
        group = split.q.shape[1] // split.k.shape[1]
        k, values = (x.repeat_interleave(group, 1) for x in (split.k, split.v))
        estimate = self.estimator.at_once(split.q, k, values)
        batch, _, length, _ = split.q.shape
        at = torch.full((batch, length), length - 1, device=v.device)
        mean = self._weighted_mean(estimate.scores, v)
        real = torch.ones_like(at, dtype=torch.bool)
        shift = torch.zeros_like(at[:, 0])
        return self._attend(split, v, estimate, at, real, shift, mean, ctx)

    def _weighted_mean(self, scores: Tensor, v: Tensor) -> Tensor:
        """Cbar (B, H, 1, Dv): values by the mean estimate, each key with its bin's weight."""
        work = torch.promote_types(v.dtype, torch.float32)
        probs = torch.softmax(scores.to(work), -1).mean(2)
        n = v.shape[2]
        keys = torch.arange(n, device=v.device)
        index = bins_of(keys, torch.full_like(keys, n), probs.shape[-1])
        weights = probs[..., index]
        if self.recipe.normalise_average:
            weights = weights / weights.sum(-1, keepdim=True)
        values = v.to(work).repeat_interleave(scores.shape[1] // v.shape[1], 1)
        return weights[:, :, None] @ values

    # -- new tokens after a state ----------------------------------------------------------------
    @override
    def new_state(self) -> State:
        h, e = self.heads, self.estimator
        width = sum(e.dims)
        rows = (e.encoder.channels * h.query, e.encoder.width)
        return SeaState(
            (
                Field("k", "token", (h.kv, h.key_dim), None),
                Field("v", "token", (h.kv, h.value_dim), None),
                Field("values", "sequence", (h.query, e.features, width), None),
                Field("ones", "sequence", (h.query, e.features), None),
                Field("v_sum", "sequence", (h.kv, 1, h.value_dim), None),
                Field("rows", "ring", rows, REACH),
                Field("start", "sequence", (), None),
            )
        )

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        assert isinstance(state, SeaState)
        if not self.recipe.causal:
            raise InputError("This sea was built with causal=False, which has no cache.")
        _plain(ctx)
        if not len(state):
            check_prompt("sea", tokens_of(q, k, ctx))
            start = self._checked(q, k, ctx).int().argmax(1)
            past = self.estimator.new_past(v, len(q), torch.float64)
            total = v.new_zeros(len(v), v.shape[1], 1, v.shape[3], dtype=torch.float64)
        else:
            check_step("sea", q, k, ctx, len(state))
            held = state.held
            start, total = held["start"], held["v_sum"]
            past = Past(Sums(held["values"], held["ones"]), held["rows"])
        new = q.shape[2]
        self._fits(len(state) + new)
        at = torch.arange(len(state), len(state) + new, device=q.device) - start[:, None]
        split = self._split(q, k, v, ctx)
        estimate, past = self._estimate(split, at, past)
        keys, values = state.append(split.k_score, v)
        mean, total = _mean_and_sum(v, at, total)
        state.held = {
            "values": past.sums.values, "ones": past.sums.ones, "rows": past.rows, "v_sum": total,
            "start": start,
        }  # fmt: skip
        state.length += new
        split = split._replace(k_score=keys)
        return self._attend(split, values, estimate, at, at >= 0, start, mean, ctx)


def _running_mean(v: Tensor, at: Tensor) -> Tensor:
    """(B, Hkv, L, Dv): mean of v over the real tokens up to each."""
    work = torch.promote_types(v.dtype, torch.float32)
    total = (v.to(work) * (at >= 0)[:, None, :, None]).cumsum(2)
    return total / (at + 1).clamp_min(1)[:, None, :, None]


def _mean_and_sum(v: Tensor, at: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The same going on from a sum (B, Hkv, 1, Dv), and the sum after the last token."""
    total = before + (v.to(before.dtype) * (at >= 0)[:, None, :, None]).cumsum(2)
    return total / (at + 1).clamp_min(1)[:, None, :, None], total[:, :, -1:]


def _scale(q: Tensor, ctx: Context) -> float:
    return float(q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale)


def _plain(ctx: Context) -> None:
    """Refuse what the estimate doesn't know of.

    Raises:
        InputError: a bias, a softcap or sink logits.
    """
    for name in ("bias", "softcap", "sink_logits"):
        if getattr(ctx, name) is not None:
            raise InputError(f"sea has no form with {name}; leave it out.")
