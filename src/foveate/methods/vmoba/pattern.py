"""VMoBA: video tokens attend to blocks of frames, of places, and of both, turn by turn over layers.

    layer mod 3 = 0  temporal: `frames` latent frames, runs of tokens frame by frame
                  1  spatial: a tile of all frames  "t (nh sh)(nw sw) -> (nh nw) t sh sw"
                  2  both: a box                    "(nt ct)(nh ch)(nw cw) -> (nt nh nw) ct ch cw"

As in MoBA a query scores blocks by q . mean(k) and sees the chosen ones whole, its own among them,
in one softmax; but nothing is causal, pairs of all queries of a head compete (`scope="head"`), and
how many are kept follows from their scores (`tau`). See `choice` for the rules.

Source: Wu et al. 2025, arXiv 2506.23858, section 3; KwaiVGI/VMoBA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.vmoba.choice import SCOPES, Scope, choose_pairs
from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Pattern, mask_layout, remember
from foveate.parts.block_rows import Blocks, rows_by_block, scores_of
from foveate.parts.context import Context
from foveate.parts.grid_blocks import Cut, Grid, boxes, equal_runs, even_runs
from foveate.parts.tokens import Tokens
from foveate.parts.video import grid_keys, grid_of, keys_beside, video_tokens

PARTITIONS = ("1d", "2d", "3d")


@dataclass(frozen=True)
class VMoBA(Pattern):
    """Each query of a video sees its own block and those that its head's pairs are worth it.

    The grid is `shape`, else `ctx.grid`: frames, rows, columns; an image has no frames and is cut
    as a video of one. Tokens before and behind the grid (text) see everything and are seen by all.
    The mask is everything, padding aside. Queries that see no padding choose; sequences choose
    apart.

    Attributes:
        frames: latent frames of a temporal block, also a fraction (paper: 3 of 21). The last block
            may be short.
        blocks: so many temporal blocks of near equal length in place of `frames`.
        tile: rows and columns of a spatial block (paper: 5 x 13 of 30 x 52).
        box: frames, rows, columns of a 3-D block (paper: 7 x 5 x 13).
        partitions: of layers 0, 1, 2, ..., over and over.
        select: "threshold" keeps pairs until they add up to `tau`, "topk" a number of them.
        scope: what competes: "head" (the paper), "query", "query-heads" or "block".
        tau: share of the normalised scores that is kept (paper: 0.25).
        topk: blocks for each query, its own counted; one number, or one for each of `partitions`.
        keep_own: own pairs are kept whatever they score, as in the released code; False is the
            paper's formula, by which a query may see nothing (its output is then 0).
        dense_until: share of the denoising steps that stay dense (paper, without training: 0.25);
            `ctx.step` says how many are done.
        shape: of the grid, so that models that don't tell it can be used.
        before, after: tokens beside the grid's.

    Raises:
        InputError: a field that doesn't fit, blocks that don't divide the grid, or a mask.
    """

    frames: float = 3
    blocks: int | None = None
    tile: tuple[int, int] = (5, 13)
    box: tuple[int, int, int] = (7, 5, 13)
    partitions: tuple[str, ...] = PARTITIONS
    select: Literal["threshold", "topk"] = "threshold"
    scope: Scope = "head"
    tau: float = 0.25
    topk: int | tuple[int, ...] = 3
    keep_own: bool = True
    dense_until: float = 0.0
    shape: tuple[int, ...] | None = None
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name in ("tile", "box", "partitions", "topk", "shape"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, sides in (("tile", 2), ("box", 3)):
            given = getattr(self, name)
            if not isinstance(given, tuple) or len(given) != sides:
                raise InputError(f"VMoBA({name}={given!r}): expected {sides} numbers of tokens.")
            for side in given:
                whole("VMoBA", name, side, least=1)
        if self.blocks is not None:
            whole("VMoBA", "blocks", self.blocks, least=1)
        if not self.frames > 0:
            raise InputError(f"VMoBA(frames={self.frames}): expected a number above 0.")
        if not self.partitions or any(p not in PARTITIONS for p in self.partitions):
            raise InputError(
                f"VMoBA(partitions={self.partitions!r}): expected some of {', '.join(PARTITIONS)}."
            )
        if self.select not in ("threshold", "topk"):
            raise InputError(f"VMoBA(select={self.select!r}): expected 'threshold' or 'topk'.")
        if self.scope not in SCOPES:
            raise InputError(f"VMoBA(scope={self.scope!r}): expected one of {', '.join(SCOPES)}.")
        for name in ("tau", "dense_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"VMoBA({name}={getattr(self, name)}): expected 0 to 1.")
        each = self.topk if isinstance(self.topk, tuple) else (self.topk,)
        if isinstance(self.topk, tuple) and len(each) != len(self.partitions):
            raise InputError(
                f"VMoBA(topk={self.topk}): expected one number, or one for each of the "
                f"{len(self.partitions)} partitions."
            )
        for k in each:
            whole("VMoBA", "topk", k, least=1)
        for name in ("before", "after"):
            whole("VMoBA", name, getattr(self, name), least=0)

    @property
    def reserved(self) -> str:
        """What is seen whatever the scores say, in words."""
        return "its own block" if self.keep_own else "nothing"

    def cut(self, grid: Grid, layer: int) -> Cut:
        """The blocks of a layer's grid, in numbers of the grid's tokens."""
        frames, height, width = (1,) * (3 - len(grid)) + tuple(grid)
        kind = self.partitions[layer % len(self.partitions)]
        if kind == "2d":
            return boxes((frames, height, width), (frames, *self.tile))
        if kind == "3d":
            return boxes((frames, height, width), self.box)
        every = torch.arange(frames * height * width)
        if self.blocks is not None:
            return even_runs(every, min(self.blocks, len(every)))
        return equal_runs(every, min(len(every), max(1, int(self.frames * height * width))))

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return ctx.step is not None and ctx.step < self.dense_until

    def grid_of(self, q: Tensor, k: Tensor, ctx: Context) -> Grid:
        """The grid of this call; raises InputError where there is none or it doesn't fit."""
        return grid_of("vmoba", self.shape, self.before + self.after, q, k, ctx)

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        grid = self.grid_of(q, k, ctx)
        if self.is_dense(q, k, ctx):
            return mask_layout(ctx.mask, q, k, ctx)
        tokens = video_tokens("vmoba", q, k, ctx)
        kind = ctx.layer % len(self.partitions)
        blocks = remember(
            ctx,
            (VMoBA, self, grid, kind, ctx.mask, q.shape[2], q.device),
            lambda: self._blocks(grid, ctx.layer, tokens),
        )
        return rows_by_block(self.choose(q, k, tokens, blocks, ctx.layer), blocks, k.shape[2])

    def _blocks(self, grid: Grid, layer: int, tokens: Tokens) -> Blocks:
        """The grid's blocks, then one of the tokens beside it."""
        table = grid_keys(self.cut(grid, layer), self.before, tokens)
        beside = keys_beside(grid, self.before, self.after, tokens)
        if beside.shape[1]:
            width = max(table.shape[2], beside.shape[1])
            table = torch.nn.functional.pad(table, (0, width - table.shape[2]), value=-1)
            last = torch.nn.functional.pad(beside, (0, width - beside.shape[1]), value=-1)
            table = torch.cat((table, last[:, None]), 1)
        return Blocks(table)

    def choose(self, q: Tensor, k: Tensor, tokens: Tokens, blocks: Blocks, layer: int) -> Tensor:
        """The blocks that each query sees: bool (B, Hq, S, C).

        Args:
            q: (B, Hq, S, D).
            k: (B, Hkv, S, D).
            tokens: of the call.
            blocks: of this layer; behind those of the grid the one of the tokens beside it.
            layer: index of the layer.
        """
        batch, heads, length, _ = q.shape
        count = blocks.keys.shape[1]
        on_grid = count - bool(self.before + self.after)
        scores = scores_of(q, blocks.means(k))
        owner, _ = blocks.owner(length)
        found = torch.zeros(batch, heads, length, count, dtype=torch.bool, device=q.device)
        topk = None
        if self.select == "topk":
            at = layer % len(self.partitions)
            topk = self.topk[at] if isinstance(self.topk, tuple) else self.topk
        for b in range(batch):
            real = tokens.q_real[b if len(tokens.q_real) > 1 else 0]
            own = owner[b if len(owner) > 1 else 0]
            grid_rows = torch.arange(length, device=q.device)
            inner = (grid_rows >= self.before) & (grid_rows < length - self.after)
            rows = (real & inner & (own >= 0)).nonzero()[:, 0]
            # Blocks of padding alone don't compete.
            sizes = blocks.sizes[b if len(blocks.sizes) > 1 else 0][:on_grid]
            cols = (sizes > 0).nonzero()[:, 0]
            number = torch.zeros_like(sizes).index_put((cols,), torch.arange(len(cols)).to(cols))
            if len(rows) and len(cols):
                kept = choose_pairs(
                    scores[b][:, rows][:, :, cols],
                    number[own[rows]],
                    self.scope,
                    tau=self.tau if self.select == "threshold" else None,
                    topk=topk,
                    keep_own=self.keep_own,
                )
                part = found.new_zeros(heads, len(rows), count)
                part[:, :, cols] = kept
                part[:, :, on_grid:] = True
                found[b, :, rows] = part
            found[b, :, real & ~inner] = True
        return found
