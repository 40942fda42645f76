"""Rectified SpaAttn: block-sparse attention, scaled to its share of full attention's mass.

With M the blocks that are computed, C those that their pooled values make up for, P the pooled map
and R what isn't in C (all in `pooled`), a visual block's queries get

    O_n = R_n softmax_{M[n]}(s Q_n K^T) V + sum_m C[n, m] P[n, m] v_m

as sparse weights are full ones over the mass of M, which R estimates. Text queries see everything.

Source: Liu et al. 2025, arXiv 2511.19835; BienLuky/Rectified-SpaAttn. The choice of blocks is that
of Jenga (dvlab-research), which `rectify=False` gives alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.methods.rectified_spaattn.pooled import (
    Pooled,
    best_blocks,
    keep_of,
    pooled_map,
    worth_it,
)
from foveate.ops import AttentionOutput, Layout, attention
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention, clock, mask_layout, remember
from foveate.parts.block_rows import Blocks, tile_for
from foveate.parts.context import Context
from foveate.parts.grid_blocks import Cut, Grid, boxes, curve, equal_runs, touching
from foveate.parts.video import grid_keys, grid_of, keys_beside, video_tokens


@dataclass(frozen=True, eq=False)
class _Places:
    """Where tokens stand.

    blocks (N); text (B', T); near (N, N) blocks computed whatever P says; keep (B', 1, 1, 1) blocks
    at least, a share of each sequence's own (those of padding alone aren't counted).
    """

    blocks: Blocks
    text: Tensor
    near: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Choice:
    """What is computed and what is made up for.

    Attributes:
        computed: M, bool (B, Hq, N, N).
        pooled: C, bool (B, Hq, N, N).
        map: P, (B, Hq, N, N + 1), text last.
    """

    computed: Tensor
    pooled: Tensor
    map: Tensor

    @property
    def share(self) -> Tensor:
        """R (B, Hq, N): P over what isn't made up for."""
        return (self.map[..., :-1] * ~self.pooled).sum(-1) + self.map[..., -1]


@dataclass(frozen=True)
class RectifiedSpaAttn(Attention):
    """Each block of a video's queries computes few key blocks, and corrects what that leaves out.

    The grid is `shape`, else `ctx.grid`; tokens before and behind it are text: they see everything,
    are seen by all and aren't pooled; padding among them is the mask's. Means, map and factors are
    in fp32 or wider. M and C are constants to the backward, P and R have gradients. The lse is an
    estimate of full attention's: that of the sparse part less log R.

    Attributes:
        drop: share of the visual blocks that is left out (paper: 0.8 HunyuanVideo, 0.75 Wan 2.1,
            0.9 Flux at 4K).
        p_thr: mass of P that is computed in any case (paper: 0.3); from 1 on everything is.
        block: tokens of a block (paper: 128).
        box: frames, rows and columns of a block in place of runs along the curve.
        order: "curve" (paper) or "rows", what blocks are runs of.
        neighbours: blocks that touch a query block on the grid are computed.
        first_frame: blocks that hold tokens of the first frame see each other (Wan 2.1).
        rectify: False is the sparse attention alone, as in Jenga.
        ipar: text columns of P count for one token each, pooled ones for their number.
        gapr: only blocks whose pooled score is above its error are made up for; False: all.
        dense_until: share of the denoising steps that stay dense (`ctx.step`).
        shape: of the grid, so that models that don't tell it can be used.
        before, after: tokens beside the grid's.

    Raises:
        InputError: a field that doesn't fit, a grid, or a mask that isn't everything.
    """

    drop: float = 0.8
    p_thr: float = 0.3
    block: int = 128
    box: tuple[int, ...] | None = None
    order: str = "curve"
    neighbours: bool = True
    first_frame: bool = False
    rectify: bool = True
    ipar: bool = True
    gapr: bool = True
    dense_until: float = 0.0
    shape: tuple[int, ...] | None = None
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name in ("box", "shape"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("drop", "p_thr", "dense_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"RectifiedSpaAttn({name}={getattr(self, name)}): expected 0 to 1."
                )
        whole("RectifiedSpaAttn", "block", self.block, least=1)
        for side in self.box or ():
            whole("RectifiedSpaAttn", "box", side, least=1)
        if self.order not in ("curve", "rows"):
            raise InputError(f"RectifiedSpaAttn(order={self.order!r}): expected 'curve' or 'rows'.")
        for name in ("before", "after"):
            whole("RectifiedSpaAttn", name, getattr(self, name), least=0)

    @property
    def reserved(self) -> str:
        """What is computed whatever the map says, in words."""
        return "neighbouring blocks and text" if self.neighbours else "text"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend over a whole video; shapes as in `Attention`, Lq = Lkv."""
        ctx = Context() if ctx is None else ctx
        grid_of("rectified-spaattn", self.shape, self.before + self.after, q, k, ctx)
        _check(ctx)
        if not q.shape[0]:
            return attention(q, k, v, ctx.mask, **ctx.options)
        start = clock(q, ctx)
        places = None if self._is_dense(ctx) else self._places(q, k, ctx)
        if places is None:
            layout = mask_layout(ctx.mask, q, k, ctx)
        else:
            choice = self._choice(q, k, ctx, places)
            layout = self._layout(choice.computed, places, q.shape[2])
        built = clock(q, ctx)
        result = attention(q, k, v, layout=layout, **ctx.options)
        if places is not None and self.rectify:
            result = _rectified(result, choice, v, places.blocks)
        if ctx.stats is not None:
            ctx.stats(
                layer=ctx.layer,
                layout=layout,
                build_seconds=built - start,
                attend_seconds=clock(q, ctx) - built,
            )
        return result

    def layout(self, q: Tensor, k: Tensor, ctx: Context) -> Layout:
        """What is computed, to count and to see it; shapes as in a call."""
        grid_of("rectified-spaattn", self.shape, self.before + self.after, q, k, ctx)
        if self._is_dense(ctx):
            return mask_layout(ctx.mask, q, k, ctx)
        places = self._places(q, k, ctx)
        return self._layout(self._choice(q, k, ctx, places).computed, places, q.shape[2])

    def choose(self, q: Tensor, k: Tensor, ctx: Context) -> Choice:
        """M, C and P of a call."""
        return self._choice(q, k, ctx, self._places(q, k, ctx))

    def cut(self, grid: Grid) -> Cut:
        """The grid's blocks, in numbers of its tokens."""
        if self.box is not None:
            return boxes(grid, self.box)
        tokens = int(torch.tensor(grid).prod())
        order = curve(grid) if self.order == "curve" else torch.arange(tokens)
        return equal_runs(order, min(self.block, tokens))

    def _is_dense(self, ctx: Context) -> bool:
        return ctx.step is not None and ctx.step < self.dense_until

    def _places(self, q: Tensor, k: Tensor, ctx: Context) -> _Places:
        grid = grid_of("rectified-spaattn", self.shape, self.before + self.after, q, k, ctx)
        tokens = video_tokens("rectified-spaattn", q, k, ctx)

        def make() -> _Places:
            cut = self.cut(grid)
            count = len(cut.tokens)
            near = torch.zeros(count, count, dtype=torch.bool)
            if self.neighbours:
                near |= touching(cut, grid)
            if self.first_frame:
                frame = int(torch.tensor(grid[1:]).prod()) if len(grid) == 3 else 0
                first = ((cut.tokens >= 0) & (cut.tokens < frame)).any(1)
                near |= first[:, None] & first
            blocks = Blocks(grid_keys(cut, self.before, tokens))
            text = keys_beside(grid, self.before, self.after, tokens)
            own = (blocks.sizes > 0).sum(1).tolist()
            keep = torch.tensor([keep_of(self.drop, n) for n in own], device=q.device)
            return _Places(blocks, text, near.to(q.device), keep.view(-1, 1, 1, 1))

        return remember(ctx, (RectifiedSpaAttn, self, grid, ctx.mask, q.shape[2], q.device), make)

    def _choice(self, q: Tensor, k: Tensor, ctx: Context, places: _Places) -> Choice:
        blocks = places.blocks
        scale = q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
        pooled: Pooled = pooled_map(q, k, blocks, places.text, scale, self.ipar)
        with torch.no_grad():
            count = pooled.raw.shape[-1]
            entries = pooled.map if places.text.shape[1] else pooled.map[..., :-1]
            some = (blocks.sizes > 0)[:, None, None]
            best = best_blocks(entries.detach(), places.keep, self.p_thr)
            computed = (best[..., :count] | places.near) & some
            left = ~computed & some
            made_up = torch.zeros_like(left)
            if self.rectify:
                made_up = left & worth_it(pooled, q, k, blocks) if self.gapr else left
        return Choice(computed, made_up, pooled.map)

    def _layout(self, computed: Tensor, places: _Places, length: int) -> Layout:
        """Rows and keys block by block, then the text, cut into tiles; all of them whole."""
        keys = places.blocks.keys
        batch, heads, count, _ = computed.shape
        tile = tile_for(keys.shape[2])
        each = -(-keys.shape[2] // tile)
        padded = torch.nn.functional.pad(keys, (0, each * tile - keys.shape[2]), value=-1)
        spare = -places.text.shape[1] % tile
        text = torch.nn.functional.pad(places.text, (0, spare), value=-1)
        index = torch.cat((padded.flatten(1), text), 1)[:, None].int()
        tiles = computed.repeat_interleave(each, 2).repeat_interleave(each, 3)
        more = text.shape[1] // tile
        tiles = torch.nn.functional.pad(tiles, (0, more, 0, more), value=True)
        real = (index >= 0).view(len(index), 1, -1, tile).any(-1)
        tiles = tiles & real[:, :, None] & real[..., None]
        ends = tiles.sum(-1).flatten().cumsum(0).view(batch, heads, -1)
        starts = torch.cat((ends.new_zeros(1), ends.flatten(0, 1)[:-1, -1])).view(batch, heads, 1)
        cols = tiles.nonzero()[:, 3].int()
        return Layout(
            q_len=length,
            kv_len=length,
            q_tile=tile,
            kv_tile=tile,
            ptr=torch.cat((starts, ends), -1),
            cols=cols,
            kinds=torch.zeros_like(cols),
            bits=torch.zeros(0, tile, tile // 8, dtype=torch.uint8, device=cols.device),
            q_index=index,
            kv_index=index,
        )


def _rectified(
    sparse: AttentionOutput, choice: Choice, v: Tensor, blocks: Blocks
) -> AttentionOutput:
    """R times the sparse output, and the pooled values of C; text rows as they are."""
    weights = choice.map[..., :-1] * choice.pooled
    values = blocks.means(v)
    grouped = weights.unflatten(1, (values.shape[1], -1)) @ values[:, :, None]
    more = grouped.flatten(1, 2)
    share = choice.share
    owner, _ = blocks.owner(v.shape[2])
    owner = owner.expand(len(v), -1)[:, None].expand(-1, share.shape[1], -1)
    visual = owner >= 0
    at = owner.clamp_min(0)
    own = torch.where(visual, share.gather(2, at), 1.0)
    rows = more.gather(2, at[..., None].expand(-1, -1, -1, more.shape[3]))
    rows = torch.where(visual[..., None], rows, 0.0)
    out = own[..., None] * sparse.out.to(rows.dtype) + rows
    return AttentionOutput(out.to(sparse.out.dtype), sparse.lse - own.to(sparse.lse.dtype).log())


def _check(ctx: Context) -> None:
    for name in ("softcap", "sink_logits", "bias"):
        if getattr(ctx, name) is not None:
            raise InputError(
                f"rectified-spaattn's pooled map knows no {name}; leave it, or use block-sparse."
            )
    if ctx.dropout:
        raise InputError("rectified-spaattn is for inference: expected dropout=0.")
