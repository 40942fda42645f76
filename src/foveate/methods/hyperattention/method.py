"""HyperAttention: exact sorted blocks, and sampled keys for the rest, merged by their lse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.hyperattention import sort_lsh
from foveate.methods.hyperattention.heavy import Order, heavy_layout
from foveate.methods.hyperattention.recursion import Piece, pieces_of
from foveate.methods.hyperattention.samples import (
    Draw,
    Light,
    draw_by_values,
    draw_uniform,
    light_part,
)
from foveate.ops import AttentionOutput, Layout, attention, merge, with_sinks
from foveate.ops import causal as causal_mask
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention, clock, mask_layout
from foveate.parts.context import Context, Work
from foveate.parts.form import is_causal_or_full
from foveate.parts.tokens import Tokens, tokens_of

SAMPLING = ("uniform", "value-norm")
_BUDGET = 1 << 27  # numbers that the core op holds of a call's parts before it merges them


class _Plan(NamedTuple):
    """What a call does: pieces, and of the estimated ones their order and samples."""

    pieces: list[Piece]
    orders: list[Order | None]
    draws: list[Draw]


class _Told:
    """What a call has visited and how long planning took, for `ctx.stats`."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.build_seconds = 0.0
        self.visited: list[tuple[Layout, float]] = []

    def visit(self, layout: Layout, share: float) -> None:
        """A layout of that share of the call's batch entries and heads."""
        if self.ctx.stats is not None:
            self.visited.append((layout, share))

    def tell(self, seconds: float) -> None:
        """Of a call that took so many seconds."""
        if self.ctx.stats is None:
            return
        work = Work(
            sum(share * one.pairs for one, share in self.visited),
            sum(share * one.tile_area for one, share in self.visited),
        )
        self.ctx.stats(
            layer=self.ctx.layer,
            layout=work,
            build_seconds=self.build_seconds,
            attend_seconds=seconds - self.build_seconds,
        )


@dataclass(frozen=True)
class HyperAttention(Attention):
    """An estimate of softmax attention in near-linear time; arXiv 2310.05869, algorithms 1 to 4.

    Queries and keys are hashed, sorted by hash and attend exactly within equal diagonal blocks;
    of all other keys `sample_size` are drawn, the same for all queries, each standing for as many
    as it was drawn from. Causal attention is halved until its triangles are short. Sequences of
    fewer than `min_seq_len` queries, and decoding, are exact.

    The mask must be causal or none (padding aside). Queries are sorted per query head, keys,
    samples and so the estimate's noise per key/value head. The draws depend on `seed` and the
    layer alone, or come from `ctx.generator`. Hashes and samples are constants to the backward.
    A query's block depends on the hashes of the queries sorted with it, later ones included.

    Attributes:
        block_size: b, keys of a diagonal block; as many as there are is exact attention.
        sample_size: m, keys drawn for each piece; 0 leaves everything outside the blocks out.
        min_seq_len: shorter attention is exact.
        lsh_num_projs: r, hash bits.
        sampling: "uniform" (the released code), or "value-norm", by ||V_j||^2 (the paper's
            analysis).
        sinks: first keys of the sequence that everyone sees exactly (0 in the paper). Real language
            models put much of their attention there, and uniform samples miss it.
        seed: of projections and samples.

    Raises:
        InputError: a field that doesn't fit, or a mask that is neither causal nor full.
    """

    block_size: int = 256
    sample_size: int = 256
    min_seq_len: int = 4096
    lsh_num_projs: int = 7
    sampling: str = "uniform"
    sinks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "min_seq_len", "lsh_num_projs"):
            whole("HyperAttention", name, getattr(self, name), least=1)
        for name in ("sample_size", "sinks", "seed"):
            whole("HyperAttention", name, getattr(self, name), least=0)
        if self.lsh_num_projs > 16:
            raise InputError(
                f"HyperAttention(lsh_num_projs={self.lsh_num_projs}): expected at most 16, for "
                "2 ** 16 buckets; the paper has 7."
            )
        if self.sampling not in SAMPLING:
            raise InputError(
                f"HyperAttention(sampling={self.sampling!r}): expected {' or '.join(SAMPLING)}."
            )

    @property
    def reserved(self) -> str:
        """What is exact whatever the hashes say, in words."""
        return f"first {self.sinks} tokens" if self.sinks else "nothing but its triangles"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Estimate attention; shapes as in `Attention`. Hashing and sorting count as building."""
        ctx = Context() if ctx is None else ctx
        check_tensors(q, k, v)
        told = _Told(ctx)
        start = clock(q, ctx)
        result = self._attend(q, k, v, ctx, told)
        told.tell(clock(q, ctx) - start)
        return result

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, told: _Told
    ) -> AttentionOutput:
        decode = ctx.phase == "decode" or q.shape[2] == 1 < k.shape[2]
        if decode or q.shape[2] < self.min_seq_len or not q.shape[0]:
            return _exact(q, k, v, ctx, told)
        tokens = tokens_of(q, k, ctx)
        if not is_causal_or_full(ctx, tokens):
            raise InputError(
                "hyperattention is defined for causal attention and for attention to everything, "
                "but the mask is neither (a sliding window or packed documents, for example); call "
                "it per document, or use a method that keeps to any mask, such as block-sparse."
            )
        if bool(tokens.q_real.all()) and bool(tokens.k_real.all()) and q.shape[2] <= k.shape[2]:
            return self._heads(q, k, v, ctx, tokens.causal, told, 1.0)
        return self._by_sequence(q, k, v, ctx, tokens, told)

    def heavy(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> AttentionOutput:
        """The heavy part alone: attention over M_H."""
        return replace(self, sample_size=0)(q, k, v, ctx)

    def pieces(self, queries: int, keys: int, *, causal: bool) -> list[Piece]:
        """What a call of these lengths is made of."""
        return pieces_of(
            queries,
            keys,
            causal=causal,
            min_seq_len=self.min_seq_len,
            block_size=self.block_size,
            sinks=self.sinks,
        )

    def layouts(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> tuple[Layout, Layout | None]:
        """What a call without padding visits: (heavy part, queries on sampled keys), to count it.

        The second one is None if nothing is estimated.
        """
        ctx = Context() if ctx is None else ctx
        pieces = self.pieces(q.shape[2], k.shape[2], causal=ctx.mask == causal_mask())
        plan = self._plan(q, k, v, pieces, ctx)
        heavy, light = self._parts(q, k, plan, slice(None), slice(None))
        return heavy, None if light is None else light.layout

    # -- what may be done otherwise in a study of the method -------------------------------------
    def order(self, q: Tensor, k: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
        """What queries (B, Hq, Lq, D) and keys (B, Hkv, Lkv, D) are sorted by: (B, H, L) int64."""
        return sort_lsh.hash_ranks(q, projection), sort_lsh.hash_ranks(k, projection)

    def draw(self, norms: Tensor, generator: torch.Generator) -> Draw:
        """Samples for a piece whose sorted values have squared norms (B, Hkv, n_k)."""
        if self.sampling == "value-norm":
            return draw_by_values(norms, self.sample_size, generator)
        return draw_uniform(norms.shape, self.sample_size, generator)

    # -- the work ---------------------------------------------------------------------------------
    def _by_sequence(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, tokens: Tokens, told: _Told
    ) -> AttentionOutput:
        """Each sequence on its real tokens alone; queries that see nothing have out 0."""
        outs, lses = [], []
        for b in range(q.shape[0]):
            t = b if len(tokens.q_real) > 1 else 0
            rows, cols = (x[t].nonzero()[:, 0] for x in (tokens.q_real, tokens.k_real))
            if tokens.causal:
                rows = rows[max(0, len(rows) - len(cols)) :]
            own = replace(ctx, bias=_bias_of(ctx.bias, b, rows, cols, q.shape[2]))
            picked = (q[b : b + 1, :, rows], k[b : b + 1, :, cols], v[b : b + 1, :, cols])
            part = self._heads(*picked, own, tokens.causal, told, 1 / q.shape[0])
            out = v.new_zeros(1, q.shape[1], q.shape[2], v.shape[3])
            outs.append(out.index_copy(2, rows, part.out))
            lse = part.lse.new_full((1, *q.shape[1:3]), -torch.inf)
            lses.append(lse.index_copy(2, rows, part.lse))
        return AttentionOutput(torch.cat(outs), torch.cat(lses))

    def _heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        causal: bool,
        told: _Told,
        share: float,
    ) -> AttentionOutput:
        """All tokens are real; a few key/value heads at a time where there are many rows."""
        pieces = self.pieces(q.shape[2], k.shape[2], causal=causal)
        if not any(piece.estimated for piece in pieces):
            return _whole(q, k, v, ctx, causal, told, share)
        start = clock(q, ctx)
        plan = self._plan(q, k, v, pieces, ctx)
        told.build_seconds += clock(q, ctx) - start
        group = q.shape[1] // k.shape[1]
        held = sum(p.queries for p in pieces) * (v.shape[3] + 2) * group * q.shape[0]
        step = max(1, min(k.shape[1], _BUDGET // held))
        found = []
        for first in range(0, k.shape[1], step):
            kv = slice(first, first + step)
            heads = slice(first * group, (first + step) * group)
            some = (q[:, heads], k[:, kv], v[:, kv])
            part = share * some[0].shape[1] / q.shape[1]
            found.append(self._run(*some, ctx, plan, heads, kv, told, part))
        if len(found) == 1:
            return found[0]
        return AttentionOutput(*(torch.cat(parts, 1) for parts in zip(*found)))

    def _plan(self, q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], ctx: Context) -> _Plan:
        generator = ctx.generator
        if generator is None:
            generator = torch.Generator().manual_seed((self.seed << 16) + ctx.layer)
        drawn = sort_lsh.projections(q.shape[3], self.lsh_num_projs, generator)
        by_q, by_k = self.order(q, k, drawn.to(q.device))
        norms = v.detach().double().square().sum(-1)
        orders: list[Order | None] = []
        draws: list[Draw] = []
        for piece in pieces:
            if not piece.estimated:
                orders.append(None)
                continue
            order = Order(
                sort_lsh.order_of(by_q[..., piece.q0 : piece.q1]),
                sort_lsh.order_of(by_k[..., piece.k0 : piece.k1]),
            )
            orders.append(order)
            if self.sample_size:
                draws.append(self.draw(norms.gather(2, order.key + piece.k0), generator))
        return _Plan(pieces, orders, draws)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        plan: _Plan,
        heads: slice,
        kv: slice,
        told: _Told,
        share: float,
    ) -> AttentionOutput:
        """Some heads: the heavy part, the light part, and their merge."""
        options = ctx.options | {"sink_logits": None}
        bias = None
        if ctx.bias is not None:
            bias = _four(ctx.bias)
            options["bias"] = bias = _heads_of(bias, heads)
        start = clock(q, ctx)
        layout, light = self._parts(q, k, plan, heads, kv)
        told.build_seconds += clock(q, ctx) - start
        told.visit(layout, share)
        result = attention(q, k, v, layout=layout, **options)
        if light is not None:
            told.visit(light.layout, share)
            weights = light.log_weights.to(torch.promote_types(q.dtype, torch.float32))
            weights = weights.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
            if bias is not None:
                weights = weights + _columns(bias, light.keys, q)
            options["bias"] = weights
            at = light.keys[..., None]
            k_at, v_at = (x.gather(2, at.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
            result = merge([result, attention(q, k_at, v_at, layout=light.layout, **options)])
        if ctx.sink_logits is not None:
            result = with_sinks(result, ctx.sink_logits[heads])
        return result

    def _parts(
        self, q: Tensor, k: Tensor, plan: _Plan, heads: slice, kv: slice
    ) -> tuple[Layout, Light | None]:
        """The heavy part's layout and the light part, of some heads."""
        orders = [o and Order(o.query[:, heads], o.key[:, kv]) for o in plan.orders]
        lengths, groups = (q.shape[2], k.shape[2]), (q.shape[0], q.shape[1])
        layout = heavy_layout(plan.pieces, orders, lengths, self.block_size, groups, q.device)
        if not plan.draws:
            return layout, None
        draws = [Draw(d.places[:, kv], _heads_of(d.log_weights, kv)) for d in plan.draws]
        some = [(p, o) for p, o in zip(plan.pieces, orders) if o is not None]
        pieces, sorted_ = [p for p, _ in some], [o for _, o in some]
        return layout, light_part(pieces, sorted_, draws, q.shape[2], self.block_size, q.shape[1])


def _exact(q: Tensor, k: Tensor, v: Tensor, ctx: Context, told: _Told) -> AttentionOutput:
    if told.ctx.stats is not None:
        told.visit(mask_layout(ctx.mask, q, k, ctx), 1.0)
    if ctx.q_positions is None and ctx.kv_positions is None:
        return attention(q, k, v, ctx.mask, **ctx.options)
    return attention(q, k, v, layout=mask_layout(ctx.mask, q, k, ctx), **ctx.options)


def _whole(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, causal: bool, told: _Told, share: float
) -> AttentionOutput:
    """Real tokens only: exact, too."""
    mask = causal_mask() if causal else None
    if told.ctx.stats is not None:
        alone = replace(ctx, q_positions=None, kv_positions=None)
        told.visit(mask_layout(mask, q, k, alone), share)
    return attention(q, k, v, mask, **ctx.options)


def _heads_of(x: Tensor, heads: slice) -> Tensor:
    return x[:, heads] if x.shape[1] > 1 else x


def _four(bias: Tensor) -> Tensor:
    return bias[(None,) * (4 - bias.dim())]


def _bias_of(
    bias: Tensor | None, b: int, rows: Tensor, cols: Tensor, queries: int
) -> Tensor | None:
    """The bias of one sequence's chosen queries and keys."""
    if bias is None:
        return None
    bias = _four(bias)
    bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
    bias = bias[:, :, rows] if bias.shape[2] > 1 else bias
    return bias[..., cols] if bias.shape[3] > 1 else bias


def _columns(bias: Tensor, keys: Tensor, q: Tensor) -> Tensor:
    """Bias at the sampled keys (B, Hkv, S): broadcastable to (B, Hq, Lq, S)."""
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)[:, :, None]
    if bias.shape[3] == 1:
        return bias
    full = bias.expand(q.shape[0], q.shape[1], -1, -1)
    return full.gather(3, keys.expand(-1, -1, full.shape[2], -1))
