"""Dynamic hierarchical sparse attention: chunks of unequal length, scored, copied back to tokens.

Xiong et al. 2025, arXiv 2510.24606. A small predictor cuts the keys into chunks (`boundaries`,
`predictor`), blocks of queries score the chunks and keep the tokens of the best (`chunks`), and
ordinary softmax attention runs over what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.dhsa.boundaries import check, equal, pick, with_instruction
from foveate.methods.dhsa.chunks import POOLINGS, Pooling, pooled, select
from foveate.methods.dhsa.predictor import BoundaryPredictor, features
from foveate.methods.dhsa.state import Decoding, grown, vectors
from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import TILE, Pattern
from foveate.parts.context import Context
from foveate.parts.fitting import Artefact, missing
from foveate.parts.tokens import Tokens, tokens_of
from foveate.parts.trail import Trail


@dataclass(frozen=True)
class DHSA(Pattern):
    """Each block of queries keeps `budget` tokens: of the chunks with the highest Qr . Kr.

    The last `instruction` queries of a prompt see everything. A new token in decoding is a block
    of its own; a chunk that it opens is closed by the predictor, or at `longest` tokens. The choice
    is shared by all heads of a layer, the boundaries by all layers. Within `ctx.mask`, which must
    be causal. Block means hold later queries and the predictor looks w tokens ahead, so the choice
    isn't causal, though the outputs are once it is held fixed.

    Attributes:
        budget: N_b, tokens that a block of queries keeps, `local` and `sinks` included (paper:
            1024 or 2048).
        block: queries that choose together (128; 256 in the paper's timings). None is the form
            that the paper states: queries are chunked as keys are, and each chooses its own tokens
            by its chunk's scores.
        local: last tokens that are always kept, counted back from the block's end (128).
        sinks: first tokens that are always kept, the paper's "global" ones (128).
        instruction: last queries of a prompt that see everything, and one chunk (64).
        pooling: "norm" is sum / sqrt(n); "mean", "sum" and "max" are its ablations.
        chunk: None asks the predictor; a number cuts equal chunks, which needs no predictor.
        theta: least logit of a boundary (1.1).
        nms: boundaries are more than this apart (8).
        beta: at most beta * floor(L / block) boundaries (8).
        shared: boundaries are made once, in the first layer that runs, from its keys.
        longest: tokens at which decoding closes a chunk.

    Raises:
        InputError: a field that doesn't fit, a mask that isn't causal, or no predictor.
    """

    budget: int = 1024
    block: int | None = 128
    local: int = 128
    sinks: int = 128
    instruction: int = 64
    pooling: Pooling = "norm"
    chunk: int | None = None
    theta: float = 1.1
    nms: int = 8
    beta: int = 8
    shared: bool = True
    longest: int = 128
    predictor: BoundaryPredictor | None = field(default=None, init=False, compare=False, repr=False)
    _kept: dict[int, Decoding] = field(default_factory=dict, init=False, compare=False, repr=False)

    fitter: ClassVar[str] = "foveate.methods.dhsa.fit.fit"

    def __post_init__(self) -> None:
        for name, least in (
            ("budget", 1), ("local", 1), ("sinks", 0), ("instruction", 0), ("nms", 0), ("beta", 1),
            ("longest", 1),
        ):  # fmt: skip
            whole("DHSA", name, getattr(self, name), least=least)
        for name in ("block", "chunk"):
            if getattr(self, name) is not None:
                whole("DHSA", name, getattr(self, name), least=1)
        if self.pooling not in POOLINGS:
            raise InputError(
                f"DHSA(pooling={self.pooling!r}): expected one of {', '.join(POOLINGS)}."
            )
        if self.block is not None and self.local < self.block:
            raise InputError(
                f"DHSA(local={self.local}, block={self.block}): local tokens are counted back from "
                "the end of a block, so its first queries would not see themselves; give local of "
                "at least block."
            )
        if self.local + self.sinks > self.budget:
            raise InputError(
                f"DHSA(budget={self.budget}): local={self.local} and sinks={self.sinks} are part "
                "of the budget; give at least their sum."
            )

    # -- its predictor ---------------------------------------------------------------------------
    @property
    def needs_fit(self) -> bool:
        """Whether a predictor is still to be given."""
        return self.chunk is None and self.predictor is None

    def with_artefact(self, artefact: Artefact) -> DHSA:
        """The same with the predictor that a fit made."""
        if "predictor" not in artefact.built:
            predictor = BoundaryPredictor(**artefact.facts["predictor"])
            predictor.load_state_dict(artefact.tensors)
            artefact.built["predictor"] = predictor
        return self.with_predictor(artefact.built["predictor"])

    def with_predictor(self, predictor: BoundaryPredictor) -> DHSA:
        """The same with a predictor."""
        made = replace(self)
        object.__setattr__(made, "predictor", predictor.eval().requires_grad_(False))
        return made

    # -- boundaries ------------------------------------------------------------------------------
    @torch.no_grad()
    def boundaries(self, k: Tensor, instruction: int = 0) -> Tensor:
        """The boundaries of one sequence's keys (Hkv, L, D): (Nc + 1,) int64."""
        length = k.shape[1]
        if self.chunk is not None:
            return with_instruction(equal(length, self.chunk), instruction)
        if self.predictor is None:
            raise InputError(missing("dhsa", "boundary predictor", "dhsa(chunk=32)"))
        most = self.beta * max(1, length // (self.block or 128))
        predictor = self._predictor(k)
        logits = predictor(features(k[None]))[0]
        return pick(
            logits, look=predictor.look, theta=self.theta, nms=self.nms, most=most,
            instruction=instruction,
        )  # fmt: skip

    def _predictor(self, k: Tensor) -> BoundaryPredictor:
        assert self.predictor is not None
        if next(self.predictor.parameters()).device != k.device:
            self.predictor.to(k.device)
        return self.predictor

    # -- the choice ------------------------------------------------------------------------------
    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return self.budget >= k.shape[2]

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        tokens = _tokens(q, k, ctx)
        new = ctx.phase == "decode" or q.shape[2] == 1 < k.shape[2]
        real = [_of(tokens.k_real, b).nonzero()[:, 0] for b in range(q.shape[0])]
        state = self._kept.get(ctx.layer) if new else None
        rows = None if state is None else state.trail.rows(k)
        if state is not None and rows is not None:
            picked = rows.tolist()
            if [state.first[r] for r in picked] != [int(r[0]) for r in real]:
                rows = None
        bounds = self._shared_bounds(k, real, ctx, 0 if new else self.instruction, state, rows)
        known = [None] * len(real) if rows is None or state is None else [
            _agreeing(state.closed[r], state.bounds[r], bounds[b])
            for b, r in enumerate(rows.tolist())
        ]  # fmt: skip
        summaries = [
            vectors(k[b][:, at], bounds[b], known[b], self.pooling) for b, at in enumerate(real)
        ]
        if ctx.phase != "train":
            first = [int(at[0]) for at in real]
            self._kept[ctx.layer] = Decoding(Trail(k), first, bounds, [s[:-1] for s in summaries])
        return self._layout(bounds, summaries, q, k, ctx, tokens, new)

    def layout_from(self, bounds: list[Tensor], q: Tensor, k: Tensor, ctx: Context) -> Layout:
        """The layout of a prompt whose boundaries are given, for each sequence its own."""
        if len(bounds) != q.shape[0]:
            raise InputError(
                f"dhsa: expected boundaries for each of {q.shape[0]} sequences, got {len(bounds)}."
            )
        tokens = _tokens(q, k, ctx)
        keys = [k[b][:, _of(tokens.k_real, b)] for b in range(q.shape[0])]
        for one, given in zip(keys, bounds, strict=True):
            check(given, one.shape[1])
        summaries = [vectors(one, b, None, self.pooling) for one, b in zip(keys, bounds)]
        return self._layout(bounds, summaries, q, k, ctx, tokens, False)

    def _shared_bounds(
        self,
        k: Tensor,
        real: list[Tensor],
        ctx: Context,
        instruction: int,
        state: Decoding | None,
        rows: Tensor | None,
    ) -> list[Tensor]:
        """Boundaries of each sequence, made by the first layer of a forward for all."""
        key: Any = (DHSA, self, instruction, k.shape[2])
        if self.shared and key in ctx.store:
            found: list[Tensor] = ctx.store[key]
            return found
        made = []
        for b, at in enumerate(real):
            keys = k[b][:, at]
            if state is None or rows is None:
                made.append(self.boundaries(keys, instruction))
                continue
            predictor = None if self.chunk is not None else self._predictor(k)
            with torch.no_grad():
                made.append(
                    grown(
                        state.bounds[int(rows[b])],
                        keys,
                        predictor,
                        theta=self.theta,
                        nms=self.nms,
                        longest=self.chunk or self.longest,
                    )  # fmt: skip
                )
        if self.shared:
            ctx.store[key] = made
        return made

    def _layout(
        self,
        bounds: list[Tensor],
        summaries: list[Tensor],
        q: Tensor,
        k: Tensor,
        ctx: Context,
        tokens: Tokens,
        new: bool,
    ) -> Layout:
        tile = 8 if new or self.block is None else min(TILE, -(-self.block // 8) * 8)
        found = [
            self._one(bounds[b], summaries[b], q, b, ctx, tokens, tile, new)
            for b in range(q.shape[0])
        ]
        tiles_of_rows = max(len(index) for index, _ in found)
        index = q.new_full((len(found), tiles_of_rows, tile), -1, dtype=torch.int64)
        kept = q.new_zeros((len(found), 1, tiles_of_rows, k.shape[2]), dtype=torch.bool)
        for b, (rows, keys) in enumerate(found):
            index[b, : len(rows)] = rows
            kept[b, 0, : len(rows), _of(tokens.k_real, b)] = keys
        index = index.flatten(1)
        width = -(-k.shape[2] // TILE) * TILE
        whole_tiles = torch.nn.functional.pad(kept, (0, width - k.shape[2]), value=True)
        return Layout.from_selection(
            whole_tiles.unflatten(-1, (-1, TILE)).all(-1),
            kept,
            q.shape[2],
            k.shape[2],
            (tile, TILE),
            ctx.mask,
            q_positions=tokens.q_pos,
            kv_positions=tokens.k_pos,
            q_index=index[:, None],
        )

    def _one(
        self,
        bounds: Tensor,
        summary: Tensor,
        q: Tensor,
        b: int,
        ctx: Context,
        tokens: Tokens,
        tile: int,
        new: bool,
    ) -> tuple[Tensor, Tensor]:
        """One sequence: query rows by tile (T, tile), -1 is none, and what tiles keep, (T, L)."""
        assert ctx.mask is not None
        rows = _of(tokens.q_real, b).nonzero()[:, 0]
        key_pos = _of(tokens.k_pos, b)[_of(tokens.k_real, b)]
        own = _of(tokens.q_pos, b)[rows]
        end = torch.searchsorted(key_pos, own, right=True)
        start = _first_seen(ctx, own, key_pos, b)
        full = 0 if new else min(self.instruction, len(rows))
        free = len(rows) - full
        qbar = q[b][:, rows].float().mean(0)
        step = 1 if new or self.block is None else self.block
        edges = torch.arange(0, free, step, device=q.device)
        edges = torch.cat((edges, edges.new_tensor([free])))
        if new or self.block is not None:
            vector = pooled(qbar[:free], edges, self.pooling)
        else:
            chunk = torch.searchsorted(bounds.to(q.device), end[:free] - 1, right=True) - 1
            _, chunk = chunk.unique_consecutive(return_inverse=True)
            ends = torch.bincount(chunk).cumsum(0)
            grouped = pooled(qbar[:free], torch.nn.functional.pad(ends, (1, 0)), self.pooling)
            vector = grouped[chunk]
        begin, stop = edges[:-1], edges[1:]
        kept = select(
            vector @ summary.mT.to(vector.dtype),
            bounds,
            start[begin],
            end[stop - 1],
            budget=self.budget,
            local=self.local,
            sinks=self.sinks,
        )
        if full:
            begin = torch.cat((begin, begin.new_tensor([free])))
            stop = torch.cat((stop, stop.new_tensor([len(rows)])))
            places = torch.arange(len(key_pos), device=q.device)
            kept = torch.cat((kept, (places >= start[free])[None]))
        counts = -(-(stop - begin) // tile)
        block = torch.repeat_interleave(torch.arange(len(counts), device=q.device), counts)
        number = torch.arange(len(block), device=q.device) - (counts.cumsum(0) - counts)[block]
        at = (begin[block] + number * tile)[:, None] + torch.arange(tile, device=q.device)
        inside = at < stop[block][:, None]
        index = rows[at.clamp_max(len(rows) - 1)].masked_fill(~inside, -1)
        return index, kept[block]


def _of(x: Tensor, b: int) -> Tensor:
    """Batch entry b of something that may be alike for all."""
    return x[b if len(x) > 1 else 0]


def _tokens(q: Tensor, k: Tensor, ctx: Context) -> Tokens:
    tokens = tokens_of(q, k, ctx)
    if not tokens.causal:
        raise InputError(
            "dhsa is defined for causal attention, but the mask lets queries see later keys (no "
            "mask is everything); give Context(mask=causal()), or use block-sparse."
        )
    if not tokens.regular:
        raise InputError(
            "dhsa needs positions that count up by one, because chunks are runs of tokens; permute "
            "queries and keys after it, or use block-sparse."
        )
    # An entry of padding alone is cut as if it were real; the mask lets it see nothing.
    lone = ~tokens.k_real.any(1, keepdim=True)
    return replace(tokens, k_real=tokens.k_real | lone) if bool(lone.any()) else tokens


def _first_seen(ctx: Context, own: Tensor, keys: Tensor, b: int) -> Tensor:
    """(n,) index of the first key that each query may see; a window moves it."""
    assert ctx.mask is not None
    heads = range(ctx.mask.groups()[1])
    ends = [ctx.mask._element(own[-1:, None], keys[None, :1], b, h) for h in heads]
    if not len(own) or bool(torch.stack(ends).all()):
        return torch.zeros_like(own)
    seen = torch.stack([ctx.mask._element(own[:, None], keys[None], b, h) for h in heads]).any(0)
    return seen.expand(len(own), len(keys)).int().argmax(1)


def _agreeing(closed: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The vectors of closed chunks whose boundaries are still what they were."""
    count = min(len(closed) + 1, len(new))
    same = (old[:count] == new[:count]).cumprod(0).sum()
    return closed[: max(0, int(same) - 1)]
