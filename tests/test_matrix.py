"""What every pattern of the catalog must do, and that its row's capabilities are true."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate import Context, Layout, attention, blocks, catalog, causal, padding
from foveate.methods import make
from foveate.methods.flux import Routers
from foveate.ops.errors import InputError

# Budgets small enough to leave something out at these lengths; other methods run at their defaults.
SMALL = {
    "sink-window": "sink-window(sinks=2, window=24)",
    "a-shape": "a-shape(sinks=8, local=16)",
    "vertical-slash": "vertical-slash(verticals=32, slashes=50, forced_slashes=48)",
    "block-sparse": "block-sparse(blocks=1)",
    "fna": "fna(window=31)",
    "gna": "gna(window=32, stride=8)",
    "biformer": "biformer(topk=3)",
    "tri-shape": "tri-shape(sinks=8, local=16, bottom=20)",
    "grid": "grid(max_stride=9)",
    "q-boundary": "q-boundary(patterns=['grid(max_stride=9)'])",
    "2d-boundary": "2d-boundary(patterns=[['grid(max_stride=9)']])",
    "flux": "flux(sinks=8, local=32, block=16, route='sparse')",
    "moba": "moba(block=32, topk=2)",
    "dhsa": "dhsa(budget=64, block=32, local=32, sinks=8, instruction=24, chunk=16)",
}
PATTERNS = [row for row in catalog.rows() if row.kind == "pattern"]
BATCH, LENGTH = 2, 403


def patterns(capability: str, works: bool = True) -> pytest.MarkDecorator:
    """All patterns whose row says that this works, or that it doesn't."""
    rows = [r for r in PATTERNS if getattr(r.capabilities, capability).works is works]
    return pytest.mark.parametrize("key", [row.key for row in rows])


def tensors(q_len: int = LENGTH, kv_len: int = LENGTH, dtype=torch.float64) -> tuple[Tensor, ...]:
    shapes = (BATCH, 4, q_len, 16), (BATCH, 2, kv_len, 16), (BATCH, 2, kv_len, 24)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def method(key: str):
    return make(SMALL.get(key, key))


def by_definition(layout: Layout, q: Tensor, k: Tensor, v: Tensor):
    """The reference over what the layout lists, element by element."""
    return attention(q, k, v, blocks(layout.dense(), 1), backend="reference")


@patterns("prefill")
def test_prefill_is_exact_over_its_layout_and_within_the_mask(key):
    q, k, v = tensors()
    ctx = Context(mask=causal())
    layout = method(key).layout(q, k, v, ctx)
    allowed = causal().dense(LENGTH, LENGTH)
    assert not (layout.dense() & ~allowed).any()
    assert layout.dense().any(dim=-1).all()
    result, expected = method(key)(q, k, v, ctx), by_definition(layout, q, k, v)
    torch.testing.assert_close(result.out, expected.out)
    torch.testing.assert_close(result.lse, expected.lse)
    assert result.out.shape == (BATCH, 4, LENGTH, 24)


@pytest.mark.parametrize("key", sorted(SMALL))
def test_small_budgets_leave_something_out(key):
    layout = method(key).layout(*tensors(), Context(mask=causal()))
    assert layout.pairs < 0.9 * causal().pairs(LENGTH, LENGTH)


@patterns("prefill")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(key, dtype):
    q, k, v = tensors(dtype=dtype)
    ctx = Context(mask=causal())
    result = method(key)(q, k, v, ctx)
    layout = method(key).layout(q, k, v, ctx)
    expected = by_definition(layout, q.double(), k.double(), v.double())
    band = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (result.out.dtype, result.lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(result.out.double(), expected.out, atol=band, rtol=band)


@patterns("gqa")
def test_grouped_heads_are_repeated_heads(key):
    q, k, v = tensors()
    ctx = Context(mask=causal())
    grouped = method(key)(q, k, v, ctx)
    repeated = method(key)(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), ctx)
    torch.testing.assert_close(grouped.out, repeated.out)


@patterns("backward")
def test_backward(key):
    q, k, v = (x.requires_grad_() for x in tensors())
    ctx = Context(mask=causal(), phase="train")
    result = method(key)(q, k, v, ctx)
    expected = by_definition(method(key).layout(q, k, v, ctx), q, k, v)
    weight = torch.randn_like(result.out)
    ours = torch.autograd.grad((result.out * weight).sum() + result.lse.sum(), (q, k, v))
    theirs = torch.autograd.grad((expected.out * weight).sum() + expected.lse.sum(), (q, k, v))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@patterns("decode")
@pytest.mark.parametrize("new", [1, 3])
def test_decode(key, new):
    q, k, v = tensors(q_len=new)
    ctx = Context(mask=causal(), phase="decode")
    result = method(key)(q, k, v, ctx)
    if catalog.get(key).capabilities.decode.note.startswith("dense"):
        expected = attention(q, k, v, causal(), backend="reference")
    else:
        expected = by_definition(method(key).layout(q, k, v, ctx), q, k, v)
    torch.testing.assert_close(result.out, expected.out)


@patterns("padding")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_read(key, side):
    pads = torch.tensor([0, 37])
    index = torch.arange(LENGTH)[None]
    if side == "left":
        positions = index - pads[:, None]
        real = positions >= 0
        ctx = Context(
            mask=causal() & padding(LENGTH - pads), q_positions=positions, kv_positions=positions
        )
    else:
        real = index < LENGTH - pads[:, None]
        ctx = Context(mask=causal() & padding(LENGTH - pads))
    q, k, v = tensors()
    noise = torch.randn(3, BATCH, 1, LENGTH, 1, dtype=q.dtype) * ~real[None, :, None, :, None]
    once = method(key)(q, k, v, ctx)
    again = method(key)(q + noise[0], k + noise[1], v + noise[2], ctx)
    rows = real[:, None].expand(BATCH, 4, LENGTH)
    assert once.out[rows].isfinite().all()
    torch.testing.assert_close(again.out[rows], once.out[rows])


@patterns("bidirectional")
def test_bidirectional(key):
    q, k, v = tensors()
    layout = method(key).layout(q, k, v, Context())
    result, expected = method(key)(q, k, v, Context()), by_definition(layout, q, k, v)
    torch.testing.assert_close(result.out, expected.out)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert (layout.dense() & later).any()


@patterns("bidirectional", works=False)
def test_bidirectional_is_refused_where_it_does_not_work(key):
    with pytest.raises(InputError, match="causal"):
        method(key)(*tensors(), Context())


def chooser(key: str):
    """A method that chooses as it does once it was fitted."""
    if key != "flux":
        return method(key)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        routers = Routers((0,), 16)
        routers.by_layer["0"].head[-1].weight.data.normal_()
        routers.by_layer["0"].head[-1].bias.data.zero_()
    return make("flux(sinks=8, local=32, block=16, pool=8)").with_routers(routers)


def choices(key: str, changed: int) -> tuple[Tensor, Tensor]:
    """What the first queries see, before and after the tokens from `changed` on are others."""
    q, k, v = tensors()
    ctx = Context(mask=causal())
    before = chooser(key).layout(q, k, v, ctx).dense()
    q, k, v = (
        torch.cat([x[:, :, :changed], torch.randn_like(x[:, :, changed:])], 2) for x in (q, k, v)
    )
    after = chooser(key).layout(q, k, v, replace(ctx, store={})).dense()
    return before[..., :changed, :], after[..., :changed, :]


@patterns("causal_routing")
def test_choices_do_not_see_later_tokens(key):
    assert torch.equal(*choices(key, changed=LENGTH - 40))


@patterns("causal_routing", works=False)
def test_choices_that_see_later_tokens_are_declared_so(key):
    assert not torch.equal(*choices(key, changed=LENGTH - 60))
