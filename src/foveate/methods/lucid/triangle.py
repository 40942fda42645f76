"""Which parts of LUCID's matrix M aren't zero, as runs of columns for each block of rows.

M is masked as the attention is: M_ij = 0 for j < i unless token i is real and the mask lets it see
token j, so padded tokens keep their values and influence nobody, and packed documents have a block
each. A mask answers for whole blocks; single elements are only looked at where it can't, when they
are needed, and no n x n table is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import Mask
from foveate.ops.errors import InputError
from foveate.ops.masks.base import positions
from foveate.parts.attention import EVERYTHING, remember
from foveate.parts.context import Context
from foveate.parts.tokens import tokens_of

CHUNK = 2048  # columns at most that are held of a block of rows


class Run(NamedTuple):
    """Columns first ... stop - 1 of a block of rows; `partial` where single elements count."""

    first: int
    stop: int
    partial: bool


class Rows(NamedTuple):
    """Rows first ... stop - 1: the runs before their diagonal block, and whether that is partial.

    The diagonal block is strictly lower triangular in any case.
    """

    first: int
    stop: int
    runs: list[Run]
    partial: bool


@dataclass(frozen=True, eq=False)
class Triangle:
    """The structure of M for the rows past ... n - 1.

    Attributes:
        blocks: in order.
        mask: who may see whom; None is every earlier token.
        at: (1 or B', n) positions of the tokens, rising.
        heads: H', over which the mask differs; 1 where it is shared.
    """

    blocks: list[Rows]
    mask: Mask | None
    at: Tensor
    heads: int

    def seen(self, rows: slice, cols: slice) -> Tensor:
        """Whether real row i sees column j: bool (1 or B', 1 or H', rows, cols)."""
        assert self.mask is not None
        found = []
        for b in range(max(self.mask.groups()[0], len(self.at))):
            at = self.at[b if len(self.at) > 1 else 0]
            i, j = at[rows], at[cols]
            found.append(
                torch.stack(
                    [
                        self.mask._element(i[:, None], j[None], b, h)
                        & self.mask._element(i, i, b, h)[:, None]
                        for h in range(self.heads)
                    ]
                )
            )
        return torch.stack(found)


def triangle(k: Tensor, past: int, block: int, ctx: Context) -> Triangle:
    """The structure for keys k (B, Hkv, n, D) of which the first `past` are solved already.

    Args:
        k: all keys; their positions are `ctx.kv_positions`.
        past: rows that aren't asked for.
        block: rows of a block.
        ctx: its mask, if any, must be causal.

    Raises:
        InputError: the mask lets a token see a later one, differs within the query heads of one
            key head, or the positions don't rise.
    """
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    n, kv_heads = k.shape[2], k.shape[1]
    if mask.spec == "causal()" and ctx.kv_positions is None:
        at = torch.arange(0, device=k.device)[None]
        return Triangle(_plain(past, n, block), None, at, 1)
    if kv_heads % mask.groups()[1]:
        raise InputError(
            f"lucid: the mask differs over {mask.groups()[1]} heads, but values are prepared once "
            f"for each of the {kv_heads} key/value heads; use a mask that their query heads share."
        )

    def build() -> Triangle:
        _, at = positions(n, n, ctx.kv_positions, ctx.kv_positions, k.device)
        keys = replace(ctx, q_positions=ctx.kv_positions)
        if not bool((at.diff() > 0).all()):
            raise InputError(
                "lucid: positions of keys must rise from token to token, since a token's value is "
                "prepared from those of the earlier ones; sort the tokens first."
            )
        if n > 1 and not tokens_of(k, k, keys).causal:
            raise InputError(
                "lucid is defined for causal attention only, since a token's value is prepared "
                "from those of the earlier ones; give a causal mask, such as causal()."
            )
        made = Triangle([], mask, at, mask.groups()[1])
        return replace(made, blocks=_blocks(made, past, n, block))

    return remember(ctx, (triangle, mask, past, n, block, k.device), build)


def _plain(past: int, n: int, block: int) -> list[Rows]:
    """Every earlier column."""
    return [
        Rows(first, min(first + block, n), _chunks([Run(0, first, False)]), False)
        for first in range(past, n, block)
    ]


def _blocks(given: Triangle, past: int, n: int, block: int) -> list[Rows]:
    """The runs that the mask doesn't rule out as whole blocks."""
    edges = [*range(0, past, block), *range(past, n, block), n]
    old = -(-past // block)  # blocks of rows that aren't asked for
    first = torch.tensor(edges[:-1], dtype=torch.int64, device=given.at.device)
    last = torch.tensor(edges[1:], dtype=torch.int64, device=given.at.device) - 1
    none, full = _certain(given, first, last, old)
    kinds = ((~none).int() + (full & ~none).int()).tolist()  # 0 empty, 1 partial, 2 full
    found = []
    for i, row in enumerate(kinds, old):
        runs = [Run(edges[j], edges[j + 1], row[j] == 1) for j in range(i) if row[j]]
        found.append(Rows(edges[i], edges[i + 1], _chunks(runs), row[i] == 1))
    return found


def _certain(given: Triangle, first: Tensor, last: Tensor, old: int) -> tuple[Tensor, Tensor]:
    """Whether the blocks of rows from `old` on surely see nothing, or all, of each of columns."""
    assert given.mask is not None
    nones, fulls = [], []
    for b in range(max(given.mask.groups()[0], len(given.at))):
        at = given.at[b if len(given.at) > 1 else 0]
        lo, hi = at[first], at[last]
        for h in range(given.heads):
            own = given.mask._element(at, at, b, h)
            counts = torch.nn.functional.pad(own.cumsum(0), (1, 0))
            real = counts[last + 1] - counts[first]
            new_lo, new_hi = lo[old:, None], hi[old:, None]
            box = given.mask._tiles(new_lo, new_hi, lo[None], hi[None], b, h)
            nones.append(box.none | (real == 0)[old:, None])
            fulls.append(box.full & (real == last - first + 1)[old:, None])
    return torch.stack(nones).all(0), torch.stack(fulls).all(0)


def _chunks(runs: list[Run]) -> list[Run]:
    """Neighbouring runs of a kind joined, and cut where they hold more than CHUNK columns."""
    joined: list[Run] = []
    for run in runs:
        before = joined[-1] if joined else None
        if before and before.stop == run.first and before.partial == run.partial:
            joined[-1] = Run(before.first, run.stop, run.partial)
        elif run.stop > run.first:
            joined.append(run)
    return [
        Run(first, min(first + CHUNK, run.stop), run.partial)
        for run in joined
        for first in range(run.first, run.stop, CHUNK)
    ]
