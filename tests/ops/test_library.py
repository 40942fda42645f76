"""The operator under torch.compile, opcheck and autograd's own checks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from foveate.ops import Layout, alibi, attention, causal, library, padding, sinks, window

pytestmark = pytest.mark.plain_empty
MASK = causal() & (window(20, 0) | sinks(2))

FIRST_CALL = """
import torch, foveate
from foveate.ops import attention, causal, sinks, window

@torch.compile(fullgraph=True, backend="aot_eager")
def step(q, k, v, b):
    mask = causal() & (window(20, 0) | sinks(2))
    return attention(q, k, v, mask, sink_logits=b, softcap=5.0)

q, k, v = (torch.randn(2, h, 40, 16, requires_grad=True) for h in (4, 2, 2))
b = torch.randn(4, requires_grad=True)
got = step(q, k, v, b)
want = attention(q, k, v, causal() & (window(20, 0) | sinks(2)), sink_logits=b, softcap=5.0,
                 backend="reference")
for x, y in zip(got, want):
    torch.testing.assert_close(x, y)
grads = [torch.autograd.grad((o.sin().sum() + l.sum()), (q, k, v, b)) for o, l in (got, want)]
for x, y in zip(*grads):
    torch.testing.assert_close(x, y)
print("same")
"""


def test_the_first_call_of_a_process_may_be_compiled():
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]


def _tensors(q_len=40, kv_len=40):
    return [torch.randn(2, h, n, 16) for h, n in ((4, q_len), (2, kv_len), (2, kv_len))]


def test_masks_and_layouts_come_into_a_compiled_function():
    layout = Layout.from_tiles(torch.rand(1, 4, 5, 5) > 0.5, 40, 40, 8, causal())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v, mask, layout):
        return attention(q, k, v, mask, layout=layout)

    call = _tensors()
    for mask, one in ((MASK, None), (padding([40, 3]), None), (None, layout), (None, None)):
        want = attention(*call, mask, layout=one, backend="reference")
        torch.testing.assert_close(run(*call, mask, one), want)


def test_shapes_may_be_dynamic():
    run = torch.compile(
        lambda q, k, v: attention(q, k, v, MASK), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for lengths in ((40, 40), (7, 50), (33, 61)):
        call = _tensors(*lengths)
        torch.testing.assert_close(run(*call), attention(*call, MASK, backend="reference"))


@pytest.mark.parametrize("kind", ["no bias", "per key", "relative"])
@pytest.mark.parametrize("form", ["mask", "layout", "dense"])
def test_opcheck(form, kind):
    mask = MASK if form == "mask" else None
    layout = MASK.layout(40, 40, 8) if form == "layout" else None
    call = [x.requires_grad_() for x in _tensors()]
    size = 13 if kind == "relative" else 40
    bias = None if kind == "no bias" else torch.randn(1, 1, 1, size, requires_grad=True)
    packed = library.pack(mask, layout)
    args = (*call, bias, *packed, 0.25, None, -30 if kind == "relative" else None, "auto")
    torch.library.opcheck(torch.ops.foveate.attention.default, args)
    with torch.no_grad():
        out, lse = torch.ops.foveate.attention(*args)
    plain = (*(x.detach() for x in call), None if bias is None else bias.detach(), *args[4:])
    torch.library.opcheck(
        torch.ops.foveate.attention_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), out, lse, *plain),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_gradcheck_through_out_and_lse():
    q, k, v = (
        torch.randn(1, h, n, 3, dtype=torch.float64, requires_grad=True)
        for h, n in ((2, 5), (1, 7), (1, 7))
    )
    bias = torch.randn(1, 1, 1, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, bias, b):
        return attention(q, k, v, causal(), bias=bias, sink_logits=b, softcap=3.0, backend="blocks")

    assert torch.autograd.gradcheck(run, (q, k, v, bias, b))


def test_second_derivatives_need_the_reference():
    q, k, v = (torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(
        lambda *x: attention(*x, causal(), backend="reference").out, (q, k, v)
    )
    out = attention(q, k, v, causal(), backend="blocks").out
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


def test_no_graph_is_kept_without_gradients():
    q, k, v = _tensors()
    assert attention(q, k, v).out.grad_fn is None
    with torch.no_grad():
        assert attention(q.requires_grad_(), k, v).out.grad_fn is None
    assert attention(q, k, v).out.grad_fn is not None


def test_a_relative_bias_compiles_and_its_first_distance_may_follow_the_length():
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def run(q, k, v):
        return attention(q, k, v, MASK, bias=alibi(slopes, k.shape[2] - 1))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (
        (40, 40),
        (7, 50),
        (33, 61),
        (12, 62),
        (12, 63),
        (12, 64),
        (12, 65),
        (12, 66),
        (12, 67),
    ):
        call = _tensors(*lengths)
        torch.testing.assert_close(compiled(*call), run(*call))
