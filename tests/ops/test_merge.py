"""merge over disjoint keys equals attention over all of them; mix is a weighted sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.ops import AttentionOutput, attention, blocks, merge, mix
from foveate.ops.errors import InputError


@st.composite
def partitions(draw):
    """Keys dealt out to parts at random, some rows blind, and a random bracketing."""
    q_len, kv_len, parts = (draw(st.integers(1, n)) for n in (9, 30, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    owner = torch.randint(0, parts, (q_len, kv_len), generator=generator)
    seen = torch.rand(q_len, kv_len, generator=generator) > draw(st.sampled_from([0.1, 0.9]))
    masks = [(owner == p) & seen for p in range(parts)]
    shapes = [(2, 4, q_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 8)]
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return masks, seen, tensors, draw(st.integers(1, parts))


def _grads(run, tensors):
    own = [x.clone().requires_grad_() for x in tensors]
    out, lse = run(own)
    seen = lse > -torch.inf
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    loss = (out * weight).sum() + (lse[seen] * torch.arange(int(seen.sum()))).sum()
    return [out, lse, *torch.autograd.grad(loss, own, materialize_grads=True)]


@settings(max_examples=60, deadline=None)
@given(partitions())
def test_parts_make_the_whole_with_all_gradients(case):
    masks, seen, tensors, first = case

    def whole(x):
        return attention(*x, blocks(seen, 1), backend="reference")

    def streamed(x):
        parts = [attention(*x, blocks(m, 1), backend="blocks") for m in masks]
        head = merge(parts[:first])
        return merge([head, *reversed(parts[first:])])

    for got, want in zip(_grads(streamed, tensors), _grads(whole, tensors)):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_a_part_may_cover_some_rows():
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (10, 12, 12))
    rows = torch.tensor([7, 2, 9])
    seen = torch.zeros(10, 12, dtype=torch.bool)
    seen[:, :6] = True
    seen[rows, 6:] = True
    base = attention(q, k[:, :, :6], v[:, :, :6])
    extra = attention(q[:, :, rows], k[:, :, 6:], v[:, :, 6:])
    got = merge([base, extra], rows=[None, rows])
    torch.testing.assert_close(got, attention(q, k, v, seen), atol=1e-12, rtol=1e-12)


def test_an_empty_part_is_neutral_and_all_empty_is_zero():
    q = torch.randn(1, 2, 5, 8)
    part = attention(q, q, q)
    blind = attention(q, q[:, :, :0], q[:, :, :0])
    torch.testing.assert_close(merge([part, blind]), part)
    torch.testing.assert_close(merge([blind, part]), part)
    out, lse = merge([blind, blind])
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_mix_weighs_and_differentiates():
    outs = [torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.rand(3, 1, 2, 5, dtype=torch.float64, requires_grad=True)
    want = sum(weights[i][..., None] * outs[i] for i in range(3))
    torch.testing.assert_close(mix(weights, outs), want)
    wide = [torch.full((1, 2, 5, 8), float(i)) for i in range(3)]
    torch.testing.assert_close(mix(wide, outs), outs[1] + 2 * outs[2])
    assert torch.autograd.gradcheck(lambda w, *o: mix(w, o), (weights, *outs))


def test_bad_parts_are_refused():
    one = AttentionOutput(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5))
    two = AttentionOutput(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4))
    with pytest.raises(InputError, match="at least one"):
        merge([])
    with pytest.raises(InputError, match="same queries"):
        merge([one, two])
    with pytest.raises(InputError, match="first part must cover all"):
        merge([one, two], rows=[None, torch.tensor([0, 1])])
    with pytest.raises(InputError, match="2 weights for 1 outputs"):
        mix([torch.ones(1), torch.ones(1)], [one.out])
    with pytest.raises(InputError, match="differ in shape"):
        mix([torch.ones(1), torch.ones(1)], [one.out, two.out])
