"""The C++ engine against attention in float64: shapes, strides, layouts, instruction sets."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import engines
import pytest
import torch
from engines import DTYPES, SHAPES, every_tile, for_groups, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import attend, masks

from foveate.ops import Layout, causal, cpu, padding, window
from foveate.ops.cpu import binding

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason())
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def kernel_sets() -> list[str]:
    if not cpu.available():
        return []
    best, found = cpu.isa(), []
    for name in ("portable", "avx2", "avx512", "avx512bf16", "amx"):
        try:
            cpu.use(name)
        except ValueError:
            continue
        found.append(name)
    cpu.use(best)
    return found


@pytest.fixture(params=kernel_sets())
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    best = cpu.isa()
    cpu.use(request.param)
    yield request.param
    cpu.use(best)


compare = partial(engines.compare, cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_on_every_instruction_set(kernels: str, shape: Any, dtype: torch.dtype) -> None:
    compare(*make(shape, dtype), None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [8, 16, 40, 64, 72, 128, 256, (64, 16), (16, 256)])
def test_masks_in_tiles_of_any_size(kernels: str, tile: Any, dtype: torch.dtype) -> None:
    q, k, v = make((1, 4, 2, 150, 201, 32, 48), dtype)
    for mask in (causal(), window(20, 4), padding(torch.tensor([133]))):
        compare(q, k, v, mask.layout(150, 201, tile), mask.dense(150, 201))


@given(data=st.data())
@FUZZ
def test_fuzz_of_shapes_strides_masks_and_tiles(data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
    )
    q_len, kv_len = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    shape = (
        batch,
        kv_heads * group,
        kv_heads,
        q_len,
        kv_len,
        draw(st.integers(1, 80)),
        draw(st.integers(1, 80)),
    )
    dtype = draw(st.sampled_from(DTYPES))
    q, k, v = make(shape, dtype, draw(st.booleans()))
    mask, _ = draw(masks(kv_len))
    if mask.groups()[0] not in (1, batch):
        mask = causal()
    tile = (8 * draw(st.integers(1, 20)), 8 * draw(st.integers(1, 20)))
    softcap = draw(st.sampled_from([None, 3.0]))
    bias = None
    if draw(st.booleans()):
        sizes = (batch, kv_heads * group, q_len, kv_len)
        bias = torch.randn([n if draw(st.booleans()) else 1 for n in sizes])
        bias = bias.to(draw(st.sampled_from(DTYPES)))
    scale = draw(st.sampled_from([None, 0.0, -0.3, 1.0]))
    compare(
        q, k, v, mask.layout(q_len, kv_len, tile), mask.dense(q_len, kv_len), softcap, bias, scale
    )


@pytest.mark.parametrize("tile", [16, 64, 128])
def test_key_ranges_and_row_ranges(kernels: str, tile: int) -> None:
    q_len, kv_len = 170, 140
    q, k, v = make((2, 4, 2, q_len, kv_len, 32, 32), torch.float32)
    lo = torch.randint(-5, kv_len, (2, 2, q_len))
    ends = torch.stack((lo, lo + torch.randint(-3, 60, lo.shape)), -1).int()
    at = torch.arange(kv_len)
    allowed = (at >= ends[..., :1]) & (at < ends[..., 1:])
    layout = every_tile(q_len, kv_len, tile, -1)
    per_group = replace(for_groups(layout, 2, 2), key_range=ends)
    compare(q, k, v, per_group, allowed)
    by_key = torch.stack((torch.arange(kv_len) - 20, torch.arange(kv_len) + 30), -1).int()[
        None, None
    ]
    rows = torch.arange(q_len)[:, None]
    layout = replace(every_tile(q_len, kv_len, tile, -2), row_range=by_key)
    inside = (rows >= by_key[..., None, :, 0]) & (rows < by_key[..., None, :, 1])
    compare(q, k, v, layout, inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_and_single_keys_in_one_list(kernels: str, dtype: torch.dtype) -> None:
    q_len = kv_len = 300
    q, k, v = make((1, 4, 2, q_len, kv_len, 64, 64), dtype)
    tiles = torch.rand(1, 2, 5, 5) < 0.4
    keys = torch.rand(1, 2, 5, kv_len) < 0.1
    layout = Layout.from_selection(tiles, keys, q_len, kv_len, 64, within=causal())
    assert layout.gathered is not None
    compare(q, k, v, layout, layout.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeats", [False, True])
def test_rows_by_index(kernels: str, dtype: torch.dtype, repeats: bool) -> None:
    q_len, kv_len = 90, 110
    q, k, v = make((2, 4, 2, q_len, kv_len, 32, 24), dtype)
    kv_index = torch.stack([torch.randperm(kv_len) for _ in range(2)])[:, None].int()
    # Twice as many virtual rows: with repeats, the second half of each query's keys comes later.
    order = torch.stack([torch.randperm(q_len) for _ in range(2)])[:, None]
    order[:, :, ::7] = -1
    q_index = torch.cat((order, order), -1).int() if repeats else order.int()
    n = q_index.shape[-1]
    edge = kv_len // 2
    lo = torch.where(torch.arange(n) < q_len, 0, edge)
    hi = torch.where(torch.arange(n) < q_len, edge, kv_len)
    layout = replace(
        every_tile(n, kv_len, 32, -1),
        q_len=q_len,
        q_index=q_index,
        kv_index=kv_index,
        key_range=torch.stack((lo, hi), -1).int()[None, None],
    )
    allowed = torch.zeros(2, 1, q_len, kv_len, dtype=torch.bool)
    for b in range(2):
        for r in range(n):
            if q_index[b, 0, r] >= 0:
                allowed[b, 0, q_index[b, 0, r], kv_index[b, 0, lo[r] : hi[r]].long()] = True
    compare(q, k, v, layout, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 20, 70, 300])
def test_keys_that_nobody_sees_are_never_touched(
    kernels: str, rows: int, dtype: torch.dtype
) -> None:
    q, k, v = make((1, 2, 1, rows, 100, 16, 16), dtype)
    k[:, :, 61:] = torch.nan
    v[:, :, 61:] = torch.nan
    mask = padding(torch.tensor([61]))
    out, lse = cpu.forward(q, k, v, mask.layout(rows, 100, 64), 0.25, None, None)
    want, _ = cpu.forward(q, k[:, :, :61], v[:, :, :61], None, 0.25, None, None)
    rounding = max(1e-5, torch.finfo(dtype).eps / 2)
    torch.testing.assert_close(out, want, rtol=rounding, atol=rounding)
    assert lse.isfinite().all()


def test_empty_rows_and_no_keys(kernels: str) -> None:
    q, k, v = make((1, 2, 2, 40, 20, 8, 8), torch.float32)
    mask = causal()
    out, lse = cpu.forward(q, k, v, mask.layout(40, 20, 16), 0.3, None, None)
    assert (lse[:, :, :20] == -torch.inf).all()
    assert (out[:, :, :20] == 0).all()
    out, lse = cpu.forward(q, k[:, :, :0], v[:, :, :0], None, 0.3, None, None)
    assert (lse == -torch.inf).all()
    assert (out == 0).all()


def test_threads_change_nothing_but_rounding() -> None:
    q, k, v = make((1, 2, 2, 300, 900, 64, 64), torch.float32)
    layout = causal().layout(300, 900, 64)
    one = cpu.forward(q, k, v, layout, 0.125, None, None)
    row = cpu.forward(q[:, :, -1:], k, v, None, 0.125, None, None)
    torch.set_num_threads(3)
    try:
        three = cpu.forward(q, k, v, layout, 0.125, None, None)
        split = cpu.forward(q[:, :, -1:], k, v, None, 0.125, None, None)
    finally:
        torch.set_num_threads(1)
    for a, b in zip((*one, *row), (*three, *split)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 30, 300])
def test_maxima_that_rise_along_the_keys(kernels: str, rows: int, dtype: torch.dtype) -> None:
    """By less and by more than a kernel lets them lag behind: slowly, in jumps, falling again."""
    kv_len = 330
    ramp = torch.linspace(-1, 1, kv_len)
    for size in (6.0, 50.0):
        for course in (ramp, ramp.flip(0), ramp.round(decimals=1)):
            q, k, v = make((1, 4, 2, rows, kv_len, 64, 48), dtype)
            q[..., 0], k[..., 0] = 8.0, (course * size).to(dtype)
            compare(q, k, v, None, None)
            mask = window(150, 90)
            compare(q, k, v, mask.layout(rows, kv_len, (512, 64)), mask.dense(rows, kv_len))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (48, 80), (33, 17)])
def test_items_of_many_blocks(kernels: str, dims: Any, dtype: torch.dtype) -> None:
    """Blocks that share a step see all of its keys, a few, or none; the last of them is short."""
    q, k, v = make((1, 2, 1, 523, 523, *dims), dtype)
    for mask in (causal(), window(70, 3), causal() & ~window(130, 0)):
        compare(q, k, v, mask.layout(523, 523, (512, 64)), mask.dense(523, 523))
    compare(q, k, v, None, None, softcap=3.0, bias=torch.randn(1, 2, 523, 523))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_lists_of_several_blocks_are_cut(kernels: str, dtype: torch.dtype) -> None:
    """16 queries of 8 heads against more keys than are summed in one go: two blocks, two parts."""
    compare(*make((1, 8, 1, 16, 33000, 16, 16), dtype), None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 130])
def test_the_longest_rows(kernels: str, rows: int, dtype: torch.dtype) -> None:
    q, k, v = make((1, 2, 1, rows, 130, 1023, 1001), dtype)
    bias = torch.randn(1, 2, rows, 130)
    compare(q, k, v, None, None, softcap=4.0, bias=bias)
    compare(q, k, v, causal().layout(rows, 130, 64), causal().dense(rows, 130))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_without_a_query(kernels: str, dtype: torch.dtype) -> None:
    """Rows by index, all of a tile missing, over whole and partial tiles with a bias."""
    q, k, v = make((1, 3, 1, 20, 150, 32, 32), dtype)
    index = torch.full((1, 1, 64), -1, dtype=torch.int32)
    index[..., 40:60] = torch.arange(20)
    layout = (causal() & window(130, 0)).layout(20, 150, (8, 64))
    compare(q, k, v, layout, layout.dense(), bias=torch.randn(1, 3, 20, 150))
    every = replace(every_tile(64, 150, 32, 0), q_len=20, q_index=index)
    compare(q, k, v, every, None, bias=torch.randn(1, 3, 20, 150))


def test_error_stays_below_twice_that_of_sdpa() -> None:
    for dtype, band in ((torch.float32, 2e-7), (torch.bfloat16, 2e-3), (torch.float16, 2e-4)):
        q, k, v = make((1, 2, 2, 256, 777, 64, 64), dtype)
        want, want_lse = attend(q, k, v, torch.ones(1, 1, 256, 777, dtype=torch.bool))
        out, lse = cpu.forward(q, k, v, None, 0.125, None, None)
        theirs, their_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        for ours, other, right, slack in (
            (out, theirs, want, band),
            (lse, their_lse, want_lse, 4e-6),
        ):
            error = (ours.double() - right).abs().max().item()
            assert error <= 2 * (other.double() - right).abs().max().item() + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 96), (40, 24), (20, 6)])
def test_few_queries_against_many_keys(kernels: str, dims: Any, dtype: torch.dtype) -> None:
    for group in (1, 2, 3, 4, 8, 16, 64):
        for q_len in (1, 2, 5):
            q, k, v = make((2, 2 * group, 2, q_len, 333, *dims), dtype, strided=q_len == 2)
            compare(q, k, v, None, None)
            mask = causal() & window(170, 0)
            compare(q, k, v, mask.layout(q_len, 333, 64), mask.dense(q_len, 333))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(576, 512), (300, 272)])
def test_few_queries_of_long_rows(kernels: str, dims: Any, dtype: torch.dtype) -> None:
    """Latent caches: rows of more elements than are summed in one go."""
    for group in (1, 3, 16, 20):
        q, k, v = make((1, group, 1, 1, 201, *dims), dtype)
        compare(q, k, v, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("dims", [(64, 64), (128, 80), (36, 33)])
def test_decoding_over_selected_whole_and_partial_tiles(
    kernels: str, dims: Any, tile: int, dtype: torch.dtype
) -> None:
    """Lists with gaps, odd ends, single keys or nothing at all, for groups of any size."""
    kv_len = 333
    wide = kernels in ("avx512", "avx512bf16", "amx")
    for group in range(1, 17) if wide else (1, 4, 9, 16):
        q_len = 1 if group % 4 else 2
        q, k, v = make((2, 2 * group, 2, q_len, kv_len, *dims), dtype, strided=group % 3 == 0)
        tiles = torch.rand(2, 2, 1, -(-kv_len // tile)) < 0.5
        tiles[0, 0] = False
        tiles[0, 1, :, -1] = True  # ends at an odd key
        keys = torch.rand(2, 2, 1, kv_len) < (0.05 if group % 2 else 0.0)
        within = (causal() & ~window(120, 0) | window(45, 0)) if group % 5 else None
        layout = Layout.from_selection(tiles, keys, q_len, kv_len, (8, tile), within=within)
        scale = (None, -0.2, 0.0)[group % 3]
        compare(q, k, v, layout, layout.dense(), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_over_a_list_that_threads_share(kernels: str, dtype: torch.dtype) -> None:
    """Long lists are cut into parts, some of whole tiles only, some of none."""
    q_len, kv_len, tile = 1, 4099, 16
    q, k, v = make((2, 6, 2, q_len, kv_len, 64, 64), dtype)
    tiles = torch.rand(2, 2, 1, -(-kv_len // tile)) < 0.9
    tiles[1, 1, :, 5:] = False
    keys = torch.zeros(2, 2, 1, kv_len, dtype=torch.bool)
    keys[..., ::37] = True
    layout = Layout.from_selection(tiles, keys, q_len, kv_len, (8, tile), within=window(4060, 0))
    torch.set_num_threads(3)
    try:
        compare(q, k, v, layout, layout.dense())
        compare(q, k, v, None, None)
        compare(q[:, ::3], k, v, None, None)  # one head each
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (40, 48), (128, 128), (64, 80), (64, 144)])
def test_decoding_over_long_runs_with_jumps(kernels: str, dims: Any, dtype: torch.dtype) -> None:
    """Few heads read long runs as streams; from one to the next they jump, also backwards."""
    kv_len, tile = 2777, 64
    tiles = torch.zeros(2, 2, 1, -(-kv_len // tile), dtype=torch.bool)
    tiles[0, 0, :, 1:13] = tiles[0, 0, :, 20:44] = True
    tiles[0, 1, :, ::2] = True  # short runs
    tiles[1, 0, :, :] = True
    layout = Layout.from_tiles(tiles, 1, kv_len, (8, tile))
    ptr, cols = layout.ptr, layout.cols.clone()
    for group in (ptr[0, 0], ptr[1, 0]):
        cols[group[0] : group[1]] = cols[group[0] : group[1]].roll(9)
    for heads, strided in (
        (1, False), (2, False), (3, False), (4, False), (1, True), (2, True), (4, True),
    ):  # fmt: skip
        q, k, v = make((2, 2 * heads, 2, 1, kv_len, *dims), dtype, strided=strided)
        compare(q, k, v, layout, layout.dense())
        compare(q, k, v, replace(layout, cols=cols), layout.dense())
        compare(q, k, v, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_with_keys_by_index_ranges_and_repeats(kernels: str, dtype: torch.dtype) -> None:
    q_len, kv_len, n = 2, 333, 117
    q, k, v = make((2, 8, 2, q_len, kv_len, 64, 64), dtype)
    kv_index = torch.stack([torch.randperm(kv_len)[:n] for _ in range(4)]).reshape(2, 2, n).int()
    layout = replace(
        for_groups(every_tile(q_len, n, 16, 0), 2, 2), kv_len=kv_len, kv_index=kv_index
    )
    allowed = torch.zeros(2, 2, q_len, kv_len, dtype=torch.bool)
    allowed.scatter_(3, kv_index[:, :, None].long().expand(-1, -1, q_len, -1), True)
    compare(q, k, v, layout, allowed)
    # Every other tile by range, the others whole.
    kinds = torch.where(torch.arange(21) % 2 == 0, 0, -1).int()
    ends = torch.tensor([[29, 206], [100, 331]]).int()
    layout = replace(every_tile(q_len, kv_len, 16, 0), kinds=kinds, key_range=ends[None, None])
    at = torch.arange(kv_len)
    allowed = (at >= ends[:, :1]) & (at < ends[:, 1:]) | (kinds[at // 16] == 0)
    compare(q, k, v, layout, allowed[None, None])
    # Keys and values that are one row, repeated: nothing lies one behind the other.
    one_k, one_v = (x[:, :, :1].expand(-1, -1, kv_len, -1) for x in (k, v))
    compare(q, one_k, v, None, None)
    compare(q, k, one_v, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_never_touches_keys_outside_its_tiles(kernels: str, dtype: torch.dtype) -> None:
    for heads in (4, 8, 32, 80):
        untouched(*make((1, heads, 2, 1, 301, 64, 64), dtype))


def untouched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    tiles = (torch.arange(19) % 3 != 1)[None, None, None]
    keys = torch.zeros(1, 1, 1, 301, dtype=torch.bool)
    layout = Layout.from_selection(tiles, keys, 1, 301, (8, 16), within=window(295, 0))
    want = cpu.forward(q, k, v, layout, 0.125, None, None)
    unseen = ~layout.dense()[0, 0, 0]
    assert unseen.any()
    k[:, :, unseen] = torch.nan
    v[:, :, unseen] = torch.nan
    for a, b in zip(cpu.forward(q, k, v, layout, 0.125, None, None), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_caches_are_layouts_over_the_pool(kernels: str, dtype: torch.dtype) -> None:
    page, pages, lengths = 16, 40, [100, 37, 1]
    pool_k, pool_v = (torch.randn(1, 2, pages * page, 64).to(dtype) for _ in range(2))
    q = torch.randn(3, 8, 1, 64).to(dtype)
    order = iter(torch.randperm(pages).tolist())
    table = [[next(order) for _ in range(-(-n // page))] for n in lengths]
    counts = torch.tensor([0, *(len(t) for t in table)]).cumsum(0)
    # The last page of each sequence is partly filled: one bit tile for each number of keys.
    bits = torch.zeros(page, page, 1, dtype=torch.uint8)
    for n in range(page):
        bits[n, :n] = 1
    layout = Layout(
        q_len=1,
        kv_len=pages * page,
        q_tile=8,
        kv_tile=page,
        ptr=torch.stack((counts[:-1], counts[1:]), -1)[:, None],
        cols=torch.tensor(sum(table, []), dtype=torch.int32),
        kinds=torch.cat(
            [torch.tensor([0] * (len(t) - 1) + [n % page + 1]) for t, n in zip(table, lengths)]
        ).int(),
        bits=bits,
    )
    k, v = (x.expand(3, -1, -1, -1) for x in (pool_k, pool_v))
    out, lse = cpu.forward(q, k, v, layout, 0.125, None, None)
    for b, (blocks, n) in enumerate(zip(table, lengths)):
        rows = torch.cat([torch.arange(p * page, (p + 1) * page) for p in blocks])[:n]
        at = slice(b, b + 1)
        own = q[at], pool_k[:, :, rows], pool_v[:, :, rows]
        whole, whole_lse = cpu.forward(*own, None, 0.125, None, None)
        want, _ = attend(*own, torch.ones(1, 1, 1, n, dtype=torch.bool), scale=0.125)
        # Pages cut the keys into other steps, and weights are rounded step by step.
        error, usual = ((x.double() - want).abs().amax() for x in (out[at], whole))
        assert error <= 2 * usual + 2e-7
        torch.testing.assert_close(lse[at], whole_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_runs_after_the_parent_used_threads() -> None:
    q, k, v = make((1, 2, 2, 200, 200, 64, 64), torch.float32)
    torch.set_num_threads(3)
    try:
        want, _ = cpu.forward(q, k, v, None, 0.125, None, None)
        child = os.fork()
        if child == 0:  # the parent's threads are not here: a call that waits for them never ends
            code = 1
            try:
                out, _ = cpu.forward(q, k, v, None, 0.125, None, None)
                code = 0 if (out - want).abs().max().item() < 1e-5 else 2
            finally:
                os._exit(code)
    finally:
        torch.set_num_threads(1)
    end = time.monotonic() + 60
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done
    assert os.waitstatus_to_exitcode(status) == 0


def test_what_a_call_says_stands_in_its_fields():
    query, out = torch.randn(2, 6, 5, 8).transpose(0, 1), torch.empty(6, 2, 5, 4)
    key, value = torch.randn(6, 1, 9, 8), torch.randn(6, 1, 9, 4)
    lse = torch.empty(6, 2, 5)
    call = binding.described(query, key, value, out, lse, 0.25, 3.0)
    found = [getattr(call, name) for name, _ in binding.Call._fields_[:11]]
    assert found == [0, 6, 2, 1, 5, 9, 8, 4, torch.get_num_threads(), 0.25, 3.0]
    for rows, x in ((call.query, query), (call.key, key), (call.value, value), (call.out, out)):
        assert (rows.data, rows.b, rows.h, rows.l) == (x.data_ptr(), *x.stride()[:3])
    assert call.lse == lse.data_ptr()
    assert binding._HEAD.size == binding.Call.bias.offset
    assert not any(bytes(call)[binding.Call.bias.offset :])
