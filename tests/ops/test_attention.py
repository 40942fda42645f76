"""The core op on every backend against attention by its definition in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import attend, by_distance, masks, table

from foveate.ops import (
    Layout,
    RelativeBias,
    alibi,
    alibi_slopes,
    attention,
    available,
    blocks,
    causal,
    cpu,
    explain,
    sinks,
    triton,
    window,
)
from foveate.ops.dispatch import BACKENDS
from foveate.ops.errors import BackendError

# Rounding to the output's dtype, and the sums behind a gradient: half an ulp at 1, a few times.
BAND = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OURS = [  # on the CPU, where Triton's interpreter may stand for a GPU
    name for name in available() if name != "flex" and (name != "triton" or triton.interpreted())
]


@dataclasses.dataclass
class Call:
    """Tensors of one call, with gradients for out and lse."""

    inputs: list[torch.Tensor]
    allowed: torch.Tensor
    options: dict
    grads: tuple[torch.Tensor, torch.Tensor]
    bias: torch.Tensor | None
    first: int | None = None  # of a relative bias, whose table (.., .., 1 or Lq, R) `bias` then is

    @property
    def terms(self):
        """Pairs that an element of the bias is added to, on average."""
        if self.bias is None:
            return 1.0
        q, k = self.inputs[:2]
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] / self.bias.numel()

    def truth(self):
        wide = [x.detach().double().requires_grad_() for x in self.inputs]
        bias = full = None if self.bias is None else self.bias.detach().double().requires_grad_()
        if self.first is not None:
            full = by_distance(bias, self.first, wide[0].shape[2], wide[1].shape[2])
        out, lse = attend(*wide, self.allowed, bias=full, **self.options)
        return self._collect(out, lse, wide, bias)

    def run(self, backend, **how):
        own = [x.detach().clone().requires_grad_() for x in self.inputs]
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        given = bias if self.first is None else RelativeBias(bias, self.first)
        out, lse = attention(*own, bias=given, backend=backend, **self.options, **how)
        assert out.dtype == self.inputs[0].dtype
        assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
        return self._collect(out, lse, own, bias)

    def _collect(self, out, lse, inputs, bias):
        seen = lse > -torch.inf
        loss = (out.double() * self.grads[0]).sum() + (lse.double() * self.grads[1])[seen].sum()
        wanted = inputs if bias is None else [*inputs, bias]
        if not loss.requires_grad:
            return [out, lse]
        grads = torch.autograd.grad(loss, wanted)
        return [x.detach().double() for x in (out, lse, *grads)]


def error(got, want, terms=1.0):
    """Largest difference, each tensor against its own size; empty rows must agree exactly.

    `terms`: of each sum in the last tensor, a bias's gradient. They may cancel, their rounding
    doesn't: it grows with the root of their number.
    """
    worst = 0.0
    least = [1.0] * (len(want) - 1) + [max(1.0, terms**0.5 / 4)]
    for a, b, floor in zip(got, want, least):
        assert a.shape == b.shape
        assert torch.equal(a == -torch.inf, b == -torch.inf)
        gap = (a - b).masked_fill(b == -torch.inf, 0).abs().max().item() if a.numel() else 0.0
        assert gap == gap, "NaN"
        size = b.masked_fill(b == -torch.inf, 0).abs().max().item() if b.numel() else 0.0
        worst = max(worst, gap / max(floor, size))
    return worst


@st.composite
def calls(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    kv_len = draw(st.integers(1, 70))
    q_len = draw(st.sampled_from([1, kv_len, draw(st.integers(1, 70))]))
    mask, predicate = draw(masks(kv_len))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    dim = draw(st.sampled_from([1, 8, 24, 33, 64]))
    value_dim = draw(st.sampled_from([dim, 16, 5]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = kv_heads * group
    shapes = [(2, heads, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, value_dim)]
    inputs = [normal(*s).to(dtype) for s in shapes]
    options = {
        "scale": draw(st.sampled_from([None, 0.0, 0.3])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
        "sink_logits": draw(st.sampled_from([None, normal(heads)])),
    }
    reach = draw(st.integers(1, 80).filter(lambda n: n != kv_len))
    bias_shape = draw(
        st.sampled_from(
            [
                None,
                None,
                (kv_len,),
                (2, 1, 1, kv_len),
                (heads, q_len, kv_len),
                (1, heads, 1, reach),
                (2, heads, q_len, reach),
            ]
        )
    )
    bias = None if bias_shape is None else normal(*bias_shape).to(dtype)
    relative = bias_shape is not None and bias_shape[-1] == reach
    first = draw(st.integers(-70, 5)) if relative else None
    allowed = table(predicate, q_len, kv_len, batch=2)
    grads = (normal(2, heads, q_len, value_dim), normal(2, heads, q_len))
    how = {"mask": mask}
    if draw(st.booleans()):  # several tiles, which a mask of these lengths would not have
        tile = draw(st.sampled_from([8, 16, (8, 32), (32, 8)]))
        how = {"layout": mask.layout(q_len, kv_len, tile)}
    return how, Call(inputs, allowed, options, grads, bias, first)


def supports(backend, call, **how):
    """Whether the backend takes the call (auto's preference for another doesn't count)."""
    if backend == "auto":
        return True
    from foveate.ops.attention import _checked

    asked = {"mask": None, "layout": None, **how}
    o = call.options
    q, k, v = (x.detach().requires_grad_() for x in call.inputs)
    bias = call.bias if call.first is None else RelativeBias(call.bias, call.first)
    inputs = _checked(
        q, k, v, asked["mask"], asked["layout"], o["scale"], o["softcap"], None, bias, 0.0
    )
    return not BACKENDS[backend].not_supported_reasons(inputs)


@pytest.mark.parametrize("backend", ["auto", *OURS])
@settings(max_examples=60, deadline=None)
@given(drawn=calls())
def test_every_output_and_gradient(backend, drawn):
    how, call = drawn
    if not supports(backend, call, **how):
        with pytest.raises(BackendError, match="can't run this call"):
            call.run(backend, **how)
        return
    dtype = call.inputs[0].dtype
    assert error(call.run(backend, **how), call.truth(), call.terms) < BAND[dtype]


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("mask", [None, causal()], ids=["dense", "causal"])
def test_a_scale_of_zero_averages_what_is_seen(backend, mask):
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(1, 2, 20, 8, generator=generator) for _ in range(3)]
    allowed = (mask or window(-1, -1)).dense(20, 20)
    grads = (torch.randn(1, 2, 20, 8, generator=generator).double(), torch.zeros(1, 2, 20).double())
    call = Call(inputs, allowed, {"scale": 0.0}, grads, None)
    assert error(call.run(backend, mask=mask), call.truth()) < BAND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [b for b in OURS if b not in ("sdpa", "reference")])
@pytest.mark.parametrize("mask", [None, causal()], ids=["dense", "causal"])
def test_error_is_at_most_twice_that_of_sdpa(backend, dtype, mask):
    """DESIGN section 7's rule, where torch's kernel can run: long rows, one common head size."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 4, 384, 64), (1, 2, 384, 64), (1, 2, 384, 64)]
    inputs = [torch.randn(*s, generator=generator).to(dtype) for s in shapes]
    allowed = (mask or window(-1, -1)).dense(384, 384)
    grads = (
        torch.randn(1, 4, 384, 64, generator=generator).double(),
        torch.zeros(1, 4, 384).double(),
    )
    call = Call(inputs, allowed, {}, grads, None)
    truth = call.truth()
    ours, theirs = call.run(backend, mask=mask), call.run("sdpa", mask=mask)
    band = torch.finfo(dtype).eps / 4  # half of what rounding to the dtype may add
    for mine, other, exact in zip(ours, theirs, truth):
        size = exact.abs().max()
        own, rival = (mine - exact).abs().max() / size, (other - exact).abs().max() / size
        assert own <= 2 * rival + band


def selections(draw, heads):
    """A layout with tiles and single keys of every head's own, and its dense form."""
    q_len, kv_len = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    q_len = min(q_len, kv_len)
    q_tile, kv_tile = draw(st.sampled_from([(8, 8), (16, 8), (8, 32), (64, 64)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tq, tk = -(-q_len // q_tile), -(-kv_len // kv_tile)
    groups = draw(st.sampled_from([1, heads]))
    share = draw(st.sampled_from([0.1, 0.5]))
    tiles = torch.rand(2, groups, tq, tk, generator=generator) < share
    keys = torch.rand(1, groups, tq, kv_len, generator=generator) < share
    within = draw(st.sampled_from([None, causal(), causal() & (window(9, 0) | sinks(2))]))
    layout = Layout.from_selection(tiles, keys, q_len, kv_len, (q_tile, kv_tile), within)
    chosen = tiles.repeat_interleave(kv_tile, 3)[..., :kv_len] | keys
    want = chosen.repeat_interleave(q_tile, 2)[:, :, :q_len]
    if within is not None:
        want = want & within.dense(q_len, kv_len)
    return layout, want, generator


@st.composite
def gathered(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 3)]))
    heads = kv_heads * group
    layout, want, generator = selections(draw, heads)
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q_len, kv_len = layout.q_len, layout.kv_len
    shapes = [(2, heads, q_len, 16), (2, kv_heads, kv_len, 16), (2, kv_heads, kv_len, 16)]
    inputs = [normal(*s).to(dtype) for s in shapes]
    grads = (normal(2, heads, q_len, 16), normal(2, heads, q_len))
    options = {"scale": None, "softcap": None, "sink_logits": None}
    return layout, want, Call(inputs, want.expand(2, heads, -1, -1), options, grads, None)


@pytest.mark.parametrize("backend", OURS)
@settings(max_examples=40, deadline=None)
@given(drawn=gathered())
def test_layouts_of_tiles_and_single_keys(backend, drawn):
    layout, want, call = drawn
    assert torch.equal(layout.dense(), want.expand_as(layout.dense()))
    assert torch.equal(layout.pairs_by_group(), layout.dense().sum((2, 3)))
    if supports(backend, call, layout=layout):
        dtype = call.inputs[0].dtype
        assert error(call.run(backend, layout=layout), call.truth()) < BAND[dtype]


def _gathering(q_len, kv_len, generator):
    """Queries in a random order, each in two tiles with different keys; keys in a random order."""
    tiles = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    tiles[..., 0, :2] = True
    tiles[..., 1, 2:] = True
    base = Layout.from_tiles(tiles, 160, kv_len, (80, 32))
    order = [torch.randperm(q_len, generator=generator) for _ in range(2)]
    empty = torch.full((80 - q_len,), -1)
    q_index = torch.cat([order[0], empty, order[1], empty])[None, None].int()
    k_index = torch.stack([torch.randperm(kv_len, generator=generator) for _ in range(2)])[:, None]
    return _per_entry(dataclasses.replace(base, q_len=q_len, q_index=q_index), k_index.int())


def _per_entry(layout, kv_index):
    """The same lists for two batch entries, each with keys in an order of its own."""
    return dataclasses.replace(
        layout,
        ptr=torch.cat((layout.ptr, layout.ptr + layout.cols.numel())),
        cols=layout.cols.repeat(2),
        kinds=layout.kinds.repeat(2),
        kv_index=kv_index,
        _counts=[],
    )


@pytest.mark.parametrize("backend", [b for b in OURS if b != "sdpa"])
def test_gathered_rows_are_merged_by_lse(backend):
    generator = torch.Generator().manual_seed(1)
    layout = _gathering(70, 120, generator)
    shapes = [(2, 4, 70, 16), (2, 2, 120, 16), (2, 2, 120, 16)]
    inputs = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    grads = (torch.randn(2, 4, 70, 16).double(), torch.randn(2, 4, 70).double())
    call = Call(inputs, torch.ones(2, 4, 70, 120).bool(), {"scale": None}, grads, None)
    call.options = {"scale": None, "softcap": None, "sink_logits": None}
    assert bool(layout.dense().all())
    if supports(backend, call, layout=layout):
        assert error(call.run(backend, layout=layout), call.truth()) < 1e-11
    inputs32 = dataclasses.replace(call, inputs=[x.float() for x in call.inputs])
    assert error(inputs32.run(backend, layout=layout), call.truth()) < 4e-6


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", ["key_range", "row_range"])
def test_ranges(backend, kind):
    base = window(-1, -1).layout(50, 60, (16, 8))
    lo = torch.randint(0, 30, (2, 1, 50 if kind == "key_range" else 60))
    spans = torch.stack((lo, lo + torch.randint(0, 30, lo.shape)), -1).int()
    code = {"key_range": -1, "row_range": -2}[kind]
    kinds = torch.where(base.cols % 2 == 0, code, 0).int()
    layout = dataclasses.replace(base, kinds=kinds, **{kind: spans})
    # Ranges that differ by batch entry need lists that do.
    twice = [layout.ptr, layout.ptr + layout.cols.numel()]
    layout = dataclasses.replace(
        layout, ptr=torch.cat(twice), cols=layout.cols.repeat(2), kinds=layout.kinds.repeat(2)
    )
    i, j = torch.arange(50)[:, None], torch.arange(60)[None, :]
    at, other = (i, j) if kind == "key_range" else (j, i)
    inside = (other >= spans[:, 0, :, 0][:, at]) & (other < spans[:, 0, :, 1][:, at])
    want = inside.reshape(2, 1, 50, 60) | (j // 8 % 2 == 1)
    assert torch.equal(layout.dense(), want)
    inputs = [torch.randn(2, 2, n, 16) for n in (50, 60, 60)]
    grads = (torch.randn(2, 2, 50, 16).double(), torch.randn(2, 2, 50).double())
    options = {"scale": None, "softcap": None, "sink_logits": None}
    call = Call(inputs, want, options, grads, None)
    if supports(backend, call, layout=layout):
        assert error(call.run(backend, layout=layout), call.truth()) < 4e-6


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", ["key_range", "row_range"])
def test_ranges_over_single_keys(backend, kind):
    """Ranges speak of virtual keys: in a tile of single keys, of those that it lists."""
    listed = torch.tensor([[3, 50, 17, 44, 29, 8, 59, -1], [58, 0, 31, 12, 46, 21, -1, -1]])
    first = torch.arange(32) if kind == "key_range" else torch.arange(60) // 3
    spans = torch.stack((first, first + (25 if kind == "key_range" else 12)), -1)
    layout = Layout(
        q_len=32,
        kv_len=60,
        q_tile=16,
        kv_tile=8,
        ptr=torch.tensor([[[0, 1, 2]]]),
        cols=torch.tensor([8, 9], dtype=torch.int32),  # after the 8 tiles of 60 keys
        kinds=torch.full((2,), {"key_range": -1, "row_range": -2}[kind], dtype=torch.int32),
        bits=torch.zeros(0, 8, 2, dtype=torch.uint8),
        gathered=listed.int(),
        **{kind: spans[None, None].int()},
    )
    want = torch.zeros(1, 1, 32, 60, dtype=torch.bool)
    for i in range(32):
        for j in listed[i // 16].tolist():
            inside = i <= j < i + 25 if kind == "key_range" else j // 3 <= i < j // 3 + 12
            want[0, 0, i, j] |= j >= 0 and inside
    assert torch.equal(layout.checked().dense(), want)
    assert layout.pairs == want.sum()
    inputs = [torch.randn(1, 2, n, 16) for n in (32, 60, 60)]
    grads = (torch.randn(1, 2, 32, 16).double(), torch.randn(1, 2, 32).double())
    options = {"scale": None, "softcap": None, "sink_logits": None}
    call = Call(inputs, want.expand(1, 2, -1, -1), options, grads, None)
    if supports(backend, call, layout=layout):
        assert error(call.run(backend, layout=layout), call.truth()) < 4e-6


@pytest.mark.parametrize("backend", OURS)
def test_no_key_and_no_query(backend):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    if backend == "sdpa":
        with pytest.raises(BackendError, match="size 0"):
            attention(q, k, k, backend=backend)
        return
    out, lse = attention(q, k, k, backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert attention(k, q, q, backend=backend).out.shape == (1, 2, 0, 8)


@pytest.mark.parametrize("backend", [b for b in OURS if b not in ("sdpa", "reference")])
def test_unvisited_tiles_are_not_read(backend):
    """Keys of tiles that the layout doesn't list are NaN, and nothing of them comes through."""
    layout = (causal() & (window(31, 0) | sinks(8))).layout(128, 512, 64)
    visited = torch.zeros(512, dtype=torch.bool)
    for col in layout.cols.tolist():
        visited[col * 64 : (col + 1) * 64] = True
    assert 0 < visited.sum() < 512
    q, k, v = (torch.randn(1, 2, n, 16) for n in (128, 512, 512))
    k[:, :, ~visited], v[:, :, ~visited] = torch.nan, torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = attention(q, k, v, layout=layout, backend=backend)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, lse, *grads))


def test_auto_prefers_what_explain_says():
    q = torch.randn(1, 2, 64, 16)
    story = explain(q, q, q, causal() & window(7, 0))
    assert story.backend in available()
    assert set(story.reasons) == set(available())
    assert story.reasons[story.backend] == []
    assert all(reasons for name, reasons in story.reasons.items() if name != story.backend)
    assert str(story).startswith(f"{story.backend} runs this call.")


def test_bool_tensor_is_a_mask_and_dropout_drops():
    q = torch.randn(1, 2, 40, 16)
    seen = torch.rand(40, 40) > 0.5
    torch.testing.assert_close(attention(q, q, q, seen), attention(q, q, q, blocks(seen, 1)))
    plain, dropped = attention(q, q, q), attention(q, q, q, dropout=0.5)
    torch.testing.assert_close(plain.lse, dropped.lse)
    assert not torch.allclose(plain.out, dropped.out)
    mean = torch.stack([attention(q, q, q, dropout=0.5).out for _ in range(400)]).mean(0)
    assert (mean - plain.out).abs().max() < 0.5 * (dropped.out - plain.out).abs().max()


@pytest.mark.parametrize("backend", ["auto", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 16])
def test_the_lse_of_long_rows_does_not_drift(backend, dtype, heads):
    """A rescaling that is off by 1e-7 at each step shows after a thousand steps."""
    q, k, v = (torch.randn(1, h, n, 32).to(dtype) for h, n in ((heads, 1), (1, 65536), (1, 65536)))
    lse = attention(q, k, v, backend=backend).lse
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double().expand(1, heads, -1, -1))
    want = torch.logsumexp(scores * 32**-0.5, -1)
    assert (lse.double() - want).abs().max() < 3e-6


def test_two_layouts_with_lists_in_common_keep_their_own_gradients():
    q, k, v = (torch.randn(1, 1, 128, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    first = causal().layout(128, 128)
    second = dataclasses.replace(first, kinds=torch.zeros_like(first.kinds), _counts=[])
    outs = [attention(q, k, v, layout=x, backend="blocks").out for x in (first, second)]
    wants = [attention(q, k, v, layout=x, backend="reference").out for x in (first, second)]
    for out, want in zip(outs, wants):
        got, right = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, want))
        torch.testing.assert_close(got, right, atol=1e-11, rtol=1e-11)


def test_what_inference_left_in_the_cache_serves_training():
    q = torch.randn(1, 1, 37, 16)
    mask = causal() & window(11, 0)
    with torch.inference_mode():
        attention(q, q, q, layout=mask.layout(37, 37, 8))
    q.requires_grad_()
    attention(q, q, q, layout=mask.layout(37, 37, 8)).out.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_empty_rows_with_a_sink_that_is_off():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    b = torch.tensor([-torch.inf, 0.5], requires_grad=True)
    out, lse = attention(q, q, q, torch.zeros(4, 4).bool(), sink_logits=b)
    assert not out.any()
    assert lse.tolist() == [[[-torch.inf] * 4, [0.5] * 4]]
    grads = torch.autograd.grad(out.sum() + lse[:, 1].sum(), (q, b))
    assert grads[1].tolist() == [0.0, 4.0]
    assert all(torch.isfinite(g).all() for g in grads)


def test_one_causal_query_is_dense_and_needs_no_tile_of_128():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 300, 8)
    assert explain(q, k, k, causal(), backend="sdpa").backend == "sdpa"
    torch.testing.assert_close(attention(q, k, k, causal()), attention(q, k, k))


def test_a_default_device_changes_nothing():
    q = torch.randn(1, 2, 40, 8)
    mask = causal() & (window(9, 0) | sinks(2))
    want = attention(q, q, q, mask)
    with torch.device("meta"):
        torch.testing.assert_close(attention(q, q, q, mask & window(39, 0)), want)
        assert mask.layout(41, 41).device.type == "cpu"


def test_alibi_is_its_paper():
    """Press et al.: slopes 2^-1 .. 2^-8 for 8 heads, of 12 heads the rest between; -m |i - j|."""
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    more = alibi_slopes(12)
    assert more[:8].tolist() == [2.0**-k for k in range(1, 9)]
    torch.testing.assert_close(more[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    q, k, v = (torch.randn(1, 4, n, 16) for n in (20, 33, 33))
    slopes = alibi_slopes(4)
    distance = (torch.arange(13, 33)[:, None] - torch.arange(33)).abs()
    want = attend(q, k, v, causal().dense(20, 33), bias=-slopes[:, None, None] * distance)
    for backend in ("cpu", "blocks", "reference"):
        if backend != "cpu" or cpu.available():
            got = attention(q, k, v, causal(), bias=alibi(slopes, 32), backend=backend)
            assert error([x.double() for x in got], want) < BAND[torch.float32]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_relative_bias_with_threads_and_many_tiles(heads, rows, threads):
    """Its gradient sums over every pair at a distance, whichever thread meets it."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 4, 300, 24), (2, 2, 300, 24), (2, 2, 300, 24)]
    inputs = [torch.randn(*s, generator=generator) for s in shapes]
    table_ = torch.randn(1, heads, rows, 90, generator=generator)
    grads = (
        torch.randn(2, 4, 300, 24, generator=generator).double(),
        torch.randn(2, 4, 300, generator=generator).double(),
    )
    call = Call(inputs, causal().dense(300, 300), {}, grads, table_, -80)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [call.run("auto", mask=causal()) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert error(runs[0], call.truth()) < BAND[torch.float32]
    if cpu.available():
        assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_alibi_in_half_precision_tells_all_distances_apart(dtype):
    table_ = alibi(torch.tensor([0.5, 0.0], dtype=dtype), 70_000).table
    assert torch.isfinite(table_).all()
    assert len(table_[0].unique()) == 70_001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_value_stays_infinite(dtype):
    """Few rows read values by pairs of keys: the last of an odd number stands alone."""
    q, k, v = (torch.randn(1, 2, n, 40).to(dtype) for n in (1, 3, 3))
    v[0, 0, 2, 5] = torch.inf
    want = attention(q, k, v, backend="reference").out
    assert torch.equal(attention(q, k, v).out.isinf(), want.isinf())
    assert not attention(q, k, v).out.isnan().any()


def test_long_rows_of_a_decoding_step_add_up_no_rounding():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 64, generator=generator) for h, n in ((8, 1), (1, 70_000), (1, 70_000))
    )
    exact = attend(q, k, v, torch.ones(1, 1, 1, 70_000, dtype=torch.bool))
    rows = q.transpose(1, 2)
    theirs = torch.nn.functional.scaled_dot_product_attention(rows, k, v).transpose(1, 2)
    ours = attention(q, k, v)
    limit = 2 * (theirs - exact[0]).abs().max() + 4e-7 * exact[0].abs().max()
    assert (ours.out - exact[0]).abs().max() <= limit


@pytest.mark.parametrize("backend", ["auto", "reference", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_keys_and_values_of_8_bits_beside_wider_queries(dtype, backend):
    query = torch.randn(1, 4, 30, 16, requires_grad=True)
    key, value = (torch.randn(1, 2, 40, 16).to(dtype) for _ in "kv")
    plain = attention(query.detach(), key, value, causal(), backend=backend)
    wide = [x.detach().float() for x in (key, value)]
    found = attention(query, key, value, causal(), backend=backend)
    want = attention(query, *wide, causal(), backend="reference")
    torch.testing.assert_close(found.out, want.out)
    torch.testing.assert_close(found.lse, want.lse)
    torch.testing.assert_close(plain.out, want.out.detach())
    grads = [torch.autograd.grad(x.out.sum(), query)[0] for x in (found, want)]
    torch.testing.assert_close(*grads)
