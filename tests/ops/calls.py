"""Any call that the engines must take, drawn by hypothesis: shapes, strides, lists, tables, bias.

Numbers that steer (sizes, kinds, densities) are drawn one by one, so that a fuzzer can move them;
contents (values, bits, indices) come from a seed that is drawn too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from engines import DTYPES
from hypothesis import strategies as st
from oracle import masks
from torch import Tensor

from foveate.ops import Layout, causal


@dataclass
class Case:
    """Arguments of one call; `layout` None is everything."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout | None
    softcap: float | None
    scale: float
    bias: Tensor | None
    bias_first: int | None
    threads: int

    @property
    def allowed(self) -> Tensor:
        """Bool (B or 1, H or 1, Lq, Lkv)."""
        if self.layout is None:
            return torch.ones(1, 1, self.q.shape[2], self.k.shape[2], dtype=torch.bool)
        return self.layout.dense()


@st.composite
def cases(draw: Any, longest: int = 150, widest: int = 80) -> Case:
    """Any valid call."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 9))
    q_len, kv_len = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    dim, value_dim = draw(st.integers(1, widest)), draw(st.integers(1, widest))
    dtype = draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def values(h: int, n: int, d: int) -> Tensor:
        how = draw(st.sampled_from(("plain", "by token", "shared")))
        if how == "by token":
            x = torch.randn(batch, n, h, d + 3, generator=random).to(dtype)
            return x[..., 1 : d + 1].transpose(1, 2)
        x = torch.randn(batch, h, n if how == "plain" else 1, d, generator=random).to(dtype)
        return x.expand(-1, -1, n, -1)

    q, k = values(heads, q_len, dim), values(kv_heads, kv_len, dim)
    v = values(kv_heads, kv_len, value_dim)
    kind = draw(st.sampled_from(("all", "mask", "lists", "selection")))
    layout: Layout | None = None
    if kind == "mask":
        mask, _ = draw(masks(kv_len))
        mask = mask if mask.groups()[0] in (1, batch) else causal()
        layout = mask.layout(q_len, kv_len, draw(tiles()))
    elif kind == "lists":
        layout = draw(lists(batch, kv_heads, q_len, kv_len, random))
    elif kind == "selection":
        layout = draw(selections(batch, kv_heads, q_len, kv_len, random))
    softcap = draw(st.sampled_from((None, 3.0)))
    scale = draw(st.sampled_from((dim**-0.5, 0.0, -0.3, 1.0)))
    bias, first = None, None
    how = draw(st.sampled_from(("none", "pairs", "distances")))
    if how == "pairs":
        sizes = [n if draw(st.booleans()) else 1 for n in (batch, heads, q_len, kv_len)]
        bias = torch.randn(sizes, generator=random).to(draw(st.sampled_from(DTYPES)))
    elif how == "distances":
        count = draw(st.integers(1, 40))
        first = draw(st.integers(-60, 20))
        sizes = [n if draw(st.booleans()) else 1 for n in (batch, heads, q_len)]
        bias = torch.randn(*sizes, count, generator=random)
    return Case(q, k, v, layout, softcap, scale, bias, first, draw(st.sampled_from((1, 3))))


def tiles() -> st.SearchStrategy[tuple[int, int]]:
    """Sizes of a tile."""
    side = st.integers(1, 20).map(lambda n: 8 * n)
    return st.tuples(side, side)


@st.composite
def selections(
    draw: Any, batch: int, heads: int, q_len: int, kv_len: int, random: torch.Generator
) -> Layout:
    """Chosen tiles and single keys, within a mask or not."""
    tile = draw(tiles())
    groups = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))))
    shape = (*groups, -(-q_len // tile[0]))
    share = draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    chosen = torch.rand(*shape, -(-kv_len // tile[1]), generator=random) < share
    share = draw(st.sampled_from((0.0, 0.05, 0.5)))
    single = torch.rand(*shape, kv_len, generator=random) < share
    within = causal() if draw(st.booleans()) else None
    return Layout.from_selection(chosen, single, q_len, kv_len, tile, within=within)


@st.composite
def lists(
    draw: Any, batch: int, heads: int, q_len: int, kv_len: int, random: torch.Generator
) -> Layout:
    """Lists with every kind of entry and table, in which no pair stands twice."""

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random)

    q_tile, kv_tile = draw(tiles())
    batches, groups = draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads)))

    def own() -> tuple[int, int]:
        return (draw(st.sampled_from((1, batches))), draw(st.sampled_from((1, groups))))

    def choice(n: int) -> Tensor | None:
        """Some of n rows in any order, and -1 for none."""
        if not draw(st.booleans()):
            return None
        size = draw(st.integers(1, n + 9))
        lead = own()
        padded = torch.rand(*lead, n + 9, generator=random).argsort(-1)
        return torch.where(padded < n, padded, -1)[..., :size].int()

    q_index, kv_index = choice(q_len), choice(kv_len)
    rows = q_len if q_index is None else q_index.shape[-1]
    keys = kv_len if kv_index is None else kv_index.shape[-1]
    q_tiles, kv_tiles = -(-rows // q_tile), -(-keys // kv_tile)

    def ranges(n: int, other: int) -> Tensor | None:
        if not draw(st.booleans()):
            return None
        low = whole(-5, other + 5, *own(), n)
        return torch.stack((low, low + whole(-3, other + 3, *low.shape)), -1).int()

    key_range, row_range = ranges(rows, keys), ranges(keys, rows)
    patterns = draw(st.integers(0, 4))
    bits = whole(0, 256, patterns, kv_tile, q_tile // 8).to(torch.uint8)
    kinds = [0, *range(1, patterns + 1)]
    kinds += [-1] * (key_range is not None) + [-2] * (row_range is not None)
    share = draw(st.sampled_from((0.0, 0.2, 0.7, 1.0)))
    singles = draw(st.sampled_from((0.0, 0.3)))
    ends, cols, gathered = [0], [], []
    for _ in range(batches * groups * q_tiles):
        visited = torch.rand(kv_tiles, generator=random) < share
        mine = visited.nonzero()[:, 0]
        cols += mine[torch.rand(len(mine), generator=random).argsort()].tolist()
        others = torch.arange(keys)[~visited[torch.arange(keys) // kv_tile]]
        others = others[torch.rand(len(others), generator=random) < singles]
        for some in others[torch.rand(len(others), generator=random).argsort()].split(kv_tile):
            cols.append(kv_tiles + len(gathered))
            gathered.append(torch.nn.functional.pad(some, (0, kv_tile - len(some)), value=-1))
        ends.append(len(cols))
    picked = whole(0, len(kinds), len(cols))
    layout = Layout(
        q_len, kv_len, q_tile, kv_tile,
        torch.cat([torch.tensor(ends[i : i + q_tiles + 1])
                   for i in range(0, batches * groups * q_tiles, q_tiles)])
        .reshape(batches, groups, q_tiles + 1),
        torch.tensor(cols, dtype=torch.int32),
        torch.tensor(kinds, dtype=torch.int32)[picked],
        bits,
        gathered=torch.stack(gathered).int() if gathered else None,
        q_index=q_index, kv_index=kv_index, key_range=key_range, row_range=row_range,
    )  # fmt: skip
    return layout.checked()
