"""Combiner: full attention at the cost of a sparse pattern, through summaries of spans.

For query i the tokens that it may see are split into direct ones and spans S_1 ... S_n:

    p(j | S)  = softmax_{j in S}(q_S . k_j / sqrt d),      u_S = sum_j p(j | S) v_j
    Z_i       = sum_{j direct} exp(q_i . k_j / sqrt d) + sum_r exp(q_i . k_{S_r} / sqrt d)
    out_i     = sum_{j direct} exp(q_i . k_j / sqrt d) / Z_i v_j
              + sum_r exp(q_i . k_{S_r} / sqrt d) / Z_i u_{S_r}

Ren et al. 2021, arXiv 2107.05768. q_S and k_S are pooled from the span's queries and keys, so u_S
doesn't depend on i and is made once. Z is one for all: a span counts as one item, whatever its
length. Every token has a weight above 0, in each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.combiner.axial import Horizontal, Vertical
from foveate.methods.combiner.call import Call, turned
from foveate.methods.combiner.fixed import Fixed
from foveate.methods.combiner.learnable import Learnable
from foveate.methods.combiner.logsparse import Logsparse
from foveate.methods.combiner.partition import Partition, Parts
from foveate.methods.combiner.pooling import Pooling, split_pooling
from foveate.methods.combiner.rowmajor import KEYS, Rowmajor
from foveate.methods.combiner.state import CombinerState, Lane
from foveate.ops import AttentionOutput, merge
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import AttentionRecipe, Heads
from foveate.parts.context import Context
from foveate.parts.form import check_prompt, check_step, is_causal_or_full
from foveate.parts.state import State, Stateful
from foveate.parts.tokens import Tokens, tokens_of

PARTITIONS = ("fixed", "logsparse", "vertical", "horizontal", "rowmajor", "learnable", "mixture")
Mixture = Literal["average", "joint"]


@dataclass(frozen=True)
class Combiner(AttentionRecipe):
    """Direct tokens and summaries of spans, in one softmax; see the module's text.

    Queries and keys are pooled as they come, after a rotation of positions if the layer has one.

    Attributes:
        partition: "fixed", "logsparse", "vertical", "horizontal" or "rowmajor" (axial ones),
            "learnable" (clusters), or a list of several; "mixture" is vertical and horizontal.
        size: s, tokens of a block, or m, tokens of a row (128); near the square root of the length.
        pooling: of a span's queries and keys: identity, relu or deepsets, a dash, max, mean or sum.
        mixture: of several partitions: "average" of their outputs (the paper), or "joint", direct
            tokens once and the spans of all in one softmax (the released code), for axial ones.
        key: of rowmajor spans: "proj", "wsum", "wsum_proj" or "none".
        key_dropout: of proj, in training.
        clusters: of the learnable partition.
        momentum: of its centroids, which move in training.
        span_count_bias: adds log |S| to a span's logit, so that it weighs as all its tokens (ours).

    Raises:
        InputError: a field that doesn't fit.
    """

    partition: str | Sequence[str] = "fixed"
    size: int = 128
    pooling: str = "identity-max"
    mixture: Mixture = "average"
    key: str = "proj"
    key_dropout: float = 0.0
    clusters: int = 16
    momentum: float = 0.999
    span_count_bias: bool = False

    def __post_init__(self) -> None:
        whole("Combiner", "size", self.size, least=1)
        whole("Combiner", "clusters", self.clusters, least=1)
        split_pooling(self.pooling)
        for name in self.names:
            if name not in PARTITIONS[:-1]:
                raise InputError(
                    f"Combiner(partition={self.partition!r}): expected {', '.join(PARTITIONS)}, "
                    "or a list of them."
                )
        if self.mixture not in get_args(Mixture):
            raise InputError(f"Combiner(mixture={self.mixture!r}): expected average or joint.")
        if self.key not in KEYS:
            raise InputError(f"Combiner(key={self.key!r}): expected {', '.join(KEYS)}.")
        if not 0 <= self.key_dropout < 1 or not 0 <= self.momentum <= 1:
            raise InputError(
                f"Combiner(key_dropout={self.key_dropout!r}, momentum={self.momentum!r}): expected "
                "0 up to, not with, 1 for the first, and 0 to 1 for the second."
            )
        shared = {"vertical", "horizontal"}
        if self.mixture == "joint" and not shared.issuperset(self.names):
            raise InputError(
                "Combiner(mixture='joint') is for vertical and horizontal, whose direct tokens are "
                f"the same, not for {', '.join(self.names)}; use mixture='average'."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The partitions."""
        if isinstance(self.partition, str):
            mixed = self.partition == "mixture"
            return ("vertical", "horizontal") if mixed else (self.partition,)
        return tuple(self.partition) or ("",)

    @override
    def build(self, heads: Heads) -> CombinerAttention:
        return CombinerAttention(self, heads)


class CombinerAttention(Stateful, nn.Module):
    """Combiner in a layer; made by `Combiner.build`.

    Args:
        recipe: hyper-parameters.
        heads: sizes of the layer.
    """

    def __init__(self, recipe: Combiner, heads: Heads) -> None:
        nn.Module.__init__(self)
        self.recipe, self.heads = recipe, heads
        self.queries = Pooling(recipe.pooling, heads.key_dim)
        self.keys = Pooling(recipe.pooling, heads.key_dim)
        self.partitions = nn.ModuleList(self._partition(name) for name in recipe.names)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend; see `foveate.parts.Attention`."""
        return Stateful.__call__(self, q, k, v, ctx)

    def _partition(self, name: str) -> Partition:
        recipe = self.recipe
        common = (self.heads, self.queries, self.keys)
        if name == "fixed":
            return Fixed(*common, recipe.size)
        if name == "logsparse":
            return Logsparse(*common)
        if name == "rowmajor":
            return Rowmajor(*common, recipe.size, recipe.key, recipe.key_dropout)
        if name == "learnable":
            return Learnable(*common, recipe.clusters, recipe.momentum)
        return (Vertical if name == "vertical" else Horizontal)(*common, recipe.size)

    @property
    def _all(self) -> list[Partition]:
        return [one for one in self.partitions if isinstance(one, Partition)]

    # -- all at once -----------------------------------------------------------------------------
    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        tokens = self._tokens(q, k, ctx)
        start, call = self._call(q, k, v, ctx, tokens)
        return self._back(self._mixed(call), start)

    def _tokens(self, q: Tensor, k: Tensor, ctx: Context) -> Tokens:
        """What is known of a call's tokens.

        Raises:
            InputError: a call that Combiner doesn't define.
        """
        _plain(ctx)
        if q.shape[2] != k.shape[2]:
            raise InputError(
                f"combiner summarises keys with their own queries, but there are {q.shape[2]} "
                f"queries and {k.shape[2]} keys; decode with foveate.Attention's new_cache()."
            )
        tokens = tokens_of(q, k, ctx)
        if not is_causal_or_full(ctx, tokens):
            raise InputError(
                "combiner partitions whole sequences: give causal(), no mask, or either with "
                f"padding(), not {ctx.mask!r}; other masks need another method."
            )
        return tokens

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, tokens: Tokens
    ) -> tuple[Tensor | None, Call]:
        """The call with real tokens in front, and where they began (B,); None if they did so."""
        real = tokens.q_real
        start = real.int().argmax(1)
        x = ctx.hidden
        found = None
        if bool(start.any()):
            found = start.expand(len(q))
            q, k, v = (turned(t, found) for t in (q, k, v))
            x = None if x is None else turned(x[:, None], found)[:, 0]
        seen, front = None, None
        if not bool(real.all()):
            at = torch.arange(q.shape[2], device=q.device)
            front = (at < real.sum(1, keepdim=True)).expand(len(q), -1)
        if not tokens.causal and front is not None:
            seen = front
            # Padding is as what fills up a last row: 0, so that rowmajor's queries there are, too.
            q, k, v = (t * seen[:, None, :, None] for t in (q, k, v))
            x = None if x is None else x * seen[..., None]
        bias = self.recipe.span_count_bias
        return found, Call(q, k, v, tokens.causal, seen, x, ctx, bias, front)

    def _back(self, out: AttentionOutput, start: Tensor | None) -> AttentionOutput:
        if start is None:
            return out
        values, lse = turned(out.out, -start), turned(out.lse[..., None], -start)[..., 0]
        return AttentionOutput(values, lse)

    def _mixed(self, call: Call) -> AttentionOutput:
        if self.recipe.mixture == "joint":
            parts = self._all[0].direct(call)
            for one in self._all:
                parts += one.spans(call)
            return merge(parts)
        return _average([merge(one.direct(call) + one.spans(call)) for one in self._all])

    # -- new tokens after a state ----------------------------------------------------------------
    @override
    def new_state(self) -> State:
        fields = [
            field._replace(name=name)
            for slot in self._slots()
            for name, field in {f"{slot.start}.{f.name}": f for p in self._all[slot]
                                for f in p.fields}.items()
        ]  # fmt: skip
        return CombinerState(fields)

    def _slots(self) -> list[slice]:
        """Partitions that share a lane."""
        if self.recipe.mixture == "joint":
            return [slice(0, len(self._all))]
        return [slice(i, i + 1) for i in range(len(self._all))]

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        assert isinstance(state, CombinerState)
        if len(state):
            _plain(ctx)
            check_step("combiner", q, k, ctx, len(state))
            out = self._steps(q, k, v, ctx, state)
        else:
            tokens = self._tokens(q, k, ctx)
            if not tokens.causal:
                raise InputError(
                    "combiner decodes under a causal mask: give mask=causal() with a cache."
                )
            check_prompt("combiner", tokens)
            start, call = self._call(q, k, v, ctx, tokens)
            out = self._back(self._mixed(call), start)
            self._fill(call, start, state)
        state.length += q.shape[2]
        return out

    def _fill(self, call: Call, start: Tensor | None, state: CombinerState) -> None:
        """Take a prompt into an empty state."""
        batch, length = len(call.q), call.length
        skips = [0] if start is None else start.tolist()
        state.rows = batch
        if len(set(skips)) == 1:
            skips = skips[:1]
        state.lanes = []
        for i, skip in enumerate(skips):
            part = slice(0, batch) if len(skips) == 1 else slice(i, i + 1)
            lanes = []
            for slot in self._slots():
                lane = Lane()
                if length > skip:
                    some = _rows(call, part, slice(0, length - skip))
                    for one in self._all[slot]:
                        one.fill(some, lane)
                lane.length = length - skip
                lanes.append(lane)
            state.lanes.append(lanes)

    def _steps(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: CombinerState
    ) -> AttentionOutput:
        new = Call(q, k, v, True, None, ctx.hidden, ctx, self.recipe.span_count_bias)
        found = []
        for part, lanes in zip(state.lane_rows(), state.lanes):
            steps = [
                self._step(_rows(new, part, slice(t, t + 1)), lanes) for t in range(q.shape[2])
            ]
            found.append([torch.cat(x, 2) for x in zip(*steps)])
        out, lse = (torch.cat(x) for x in zip(*found))
        return AttentionOutput(out, lse)

    def _step(self, call: Call, lanes: list[Lane]) -> AttentionOutput:
        """One token for one lane."""
        outs: list[Parts] = []
        for slot, lane in zip(self._slots(), lanes):
            mine = self._all[slot]
            parts = mine[0].step_direct(call, lane)
            for one in mine:
                parts += one.step_spans(call, lane)
            for one in mine:
                one.close(call, lane)
            lane.length += 1
            outs.append(parts)
        return _average([merge(parts) for parts in outs])


def _average(outs: list[AttentionOutput]) -> AttentionOutput:
    """The mean of the mixture's outputs; it has no log-sum-exp of its own."""
    if len(outs) == 1:
        return outs[0]
    mean = torch.stack([out.out for out in outs]).mean(0)
    return AttentionOutput(mean, torch.full_like(outs[0].lse, torch.nan))


def _rows(call: Call, part: slice, tokens: slice) -> Call:
    """Some rows of the batch, and some of their tokens."""
    q, k, v = (x[part, :, tokens] for x in (call.q, call.k, call.v))
    x = None if call.x is None else call.x[part, tokens]
    return Call(q, k, v, call.causal, None, x, call.ctx, call.count_bias)


def _plain(ctx: Context) -> None:
    """Refuse what has no meaning where a key may stand for many tokens.

    Raises:
        InputError: a bias, a softcap or sink logits.
    """
    for name in ("bias", "softcap", "sink_logits"):
        if getattr(ctx, name) is not None:
            raise InputError(
                f"combiner has no form with {name}: its spans are keys of their own; leave it out."
            )
