"""The C++ engine's gradients against autograd through attention in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import engines
import pytest
import torch
from engines import DTYPES, SHAPES, every_tile, make
from hypothesis import given
from hypothesis import strategies as st
from oracle import attend, masks
from test_cpu_engine import FUZZ, kernels  # noqa: F401

from foveate.ops import Layout, causal, cpu, window

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason())


compare = partial(engines.compare_gradients, cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_on_every_instruction_set(kernels: str, shape: Any, dtype: torch.dtype) -> None:  # noqa: F811
    compare(*make(shape, dtype), None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [8, 40, 64, 128, (64, 16), (16, 256)])
def test_masks_in_tiles_of_any_size(kernels: str, tile: Any, dtype: torch.dtype) -> None:  # noqa: F811
    q, k, v = make((1, 4, 2, 150, 201, 32, 48), dtype)
    for mask in (causal(), window(20, 4)):
        compare(q, k, v, mask.layout(150, 201, tile), mask.dense(150, 201))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_rows(kernels: str, dtype: torch.dtype) -> None:  # noqa: F811
    q, k, v = make((1, 2, 1, 130, 140, 1023, 1001), dtype)
    compare(q, k, v, None, None, softcap=4.0, bias=torch.randn(1, 2, 130, 140))
    compare(q, k, v, causal().layout(130, 140, 64), causal().dense(130, 140))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (48, 80), (33, 17)])
def test_items_of_many_blocks(kernels: str, dims: Any, dtype: torch.dtype) -> None:  # noqa: F811
    q, k, v = make((1, 2, 1, 323, 323, *dims), dtype)
    for mask in (causal(), window(70, 3), causal() & ~window(130, 0)):
        compare(q, k, v, mask.layout(323, 323, (256, 64)), mask.dense(323, 323))


@given(data=st.data())
@FUZZ
def test_fuzz_of_shapes_strides_masks_and_tiles(data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
    )
    heads, q_len, kv_len = kv_heads * group, draw(st.integers(1, 100)), draw(st.integers(1, 100))
    shape = (
        batch,
        heads,
        kv_heads,
        q_len,
        kv_len,
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
    )
    q, k, v = make(shape, draw(st.sampled_from(DTYPES)), draw(st.booleans()))
    mask, _ = draw(masks(kv_len))
    if mask.groups()[0] not in (1, batch):
        mask = causal()
    tile = (8 * draw(st.integers(1, 20)), 8 * draw(st.integers(1, 20)))
    bias = None
    if draw(st.booleans()):
        bias = torch.randn([n if draw(st.booleans()) else 1 for n in (batch, heads, q_len, kv_len)])
    torch.set_num_threads(draw(st.sampled_from([1, 3])))
    try:
        compare(
            q,
            k,
            v,
            mask.layout(q_len, kv_len, tile),
            mask.dense(q_len, kv_len),
            draw(st.sampled_from([None, 3.0])),
            bias,
            draw(st.sampled_from([(True, True), (True, False), (False, True)])),
            draw(st.sampled_from([None, 0.0, -0.3])),
        )
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_shared_biases_with_threads(dtype: torch.dtype, threads: int) -> None:
    q, k, v = make((2, 6, 2, 300, 260, 64, 64), dtype)
    mask = window(90, 30)
    torch.set_num_threads(threads)
    try:
        for shape in ((1, 1, 300, 260), (1, 6, 1, 260), (2, 1, 300, 1), (1, 1, 1, 260)):
            bias = torch.randn(shape)
            compare(q, k, v, mask.layout(300, 260, 64), mask.dense(300, 260), bias=bias)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_and_single_keys_in_one_list(kernels: str, dtype: torch.dtype) -> None:  # noqa: F811
    q, k, v = make((1, 4, 2, 300, 300, 64, 64), dtype)
    tiles, keys = torch.rand(1, 2, 5, 5) < 0.4, torch.rand(1, 2, 5, 300) < 0.1
    layout = Layout.from_selection(tiles, keys, 300, 300, 64, within=causal())
    compare(q, k, v, layout, layout.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_by_index(dtype: torch.dtype, repeats: bool, threads: int) -> None:
    q_len, kv_len = 190, 170
    q, k, v = make((2, 4, 2, q_len, kv_len, 32, 24), dtype)
    order = torch.randperm(q_len)
    q_index = torch.cat((order, order) if repeats else (order,)).int()[None, None]
    n, edge = q_index.shape[-1], kv_len // 2
    later = torch.arange(n) >= q_len
    ends = torch.stack((torch.where(later, edge, 0), torch.where(later, kv_len, edge)), -1).int()
    layout = replace(
        every_tile(n, kv_len, 64, -1), q_len=q_len, q_index=q_index, key_range=ends[None, None]
    )
    allowed = torch.zeros(1, 1, q_len, kv_len, dtype=torch.bool)
    allowed[..., : kv_len if repeats else edge] = True
    torch.set_num_threads(threads)
    try:
        compare(q, k, v, layout, allowed)
    finally:
        torch.set_num_threads(1)


def test_a_bias_shared_by_heads_whose_rows_lie_in_different_tiles() -> None:
    """Threads that take the same tile of two heads meet different rows of the bias."""
    q_len, kv_len = 640, 192
    q, k, v = make((1, 4, 2, q_len, kv_len, 16, 16), torch.float32)
    q_index = torch.stack([torch.randperm(q_len) for _ in range(4)]).int()[None]
    lists = every_tile(q_len, kv_len, 64, 0)
    layout = replace(lists, q_index=q_index, ptr=lists.ptr.expand(1, 4, -1).contiguous())
    torch.set_num_threads(3)
    try:
        for _ in range(8):
            compare(q, k, v, layout, None, bias=torch.randn(1, 1, q_len, kv_len))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    q, k, v = make((1, 4, 1, 400, 400, 64, 64), dtype)
    layout = causal().layout(400, 400, 64)
    out, lse = cpu.forward(q, k, v, layout, 0.125, None, None)
    do = torch.randn_like(out)
    torch.set_num_threads(3)
    try:
        runs = [
            cpu.backward(do, None, q, k, v, out, lse, layout, 0.125, None, None) for _ in range(4)
        ]
    finally:
        torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run[:3], runs[0][:3]))


def test_error_stays_below_twice_that_of_sdpa() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for dtype, band in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        q, k, v = make((1, 2, 2, 256, 333, 64, 64), dtype)
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        want, _ = attend(*wide, torch.ones(1, 1, 256, 333, dtype=torch.bool))
        out, lse = flash(q, k, v)
        do = torch.randn_like(out)
        right = torch.autograd.grad(want, wide, do.double())
        theirs = flash_backward(do, q, k, v, out, lse, 0.0, False)
        out, lse = cpu.forward(q, k, v, None, 0.125, None, None)
        ours = cpu.backward(do, None, q, k, v, out, lse, None, 0.125, None, None)
        for a, b, c in zip(ours, theirs, right):
            error, other = ((x.double() - c).abs().max().item() for x in (a, b))
            assert error <= 2 * other + band * c.abs().max().item()


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_take_whole_heads_or_parts_of_them(dtype: torch.dtype, even: bool) -> None:
    """As many key/value heads as threads: taken whole if their lists are alike, else in parts."""
    length, tile = 640, 64
    q, k, v = make((1, 6, 3, length, length, 32, 32), dtype)
    tiles = torch.rand(1, 6, length // tile, length // tile) < 0.5
    if not even:
        tiles[:, 2:] &= torch.rand_like(tiles[:, 2:], dtype=torch.float) < 0.1
    layout = Layout.from_tiles(tiles, length, length, tile)
    torch.set_num_threads(3)
    try:
        compare(q, k, v, layout, layout.dense())
        compare(q, k, v, None, None)
        compare(q, k, v, layout, layout.dense(), bias=torch.randn(1, 1, length, length))
    finally:
        torch.set_num_threads(1)
