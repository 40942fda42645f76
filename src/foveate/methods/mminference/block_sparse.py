"""Block-sparse: per block of queries the key blocks whose pooled scores are highest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.mminference.prefill import ProblemPattern, budget, check_fraction
from foveate.methods.mminference.problem import Part, Problem
from foveate.ops import Layout, blocks
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.anchor import Places, mask_by_places, placed
from foveate.parts.attention import mask_layout
from foveate.parts.context import Context
from foveate.parts.listing import kind_table, restrict
from foveate.parts.selection import topk_mask
from foveate.parts.tokens import Tokens, tokens_of


@dataclass(frozen=True)
class BlockSparse(ProblemPattern):
    """Row block m sees the `blocks` key blocks with the highest mean(q_m) . mean(k_n).

    Within `ctx.mask`, and always with the blocks on its own diagonal. Blocks are cut from each
    sequence's first real token, so padding changes nothing. Means are over the real tokens of a
    block, in fp32; the choice is per sequence and query head. Decoding is dense.
    A block's mean holds its later tokens, so the choice isn't causal though the outputs are.
    arXiv 2407.02490, algorithm 3.

    Attributes:
        blocks: key blocks per row block (paper: 100).
        tile: tokens of a block, a multiple of 8 (paper: 64).
        fraction: None as in the paper; our addition: at most that share of each sequence's blocks,
            so that one setting serves short and long prompts.

    Raises:
        InputError: a field that doesn't fit.
    """

    blocks: int = 100
    tile: int = 64
    fraction: float | None = None

    def __post_init__(self) -> None:
        whole("BlockSparse", "blocks", self.blocks, least=1)
        whole("BlockSparse", "tile", self.tile, least=8)
        if self.tile % 8:
            raise InputError(f"BlockSparse(tile={self.tile}): expected a multiple of 8.")
        check_fraction("BlockSparse", self.fraction)

    @override
    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        blocks = -(-k.shape[2] // self.tile)
        return budget(self.blocks, self.fraction, blocks) >= blocks

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        rows, cols, base = self._blocks(q, k, ctx, tokens_of(q, k, ctx))
        chosen = restrict(base, self.choose(q, k, ctx))
        if not (rows.moved or cols.moved):
            return chosen
        return placed(chosen, (q.shape[2], k.shape[2]), rows, cols)

    def choose(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        """The blocks that are visited: bool (B, Hq, Tq, Tk); shapes of q and k as in a call.

        A block that holds padding in front holds no real token: the next begins at the first one.
        """
        tokens = tokens_of(q, k, ctx)
        rows, cols, base = self._blocks(q, k, ctx, tokens)
        allowed = kind_table(base) >= 0
        if allowed.shape[1] > 1:
            allowed = allowed.repeat_interleave(q.shape[1] // allowed.shape[1], 1)
        mean_q = _pool(q, tokens.q_real, rows, self.tile)
        mean_k = _pool(k, tokens.k_real, cols, self.tile)
        grouped = mean_q.unflatten(1, (k.shape[1], -1))
        scores = (grouped @ mean_k[:, :, None].mT).flatten(1, 2)
        best = self._best(scores, allowed, tokens)
        return (best | self._diagonal(rows, cols, tokens)) & allowed

    @override
    def parts(self, problem: Problem) -> list[list[Part]]:
        """Blocks of the problem's own rows and keys, as they stand side by side."""
        rows, keys = (torch.arange(len(x), device=x.device) for x in (problem.rows, problem.keys))
        if not len(rows) or not len(keys):
            return [[] for _ in range(problem.heads)]
        q_blocks, k_blocks = (-(-len(x) // self.tile) for x in (rows, keys))
        mean_q, mean_k = (_means(x, self.tile) for x in (problem.q, problem.k))
        scores = (mean_q.unflatten(0, (len(mean_k), -1)) @ mean_k[:, None].mT).flatten(0, 1)
        low = problem.k_at[:: self.tile]
        last = (torch.arange(1, q_blocks + 1, device=rows.device) * self.tile - 1).clamp_max(
            len(rows) - 1
        )
        allowed = low <= problem.q_at[last][:, None]
        most = max(1, budget(self.blocks, self.fraction, k_blocks))
        chosen = topk_mask(scores, most, allowed.expand_as(scores))
        # The block that holds a row's own key, where the problem has it.
        at = torch.searchsorted(problem.k_at, problem.q_at).clamp_max(len(keys) - 1)
        own = problem.k_at[at] == problem.q_at
        chosen[:, rows[own] // self.tile, at[own] // self.tile] = True
        # The table's last row and column are the same place: see `blocks`.
        numbers = (rows + (k_blocks - q_blocks) * self.tile, keys)
        return [[Part(rows, keys, None, blocks(one, self.tile), numbers)] for one in chosen]

    def _blocks(
        self, q: Tensor, k: Tensor, ctx: Context, tokens: Tokens
    ) -> tuple[Places, Places, Layout]:
        """Where rows and keys stand, and the mask's layout over those places."""
        rows, cols = Places.of(tokens.q_real, self.tile), Places.of(tokens.k_real, self.tile)
        if rows.moved or cols.moved:
            return rows, cols, mask_by_places(ctx, tokens, rows, cols, self.tile)
        return rows, cols, mask_layout(ctx.mask, q, k, ctx, self.tile)

    def _best(self, scores: Tensor, allowed: Tensor, tokens: Tokens) -> Tensor:
        if self.fraction is None:
            return topk_mask(scores, self.blocks, allowed)
        lengths = (-(-tokens.k_real.sum(1) // self.tile)).expand(len(scores)).tolist()
        return torch.stack(
            [
                topk_mask(
                    scores[b],
                    max(1, budget(self.blocks, self.fraction, n)),
                    allowed[b if len(allowed) > 1 else 0],
                )
                for b, n in enumerate(lengths)
            ]
        )

    def _diagonal(self, rows: Places, cols: Places, tokens: Tokens) -> Tensor:
        """(B', 1, Tq, Tk): blocks that hold a row's own key, one per row block, or two."""
        count, device = rows.index.shape[1], rows.front.device
        places = torch.arange(count, device=device)
        end = (tokens.q_real * (places[: tokens.q_real.shape[1]] + 1)).amax(1) + rows.front
        first = torch.arange(0, count, self.tile, device=device)
        last = torch.minimum(first + self.tile, end[:, None]) - 1
        move = (tokens.shift - rows.front + cols.front)[:, None]
        low, high = ((first + move) // self.tile, (last + move) // self.tile)
        at = torch.arange(-(-cols.index.shape[1] // self.tile), device=device)
        return ((at >= low[..., None]) & (at <= high[..., None]))[:, None]


def _means(x: Tensor, tile: int) -> Tensor:
    """Means of blocks of rows, (H, n, D) to (H, T, D), in fp32 or wider."""
    real = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device)
    return _pool(x[None], real, Places.of(real, tile), tile)[0]


def _pool(x: Tensor, real: Tensor, places: Places, tile: int) -> Tensor:
    """Means over the real tokens of each block, in fp32 or wider: (B, H, T, D)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = real.to(x.dtype)[:, None, :, None]
    if not bool(real.all()):
        x = torch.where(real[:, None, :, None], x, 0.0)
    if places.moved:
        there = places.index.clamp_min(0)[:, None, :, None]
        weight = weight.gather(2, there) * (places.index >= 0)[:, None, :, None]
        x = x.gather(2, there.expand(x.shape[0], x.shape[1], -1, x.shape[3])) * (weight > 0)
    spare = -x.shape[2] % tile
    x = torch.nn.functional.pad(x, (0, 0, 0, spare)).unflatten(2, (-1, tile)).sum(3)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, spare)).unflatten(2, (-1, tile)).sum(3)
    return x / weight.clamp_min(1)
