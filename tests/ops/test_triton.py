"""The Triton engine against attention in float64: on a GPU, or in Triton's interpreter.

Without a GPU these run where the interpreter was asked for, `TRITON_INTERPRET=1 pytest
tests/ops/test_triton.py`: Triton reads that as it is imported, so such a run is one of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import engines
import pytest
import torch
from engines import DTYPES, every_tile, for_groups, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import masks
from torch import Tensor

from foveate.ops import Layout, Mask, attention, causal, padding, sinks, triton, window
from foveate.ops.triton import run_forward
from foveate.ops.triton.call import describe
from foveate.ops.triton.config import Config, Forced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(
        not triton.available(), reason=f"{triton.reason()}; or set TRITON_INTERPRET=1"
    ),
]
ON_GPU = triton.available() and not triton.interpreted()
MORE = pytest.mark.slow  # in the interpreter; the rest has every feature and every gradient
FUZZ = settings(
    max_examples=200 if ON_GPU else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Engine:
    """The engine for CPU tensors: they go to the GPU and come back, if there is one."""

    @staticmethod
    def forward(*call: Any) -> Any:
        return _back(triton.forward(*map(_there, call)))

    @staticmethod
    def backward(*call: Any) -> Any:
        return _back(triton.backward(*map(_there, call)))


def _there(x: Any) -> Any:
    return x.to("cuda") if ON_GPU and isinstance(x, Tensor | Layout) else x


def _back(found: Any) -> Any:
    return tuple(x if x is None else x.cpu() for x in found)


def compare(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, allowed: Tensor | None, **options: Any
) -> None:
    """Output, lse and gradients."""
    grads = options.pop("grads", (True, True))
    engines.compare(Engine, q, k, v, layout, allowed, **options)
    engines.compare_gradients(Engine, q, k, v, layout, allowed, grads=grads, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (1, 2, 2, 64, 64, 64, 64),
        (2, 4, 2, 70, 91, 37, 53),
        (1, 8, 1, 1, 300, 128, 64),
        (1, 3, 1, 40, 77, 16, 256),
        (2, 3, 1, 17, 215, 96, 5),
    ],
)
def test_dense(shape: Any, dtype: torch.dtype) -> None:
    compare(*make(shape, dtype), None, None)


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(t, marks=MORE) for t in DTYPES[1:])]
)
@pytest.mark.parametrize("tile", [8, 16, 40, 64, (128, 64), (64, 16), (16, 128), (24, 48)])
def test_masks_in_tiles_of_any_size(tile: Any, dtype: torch.dtype) -> None:
    q, k, v = make((1, 2, 1, 70, 91, 32, 48), dtype)
    mask = causal() & (window(50, 4) | padding(torch.tensor([13])))
    compare(q, k, v, mask.layout(70, 91, tile), mask.dense(70, 91))


@MORE
@pytest.mark.parametrize("tile", [8, 40, (64, 16), (16, 128)])
@pytest.mark.parametrize("mask", [causal(), window(20, 4), padding(torch.tensor([63]))])
def test_single_masks_in_tiles_of_any_size(tile: Any, mask: Mask) -> None:
    q, k, v = make((1, 2, 1, 70, 91, 32, 48), torch.float32)
    compare(q, k, v, mask.layout(70, 91, tile), mask.dense(70, 91))


def test_blocks_of_16() -> None:
    q, k, v = make((1, 2, 1, 40, 60, 32, 16), torch.float32)
    mask = causal() & window(30, 0)
    with Forced(Config(16, 16, 4, 1)):
        compare(q, k, v, mask.layout(40, 60, (16, 48)), mask.dense(40, 60))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("queries", [torch.float32, torch.bfloat16])
def test_keys_and_values_of_8_bits(queries: torch.dtype, dtype: torch.dtype) -> None:
    for q_len, dims in ((40, (32, 16)), (1, (96, 32))):
        q, k, v = make((1, 4, 2, q_len, 60, *dims), torch.float32)
        q, k, v = q.to(queries), k.to(dtype), v.to(dtype)
        mask = causal() & window(30, 0)
        layout, allowed = mask.layout(q_len, 60, (16, 32)), mask.dense(q_len, 60)
        engines.compare(Engine, q, k, v, layout, allowed)
    latent = torch.randn(1, 1, 60, 96).to(dtype)
    engines.compare(Engine, q, latent, latent[..., :64], None, None)
    assert "gradient with keys of another dtype" in triton.supports(q, k, v, None, True)[-1]


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 40), (40, 1), (1, 1)])
def test_a_bias_of_one_row_or_column_has_a_gradient(q_len: int, kv_len: int) -> None:
    device = "cuda" if ON_GPU else "cpu"
    drawn = make((1, 2, 1, q_len, kv_len, 32, 16), torch.float32)
    q, k, v = (x.to(device).requires_grad_() for x in drawn)
    found = []
    for backend in ("triton", "reference"):
        bias = torch.linspace(-1, 1, 2 * q_len * kv_len, device=q.device)
        bias = bias.view(1, 2, q_len, kv_len).requires_grad_()
        attention(q, k, v, bias=bias, backend=backend).out.square().sum().backward()
        found.append(bias.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


@given(data=st.data())
@FUZZ
def test_fuzz_of_shapes_strides_masks_and_tiles(data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    group, most = draw(st.integers(1, 3)), 200 if ON_GPU else 40  # the interpreter takes its time
    q_len, kv_len = draw(st.integers(1, most)), draw(st.integers(1, most))
    heads = kv_heads * group
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
    tile = (8 * draw(st.integers(2, 12)), 8 * draw(st.integers(2, 12)))
    bias, first = None, None
    kind = draw(st.sampled_from(["none", "none", "plain", "relative"]))
    if kind != "none":
        last = kv_len if kind == "plain" else draw(st.integers(1, 30))
        first = None if kind == "plain" else draw(st.integers(-kv_len, 3))
        sizes = [n if draw(st.booleans()) else 1 for n in (batch, heads, q_len)]
        last = last if kind == "relative" or draw(st.booleans()) else 1
        bias = torch.randn([*sizes, last])
    compare(
        q,
        k,
        v,
        mask.layout(q_len, kv_len, tile),
        mask.dense(q_len, kv_len),
        softcap=draw(st.sampled_from([None, 3.0])),
        bias=bias,
        bias_first=first,
        grads=draw(st.sampled_from([(True, True), (True, False), (False, True)])),
        scale=draw(st.sampled_from([None, 0.0, -0.3])),
    )


@pytest.mark.parametrize("tile", [pytest.param(16, marks=MORE), 24, 64])
def test_key_ranges_and_row_ranges(tile: int) -> None:
    q_len, kv_len = (100, 90) if ON_GPU else (70, 45)
    q, k, v = make((2, 4, 2, q_len, kv_len, 32, 32), torch.float32)
    lo = torch.randint(-5, kv_len, (2, 2, q_len))
    ends = torch.stack((lo, lo + torch.randint(-3, 60, lo.shape)), -1).int()
    at = torch.arange(kv_len)
    layout = every_tile(q_len, kv_len, tile, -1)
    per_group = replace(for_groups(layout, 2, 2), key_range=ends)
    compare(q, k, v, per_group, (at >= ends[..., :1]) & (at < ends[..., 1:]))
    by_key = torch.stack((at - 20, at + 30), -1).int()[None, None]
    rows = torch.arange(q_len)[:, None]
    layout = replace(every_tile(q_len, kv_len, tile, -2), row_range=by_key)
    compare(q, k, v, layout, (rows >= by_key[..., None, :, 0]) & (rows < by_key[..., None, :, 1]))


@pytest.mark.parametrize("heads", [2, 4])
def test_row_ranges_of_each_query_head(heads: int) -> None:
    q_len, kv_len = 50, 70
    q, k, v = make((1, 4, 2, q_len, kv_len, 16, 16), torch.float32)
    layout = every_tile(q_len, kv_len, 32, -2)
    lo = torch.randint(-5, q_len, (1, heads, kv_len))
    by_key = torch.stack((lo, lo + 20), -1).int()
    layout = replace(for_groups(layout, 1, heads), row_range=by_key)
    rows = torch.arange(q_len)[:, None]
    compare(q, k, v, layout, (rows >= by_key[..., None, :, 0]) & (rows < by_key[..., None, :, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=MORE)])
@pytest.mark.parametrize(("groups", "tile"), [(1, 32), pytest.param(2, 32, marks=MORE), (4, 24)])
def test_tiles_and_single_keys_in_one_list(groups: int, tile: int, dtype: torch.dtype) -> None:
    n = 150 if ON_GPU else 83
    q, k, v = make((2, 4, 2, n, n, 32, 32), dtype)
    count = -(-n // tile)
    tiles = torch.rand(1, groups, count, count) < 0.4
    keys = torch.rand(1, groups, count, n) < 0.1
    tiles[..., 0], keys[..., 5] = False, True  # a key of which the gradient has many parts
    layout = Layout.from_selection(tiles, keys, n, n, tile, within=causal())
    assert layout.gathered is not None
    compare(q, k, v, layout, layout.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_rows_by_index(dtype: torch.dtype, repeats: bool, heads: int) -> None:
    q_len, kv_len = 60, 70
    q, k, v = make((2, 4, 2, q_len, kv_len, 32, 24), dtype)
    shape = (2, heads)
    kv_index = torch.stack([torch.randperm(kv_len) for _ in range(2 * heads)]).reshape(*shape, -1)
    order = torch.stack([torch.randperm(q_len) for _ in range(2 * heads)]).reshape(*shape, -1)
    order[..., ::7] = -1
    q_index = torch.cat((order, order), -1) if repeats else order
    n, edge = q_index.shape[-1], kv_len // 2
    later = torch.arange(n) >= q_len
    lo, hi = torch.where(later, edge, 0), torch.where(later, kv_len, edge)
    layout = replace(
        for_groups(every_tile(n, kv_len, 32, -1), 2, heads),
        q_len=q_len,
        q_index=q_index.int(),
        kv_index=kv_index.int(),
        key_range=torch.stack((lo, hi), -1).int()[None, None],
    )
    compare(q, k, v, layout, layout.dense())


def test_a_key_that_stands_twice() -> None:
    """Each query sees every key once, but two halves of the queries see it at different places."""
    q, k, v = make((1, 4, 2, 40, 48, 16, 16), torch.float32)
    twice = torch.cat((torch.randperm(48), torch.randperm(48))).int()[None, None]
    first = (torch.arange(40) % 2 == 0)[:, None]
    ends = torch.where(first, torch.tensor([0, 48]), torch.tensor([48, 96])).int()
    layout = replace(
        every_tile(40, 96, 16, -1), kv_len=48, kv_index=twice, key_range=ends[None, None]
    )
    compare(q, k, v, layout, None)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("dims", [(64, 64), (40, 24)])
def test_few_queries_against_many_keys(group: int, q_len: int, dims: Any) -> None:
    q, k, v = make((2, 2 * group, 2, q_len, 333, *dims), torch.float16, strided=q_len == 2)
    engines.compare(Engine, q, k, v, None, None)
    mask = causal() & window(170, 0)
    engines.compare(Engine, q, k, v, mask.layout(q_len, 333, (128, 64)), mask.dense(q_len, 333))


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 50])
def test_lists_cut_into_parts(splits: int) -> None:
    q, k, v = (_there(x) for x in make((1, 4, 2, 5, 300, 32, 32), torch.float32))
    layout = _there((causal() & (window(200, 0) | sinks(5))).layout(5, 300, (8, 24)))
    want = triton.forward(q, k, v, layout, 0.2, None, None)
    call = describe(q, k, v, layout, 0.2, None, None, None)
    out, lse = torch.empty_like(want[0]), torch.empty_like(want[1])
    run_forward.launch(call, out, lse, splits)
    torch.testing.assert_close((out, lse), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page", [16, 64])
def test_paged_caches_are_layouts_over_the_pool(page: int, dtype: torch.dtype) -> None:
    pages, lengths = 40 * 16 // page, [100, 37, 1]
    pool_k, pool_v = (torch.randn(1, 2, pages * page, 64).to(dtype) for _ in range(2))
    q = torch.randn(3, 8, 1, 64).to(dtype)
    order = iter(torch.randperm(pages).tolist())
    table = [[next(order) for _ in range(-(-n // page))] for n in lengths]
    counts = torch.tensor([0, *(len(t) for t in table)]).cumsum(0)
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
    engines.compare(Engine, q, k, v, layout, layout.dense())


@pytest.mark.parametrize("dims", [(32, 32), (80, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_within_the_keys(dims: Any, dtype: torch.dtype) -> None:
    """A latent cache: the values are the first elements of the keys, read once for both."""
    dim, value_dim = dims
    q, k, _ = make((2, 16, 1, 1, 150, dim, 8), dtype)
    q, k = _there(q), _there(k)
    call = describe(q, k, k[..., :value_dim], None, 0.2, None, None, None)
    assert run_forward.arguments(call)[0]["SHARED"]
    out, lse = triton.forward(q, k, k[..., :value_dim], None, 0.2, None, None)
    want = triton.forward(q, k, k[..., :value_dim].clone(), None, 0.2, None, None)
    torch.testing.assert_close((out, lse), want)
    layout = _there(window(70, 0).layout(1, 150, (8, 64)))
    found = triton.forward(q, k, k[..., :value_dim], layout, 0.2, None, None)
    want = triton.forward(q, k, k[..., :value_dim].clone(), layout, 0.2, None, None)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("tile", [64, 16])
def test_keys_that_nobody_sees_are_never_touched(tile: int) -> None:
    q, k, v = make((1, 2, 1, 70, 100, 16, 16), torch.float32)
    k[:, :, 61:] = torch.nan
    v[:, :, 61:] = torch.nan
    mask = padding(torch.tensor([61]))
    layout = mask.layout(70, 100, tile)
    out, lse = Engine.forward(q, k, v, layout, 0.25, None, None)
    want, _ = Engine.forward(q, k[:, :, :61], v[:, :, :61], None, 0.25, None, None)
    torch.testing.assert_close(out, want)
    assert lse.isfinite().all()
    grads = Engine.backward(torch.ones_like(out), None, q, k, v, out, lse, layout, 0.25, None, None)
    assert all(x is None or x.isfinite().all() for x in grads)
    assert (grads[1][:, :, 61:] == 0).all()


def test_empty_rows_and_no_keys() -> None:
    q, k, v = make((1, 2, 2, 40, 20, 8, 8), torch.float32)
    layout = causal().layout(40, 20, 16)
    out, lse = Engine.forward(q, k, v, layout, 0.3, None, None)
    assert (lse[:, :, :20] == -torch.inf).all()
    assert (out[:, :, :20] == 0).all()
    found = Engine.backward(torch.ones_like(out), None, q, k, v, out, lse, layout, 0.3, None, None)
    assert (found[0][:, :, :20] == 0).all()
    out, lse = Engine.forward(q, k[:, :, :0], v[:, :, :0], None, 0.3, None, None)
    assert (lse == -torch.inf).all()
    assert (out == 0).all()


@pytest.mark.parametrize("bias", ["none", "shared by heads", "relative"])
def test_the_same_bits_every_time(bias: str) -> None:
    q, k, v = (_there(x) for x in make((2, 4, 1, 90, 90, 32, 32), torch.float16))
    table, first = None, None
    if bias == "shared by heads":
        table = _there(torch.randn(1, 1, 90, 90))
    elif bias == "relative":
        table, first = _there(torch.randn(1, 4, 1, 30)), -25
    keys = torch.rand(1, 1, 3, 90) < 0.3
    layout = Layout.from_selection(torch.rand(1, 1, 3, 3) < 0.5, keys, 90, 90, 32, within=causal())
    rest = (_there(layout), 0.2, None, table, first)
    out, lse = triton.forward(q, k, v, *rest)
    do = torch.randn_like(out)
    runs = [triton.backward(do, None, q, k, v, out, lse, *rest) for _ in range(3)]
    for run in runs[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_the_core_op_runs_on_it() -> None:
    q, k, v = (_there(x).requires_grad_() for x in make((2, 4, 2, 70, 90, 32, 32), torch.float32))
    b = _there(torch.randn(4)).requires_grad_()
    mask = causal() & (window(40, 0) | sinks(3))
    results = []
    for backend in ("triton", "reference"):
        run = partial(attention, q, k, v, mask, sink_logits=b, softcap=4.0, backend=backend)
        out, lse = run()
        grads = torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v, b))
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_large_pool_is_addressed_in_64_bits() -> None:
    n = (1 << 31) // 128 + 4096  # elements past 2^31
    pool = torch.zeros(1, 1, n, 128, dtype=torch.float16, device="cuda")
    pool[:, :, -300:] = torch.randn(300, 128, dtype=torch.float16, device="cuda")
    q = torch.randn(1, 8, 1, 128, dtype=torch.float16, device="cuda")
    layout = window(299, 0).layout(1, n, (8, 64), device="cuda")
    out, _ = triton.forward(q, pool, pool, layout, 0.1, None, None)
    want, _ = triton.forward(q, pool[:, :, -300:], pool[:, :, -300:], None, 0.1, None, None)
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)
