"""Paths of the Triton engine that a call doesn't choose: copied tiles, and bit tiles as ranges.

Run as `test_triton.py` is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import every_tile, for_groups, make
from test_triton import Engine, compare, pytestmark  # noqa: F401
from torch import Tensor

from foveate.ops import Layout, causal, padding, triton, window
from foveate.ops.triton import run_backward, run_forward
from foveate.ops.triton.call import copied, describe
from foveate.ops.triton.config import Config, Forced, config_for, shipped
from foveate.ops.triton.plan import plan_of

MORE = pytest.mark.slow
FEW = window(20, 3)
COPIED, LOADED = Config(32, 32, 4, 2, tma=True), Config(32, 32, 4, 2)


def results(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None) -> list[Tensor]:
    call = (q, k, v, layout, 0.2, None, None, None)
    out, lse = Engine.forward(*call[:5], None, None)
    do = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    grads = Engine.backward(do, lse.cos(), q, k, v, out, lse, *call[3:5], None, None)
    return [out, lse, *grads[:3]]


@pytest.mark.parametrize("mask", [causal(), *(pytest.param(m, marks=MORE) for m in (None, FEW))])
@pytest.mark.parametrize("storage", ["rows of heads", "slices", "expanded", "one head"])
def test_copied_tiles_hold_what_loaded_ones_hold(storage: str, mask: object) -> None:
    q_len, kv_len = 45, 70
    q, k, v = make((2, 2, 1, q_len, kv_len, 32, 32), torch.float16)
    if storage == "rows of heads":  # (B, L, H, D)
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif storage == "slices":  # of a larger tensor, whose other numbers are NaN
        wide = [torch.full((3, 5, 80, 48), torch.nan, dtype=x.dtype) for x in (q, k, v)]
        for i, x in enumerate((q, k, v)):
            place = wide[i][1:, 1 : 1 + x.shape[1], 4 : 4 + x.shape[2], 8:40]
            wide[i] = place.copy_(x)
        q, k, v = wide
    elif storage == "expanded":  # no stride of 0 is copied
        q, k, v = (x[:1].expand(2, -1, -1, -1) for x in (q, k, v))
    else:
        q, k, v = (x[:, :1] for x in (q, k, v))
    layout = None if mask is None else mask.layout(q_len, kv_len, (32, 64))  # type: ignore[attr-defined]
    with Forced(COPIED):
        found = results(q, k, v, layout)
    with Forced(LOADED):
        want = results(q, k, v, layout)
    for got, good in zip(found, want):
        assert torch.equal(got, good)


@pytest.mark.skipif(not triton.interpreted(), reason="looks at tensors of the CPU")
def test_what_is_copied() -> None:
    """That the test above takes both ways, forward and backward."""
    q, k, v = make((2, 4, 2, 75, 70, 32, 32), torch.float16)
    with Forced(COPIED):
        call = describe(q, k, v, causal().layout(75, 70, 32), 0.2, None, None, None)
        args = run_forward.arguments(call)[0]
        assert args["K_TILES"] is not None
        assert args["V_TILES"] is not None
        rows = run_backward.Rows(q, q, torch.zeros(2, 4, 75), None)
        args = run_backward.key_arguments(call, q, rows.base, rows.delta)[0]
        names = ("Q_TILES", "G_TILES", "L_TILES", "DELTA_TILES")
        assert all(args[name] is not None for name in names)
        cut = run_forward.arguments(call)[1]
    shared = k[:1].expand(2, -1, -1, -1)
    config = config_for("forward", 32, 32, torch.float16, torch.device("cpu"))
    assert copied(config, cut, K_TILES=k)["K_TILES"] is None
    wrong = (shared, k[..., 1:17], k[..., :24], k[:, :, :, ::2], None)
    assert all(copied(COPIED, cut, X=x)["X"] is None for x in wrong)
    assert copied(COPIED, cut, X=k[..., 8:24])["X"] is not None


def unlike(batches: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    """For each group, rows that see runs of keys, some of them none: bool."""
    low = torch.randint(0, kv_len // 2, (batches, heads, q_len)).sort(-1).values
    high = low + torch.randint(0, kv_len, low.shape)
    high[..., ::9] = 0
    at = torch.arange(kv_len)
    return (at >= low[..., None]) & (at < high[..., None])


@pytest.mark.parametrize("groups", [(1, 2), (2, 4), pytest.param((2, 1), marks=MORE)])
def test_ranges_of_several_groups(groups: tuple[int, int]) -> None:
    q, k, v = make((2, 4, 2, 45, 70, 16, 24), torch.float32)
    allowed = unlike(*groups, 45, 70)
    layout = Layout.from_dense(allowed, (32, 64))
    assert plan_of(layout).key_ranges is not None
    compare(q, k, v, layout, allowed)


@pytest.mark.parametrize("groups", [(1, 2), (2, 4), pytest.param((2, 1), marks=MORE)])
def test_row_ranges_of_several_groups(groups: tuple[int, int]) -> None:
    """With 4 groups the heads of a key head have lists of their own, and keep their bits."""
    q, k, v = make((2, 4, 2, 70, 45, 16, 24), torch.float32)
    allowed = unlike(*groups, 45, 70).mT
    layout = Layout.from_dense(allowed, (64, 32))
    assert plan_of(layout).row_ranges is not None
    compare(q, k, v, layout, allowed)


def test_kinds_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent caches and small pages have configurations of their own, where they were measured."""
    asked = []
    real = run_forward.config_for
    monkeypatch.setattr(run_forward, "config_for", lambda *a: asked.append(a[0]) or real(*a))

    def kind(heads: int, key: Tensor, value: Tensor, tile: int | None = None) -> str:
        query = torch.zeros(1, heads, 1, key.shape[3], dtype=key.dtype)
        layout = None if tile is None else every_tile(1, key.shape[2], tile, 0)
        run_forward.choose(describe(query, key, value, layout, 0.1, None, None, None))
        return asked[-1]

    latent = torch.zeros(1, 1, 256, 576, dtype=torch.bfloat16)
    assert kind(16, latent, latent[..., :512]) == "latent decode"
    assert kind(128, latent, latent[..., :512]) == "latent"
    assert kind(128, latent, latent[..., :512].clone()) == "forward"
    assert kind(128, latent, latent[..., :512], 16) == "forward"
    bias = torch.zeros(1, 1, 1, 256)
    run_forward.choose(describe(latent, latent, latent[..., :512], None, 0.1, None, bias, None))
    assert asked[-1] == "forward"
    narrow = latent.to(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16):
        queries = torch.zeros(1, 128, 1, 576, dtype=dtype)
        call = describe(queries, narrow, narrow[..., :512], None, 0.1, None, None, None)
        assert run_forward.choose(call)[0].rows
        assert asked[-1] == "forward"
    keys = torch.zeros(1, 2, 256, 128, dtype=torch.bfloat16)
    assert kind(8, keys, keys.clone()) == kind(8, keys, keys.clone(), 64) == "decode"
    assert kind(8, keys, keys.clone(), 16) == "paged decode"
    assert shipped("paged decode", 64, 64, 2, 9) == shipped("decode", 64, 64, 2, 9)
    assert shipped("paged decode", 128, 128, 2, 9) != shipped("decode", 128, 128, 2, 9)


@pytest.mark.parametrize("groups", [(1, 1), pytest.param((2, 2), marks=MORE)])
def test_lists_much_longer_than_others_come_first(groups: tuple[int, int]) -> None:
    """The first tile of rows sees all keys and the first tile of keys is seen by all rows."""
    q, k, v = make((2, 4, 2, 112, 112, 16, 16), torch.float32)
    tiles = torch.eye(7, dtype=torch.bool).repeat(*groups, 1, 1)
    tiles[..., 0, :], tiles[..., :, 0] = True, True
    layout = Layout.from_tiles(tiles, 112, 112, 16)
    plan = plan_of(layout)
    order = plan.row_order
    assert order is not None
    count = groups[0] * groups[1]
    assert order.giants == plan.key_order(4, 2).giants == count
    assert order.lists[:count].remainder(7).eq(0).all()
    assert order.lists.sort().values.equal(torch.arange(7 * count, dtype=torch.int32))
    compare(q, k, v, layout, layout.dense())


def test_keys_that_nobody_visits_have_no_gradient() -> None:
    q, k, v = make((1, 2, 1, 64, 128, 16, 16), torch.float32)
    tiles = torch.tensor([[True, False, False, True], [True, False, False, False]])
    layout = Layout.from_tiles(tiles[None, None], 64, 128, 32)
    _, _, _, dk, dv = results(q, k, v, layout)
    for grad in (dk, dv):
        assert grad[:, :, 32:96].eq(0).all()
        assert grad[:, :, :32].abs().amin() > 0


def test_keys_within_gaps_of_ranges_are_never_touched() -> None:
    q, k, v = make((1, 2, 1, 64, 64, 32, 32), torch.float32)
    allowed = torch.zeros(64, 64, dtype=torch.bool)
    allowed[:16, :10] = True
    allowed[16:, 20:40] = True
    layout = Layout.from_dense(allowed, (32, 64))
    want = results(q, k, v, layout)
    k[:, :, 10:20], v[:, :, 10:20] = torch.nan, torch.nan
    for got, good in zip(results(q, k, v, layout), want):
        assert torch.equal(got, good)


def test_keys_before_all_ranges_are_never_touched_beside_empty_rows() -> None:
    q, k, v = make((1, 2, 1, 64, 32, 32, 32), torch.float32)
    allowed = torch.zeros(64, 32, dtype=torch.bool)
    allowed[40:, 10:16] = True  # rows 32 to 39 share their tile and see nothing
    layout = Layout.from_dense(allowed, 32)
    assert plan_of(layout).key_ranges is not None
    want = results(q, k, v, layout)
    k[:, :, :10], v[:, :, :10] = torch.nan, torch.nan
    for got, good in zip(results(q, k, v, layout), want):
        assert torch.equal(got, good)


@pytest.mark.parametrize("empty", [(0, 0), (20, 20), (30, 20)])
def test_rows_without_keys_reach_for_none(empty: tuple[int, int]) -> None:
    q, k, v = make((1, 2, 1, 64, 32, 32, 32), torch.float32)
    ends = torch.tensor([[0, 10]], dtype=torch.int32).repeat(64, 1)[None, None]
    ends[:, :, ::3] = torch.tensor(empty, dtype=torch.int32)
    layout = replace(every_tile(64, 32, 32, -1), key_range=ends)
    want = results(q, k, v, layout)
    k[:, :, 10:], v[:, :, 10:] = torch.nan, torch.nan
    for got, good in zip(results(q, k, v, layout), want):
        assert torch.equal(got, good)


def test_keys_that_are_values_too_and_that_nobody_sees() -> None:
    q, k, _ = make((1, 2, 1, 40, 70, 32, 32), torch.float16)
    k[:, :, 50:] = torch.nan
    layout = padding(torch.tensor([50])).layout(40, 70, (32, 64))
    with Forced(COPIED):
        assert run_forward.arguments(describe(q, k, k, layout, 0.2, None, None, None))[0]["SHARED"]
        found = results(q, k, k, layout)
    kept = k[:, :, :50].clone()
    for got, good in zip(found, results(q, kept, kept, None)):
        torch.testing.assert_close(got[:, :, :50], good, rtol=2e-3, atol=2e-3)


def test_ranges_that_end_far_outside() -> None:
    q, k, v = make((1, 2, 1, 64, 64, 16, 16), torch.float32)
    far = torch.iinfo(torch.int32)
    some = [[far.min, 20], [5, far.max], [1, far.min], [far.max, far.min], [far.min, far.max]]
    ends = torch.tensor(some, dtype=torch.int32).repeat(13, 1)[None, None, :64]
    at = torch.arange(64)
    seen = (at >= ends[..., :1]) & (at < ends[..., 1:])
    compare(q, k, v, replace(every_tile(64, 64, 32, -1), key_range=ends), seen)
    rows = replace(for_groups(every_tile(64, 64, 32, -2), 1, 1), row_range=ends)
    compare(q, k, v, rows, seen.mT)
