"""The forward whose warps are specialised, against float64; on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import compare, every_tile, for_groups, make
from torch import Tensor

from foveate.ops import Layout, Mask, attention, causal, documents, prefix, sinks, triton, window
from foveate.ops.triton import run_hopper
from foveate.ops.triton.call import describe
from foveate.ops.triton.config import Config, Forced
from foveate.ops.triton.plan import plan_of

HERE = triton.available() and not triton.interpreted() and run_hopper._here(0)
pytestmark = [pytest.mark.triton]
MASKS: dict[str, Mask | None] = {
    "causal": causal(),
    "window": window(150, 0),
    "window both ways": window(90, 40),
    "prefix": prefix(130),
    "documents": None,
}
SHAPES = {
    "even": (1, 2, 2, 512, 512),
    "odd": (2, 4, 2, 300, 517),
    "more queries": (1, 2, 1, 517, 300),
    "long": (1, 1, 1, 130, 2000),
}


FORMS = {"one": run_hopper.ONE, "three": run_hopper.THREE}


def wanted(form: Any) -> Any:
    """In place of `run_hopper.form`: this one wherever it can be."""
    return lambda call: form if call.query.shape[3] == 64 else run_hopper.TWO


@pytest.fixture(params=FORMS)
def each_form(request: Any, monkeypatch: Any) -> None:
    """Blocks in every form that a head size has."""
    if request.param != "one" and request.node.callspec.params.get("dim") == 128:
        pytest.skip("head size 128 has one form")
    monkeypatch.setattr(run_hopper, "form", wanted(FORMS[request.param]))


def on_hopper(test: Any) -> Any:
    """A test that runs the kernel."""
    return pytest.mark.gpu(pytest.mark.skipif(not HERE, reason="needs a Hopper GPU")(test))


def in_each_form(test: Any) -> Any:
    """A test that runs the kernel, in every form."""
    return on_hopper(pytest.mark.usefixtures("each_form")(test))


def _there(x: Any) -> Any:
    return x.to("cuda") if isinstance(x, Tensor | Layout) else x


class Engine:
    """The kernel, wherever it is asked for; it must take the call."""

    @staticmethod
    def forward(*args: Any) -> Any:
        q, k, v, layout, scale, softcap, bias, first = map(_there, args)
        call = describe(q, k, v, layout, scale, softcap, bias, first)
        assert run_hopper.fits(call)
        out = torch.full((*q.shape[:3], v.shape[3]), 7.0, dtype=q.dtype, device=q.device)
        lse = torch.full(q.shape[:3], 7.0, device=q.device)
        run_hopper.launch(call, out, lse)
        return out.cpu(), lse.cpu()


def uneven(length: int) -> Tensor:
    """Windows of 100, and 200 rows at the end that see all before them."""
    row, key = torch.arange(length)[:, None], torch.arange(length)
    return (key <= row) & ((row - key < 100) | (row >= length - 200))


def tensors(
    shape: str, dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    return make((*SHAPES[shape], dim, dim), dtype)


@in_each_form
@pytest.mark.parametrize("dim", run_hopper.HEAD_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, shape: str, dim: int) -> None:
    q, k, v = tensors(shape, dim)
    q_len, kv_len = q.shape[2], k.shape[2]
    drawn = MASKS[mask]
    if drawn is None:
        drawn = causal() & documents([0, 100, 230, 231, kv_len - 50, kv_len])
    allowed = drawn.dense(q_len, kv_len)
    for tile in ((128, 128), (128, 64), (256, 128), (128, 192), (64, 64)):
        if q_len > tile[0] and (
            dim == 64 or tile[0] > 64
        ):  # one tile of queries keeps its bits, as in decoding
            compare(Engine, q, k, v, drawn.layout(q_len, kv_len, tile), allowed)


@in_each_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", run_hopper.HEAD_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape: str, dim: int, dtype: torch.dtype) -> None:
    compare(Engine, *tensors(shape, dim, dtype), None, None)


@in_each_form
@pytest.mark.parametrize("groups", [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_chosen_tiles_of_each_head(groups: tuple[int, int]) -> None:
    q, k, v = make((2, 8, 4, 700, 900, 64, 64), torch.float16)
    tiles = torch.rand(*groups, 6, 8) < 0.4
    tiles[..., 2, :] = False  # rows that see nothing
    layout = Layout.from_tiles(tiles, 700, 900, 128)
    assert layout.kinds.eq(0).all()
    compare(Engine, q, k, v, layout, layout.dense())


@on_hopper
def test_ranges_of_each_head() -> None:
    q, k, v = make((2, 4, 2, 400, 500, 128, 128), torch.bfloat16)
    layout = for_groups(window(170, 0).layout(400, 500, 128), 2, 4)
    compare(Engine, q, k, v, layout, layout.dense())


@in_each_form
@pytest.mark.parametrize("dim", run_hopper.HEAD_SIZES)
def test_many_blocks_for_each_program(dim: int) -> None:
    q, k, v = (x.cuda() for x in make((2, 16, 4, 3000, 3000, dim, dim), torch.bfloat16))
    layout = causal().layout(3000, 3000, 128).to("cuda")
    args = (q, k, v, layout, 0.1, None, None)
    assert run_hopper.takes(describe(*args, None))
    found = [triton.forward(*args) for _ in range(3)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0]))
    for batch in (0, 1):
        one = (x[batch : batch + 1, :4].float() for x in (q, k[:, :1], v[:, :1]))
        want, want_lse = attention(*one, layout=layout, scale=0.1, backend="reference")
        torch.testing.assert_close(found[0][0][batch, :4].float(), want[0], rtol=0, atol=4e-2)
        torch.testing.assert_close(found[0][1][batch, :4], want_lse[0], rtol=1e-4, atol=1e-4)


@in_each_form
@pytest.mark.parametrize("dim", run_hopper.HEAD_SIZES)
def test_long_lists_among_short_ones(dim: int) -> None:
    q, k, v = make((2, 4, 2, 1500, 1500, dim, dim), torch.bfloat16)
    layout = Layout.from_dense(uneven(1500), (256, 128))
    assert plan_of(layout).row_order.giants
    compare(Engine, q, k, v, layout, uneven(1500)[None, None])


@on_hopper
def test_memory_in_another_order() -> None:
    q, k, v = (torch.randn(2, 300, 4, 128).bfloat16().cuda().transpose(1, 2) for _ in "qkv")
    rest = (window(150, 0).layout(300, 300, 128), 0.1, None, None, None)
    got = Engine.forward(q, k, v, *rest)
    want = Engine.forward(*(x.contiguous() for x in (q, k, v)), *rest)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@in_each_form
@pytest.mark.parametrize("dim", run_hopper.HEAD_SIZES)
def test_keys_that_nobody_sees_may_hold_anything(dim: int) -> None:
    q, k, v = make((1, 2, 1, 256, 1024, dim, dim), torch.bfloat16)
    mask = window(199, 0)  # the last 455 keys
    layout = mask.layout(256, 1024, 128)
    want = Engine.forward(q, k, v, layout, 0.1, None, None, None)
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[:, :, : 1024 - 455] = torch.nan
    got = Engine.forward(q, *bad, layout, 0.1, None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_configuration_that_is_tried_is_the_other_kernels(monkeypatch: Any) -> None:
    monkeypatch.setattr(run_hopper, "_here", lambda _: True)
    monkeypatch.setattr(run_hopper, "_fills", lambda _: True)
    monkeypatch.setattr(run_hopper, "interpreted", lambda: False)

    class There:
        """A call whose tensors claim to be on a GPU."""

        def __init__(self, call: Any) -> None:
            self.call = call

        def __getattr__(self, name: str) -> Any:
            return getattr(self.call, name)

        @property
        def query(self) -> Any:
            class Query(torch.Tensor):
                device = torch.device("cuda", 0)

            return self.call.query.as_subclass(Query)

    call: Any = There(describe(*tensors("even", 64), None, 0.1, None, None, None))
    assert run_hopper.takes(call)
    for kernel, taken in ((None, False), ("forward", False), ("decode", True)):
        with Forced(Config(64, 64, 4, 2), kernel):
            assert run_hopper.takes(call) == taken


def forms_of(dim: int, length: int, **layouts: Layout | None) -> dict[str, Any]:
    q, k, v = make((1, 1, 1, length, length, dim, dim), torch.bfloat16)
    calls = {name: describe(q, k, v, x, 0.1, None, None, None) for name, x in layouts.items()}
    return {name: run_hopper.form(c) for name, c in calls.items() if run_hopper.fits(c)}


@pytest.mark.parametrize("dim", run_hopper.HEAD_SIZES)
def test_long_lists_have_more_blocks_on_a_multiprocessor(dim: int) -> None:
    length, tiles = 16_384, torch.zeros(1, 1, 128, 128, dtype=torch.bool)
    some = {
        "none": None,
        "causal": causal().layout(length, length, 128),  # 8,256 keys a row
        "small tiles": window(600, 0).layout(length, length, 64),
        "wide": window(4096, 0).layout(length, length, 128),
        "narrow": window(600, 0).layout(length, length, 128),
        "nothing": Layout.from_tiles(tiles, length, length, 128),
    }
    one, three = FORMS.values()
    found = forms_of(dim, length, **some)
    if dim == 64:
        assert found == {
            "none": three, "causal": three, "small tiles": one, "wide": three, "narrow": one,
            "nothing": one,
        }  # fmt: skip
        assert forms_of(dim, 2048, none=None, causal=causal().layout(2048, 2048, 128)) == {
            "none": one, "causal": one
        }  # fmt: skip
    else:
        assert found == dict.fromkeys(some.keys() - {"small tiles"}, run_hopper.TWO)


@on_hopper
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_every_form_adds_the_same_numbers(mask: str, monkeypatch: Any) -> None:
    q, k, v = tensors("odd", 64)
    layout = MASKS[mask].layout(q.shape[2], k.shape[2], 128)  # type: ignore[union-attr]
    found = []
    for form in FORMS.values():
        monkeypatch.setattr(run_hopper, "form", wanted(form))
        found.append(Engine.forward(q, k, v, layout, 0.1, None, None, None))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@on_hopper
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_a_few_blocks_of_long_lists(mask: str) -> None:
    q, k, v = (x.cuda() for x in make((1, 16, 2, 1024, 6000, 64, 64), torch.bfloat16))
    layout = None if mask == "none" else causal().layout(1024, 6000, 128).to("cuda")
    args = (q, k, v, layout, 0.1, None, None)
    call = describe(*args, None)
    assert run_hopper.takes(call)
    assert run_hopper.form(call) == run_hopper.THREE
    out, lse = triton.forward(*args)
    want, want_lse = attention(
        *(x.float() for x in (q, k, v)), layout=layout, scale=0.1, backend="reference"
    )
    torch.testing.assert_close(out.float(), want, rtol=0, atol=4e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", run_hopper.HEAD_SIZES)
def test_blocks_of_long_lists_come_first(dim: int, monkeypatch: Any) -> None:
    q, k, v = make((2, 4, 2, 2048, 2048, dim, dim), torch.bfloat16)
    layout = Layout.from_dense(uneven(2048), (256, 128))
    call = describe(q, k, v, layout, 0.1, None, None, None)
    rows = run_hopper.form(call).rows
    assert rows == dim
    monkeypatch.setattr(run_hopper, "_descriptor", lambda x, rows: None)
    args = run_hopper.arguments(call, torch.empty_like(q), torch.empty(q.shape[:3]))
    blocks, giants = args["BLOCKS"], args["giants"]
    assert blocks.shape[0] == args["count"] == 2048 // rows
    assert giants == 256 // rows  # those of the tile whose rows see everything
    assert blocks[:giants, 0].ge(1792).all()
    assert blocks[giants:, 0].lt(1792).all()
    assert blocks[:, 0].sort().values.equal(torch.arange(0, 2048, rows).int())


def test_blocks_know_the_first_tile_of_their_list() -> None:
    tiles = torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    tiles[..., 2, :] = tiles[:, -1, -1] = False
    tiles[:, 0, 0, :3] = False
    plan = plan_of(Layout.from_tiles(tiles, 700, 900, 128))
    lists, seen = plan.by_row.tiles.tolist(), 0
    for block in plan.blocks(64).tolist():
        begin, end, first = block[3], block[5], block[8]
        assert first == (lists[begin] if begin < end else 0)
        seen += first > 0
    assert seen >= 3


def test_calls_that_it_leaves_to_the_other_kernel() -> None:
    q, k, v = tensors("even", 64)
    single = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < 0.3

    def fits(*tensors: Tensor, layout: Layout | None = None, **other: Any) -> bool:
        rest = {"softcap": None, "bias": None, "bias_first": None, "scale": 0.1} | other
        return run_hopper.fits(describe(*tensors, layout, **rest))

    assert fits(q, k, v)
    assert fits(q, k, v, layout=causal().layout(512, 512, 128))
    assert fits(q, k, v, layout=causal().layout(512, 512, 64))
    assert not fits(q, k, v, layout=causal().layout(512, 512, 32))
    assert not fits(q, k, v, layout=Layout.from_dense(single, 128))
    assert not fits(q, k, v, layout=(window(80, 0) | sinks(3)).layout(512, 512, 128))
    ends = torch.tensor([[0, 9]], dtype=torch.int32).repeat(512, 1)[None, None]
    assert not fits(q, k, v, layout=replace(every_tile(512, 512, 128, -1), key_range=ends))
    assert not fits(q, k, v, softcap=20.0)
    assert not fits(q, k, v, scale=-0.1)
    assert not fits(q, k, v, bias=torch.zeros(1, 1, 512, 512))
    assert not fits(q[:, :, :100], k, v)
    assert not fits(*(x.float() for x in (q, k, v)))
    assert not fits(q, k, v[..., :32])
    assert not fits(*(x[..., :40] for x in (q, k, v)))
    assert not fits(q, torch.zeros(1, 2, 512, 68, dtype=q.dtype)[..., :64], v)
