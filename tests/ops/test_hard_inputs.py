"""Inputs that nobody means to give: empty in any axis, NaN, infinite, strided, far too long."""

import itertools

import pytest
import torch

from foveate import Layout, attention, blocks, causal, documents, sinks, window
from foveate.ops.errors import InputError

BACKENDS = ("auto", "reference", "blocks", "cpu")
MASKS = {
    "none": lambda: None,
    "causal": causal,
    "window and sinks": lambda: causal() & (window(2, 0) | sinks(1)),
}
EMPTY = {  # batch, query heads, key heads, queries, keys, D, Dv
    "batch": (0, 2, 1, 5, 5, 16, 16),
    "queries": (2, 2, 1, 0, 5, 16, 16),
    "keys": (2, 2, 1, 5, 0, 16, 16),
    "tokens": (1, 2, 1, 0, 0, 16, 16),
    "values": (1, 2, 1, 5, 5, 16, 0),
}


def tensors(batch, hq, hkv, lq, lkv, d, dv, grad=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, hq, lq, d), (batch, hkv, lkv, d), (batch, hkv, lkv, dv)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("what", EMPTY)
def test_an_empty_axis_gives_empty_or_zero_outputs_and_gradients(what, mask, backend):
    q, k, v = tensors(*EMPTY[what])
    out, lse = attention(q, k, v, MASKS[mask](), backend=backend)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert lse.shape == q.shape[:3]
    if what == "keys":
        assert not out.any()
        assert (lse == -torch.inf).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.shape == x.shape
        assert torch.isfinite(x.grad).all()


def test_heads_of_no_numbers_need_a_scale():
    q, k, v = tensors(1, 1, 1, 5, 5, 0, 4)
    with pytest.raises(InputError, match=r"size 0 have no default scale; give one"):
        attention(q, k, v)
    want = v.mean(2, keepdim=True).expand(-1, -1, 5, -1)  # all scores are 0
    torch.testing.assert_close(attention(q, k, v, scale=1.0, backend="reference").out, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_in_the_rows_that_see_it(dtype, where, value, backend):
    """Row 40 or key 40, under a causal window of 9 keys: rows 40 to 48 may see it."""
    q, k, v = tensors(2, 4, 2, 70, 70, 16, 16, grad=False, dtype=dtype)
    mask = causal() & window(8, 0)
    want = attention(q, k, v, mask, backend=backend).out
    bad = {"query": q, "key": k, "value": v}[where]
    bad[1, -1, 40, 3] = value
    got = attention(q, k, v, mask, backend=backend).out
    rows = slice(40, 41) if where == "query" else slice(40, 49)
    heads = slice(3, 4) if where == "query" else slice(2, 4)
    clean = torch.ones_like(want, dtype=torch.bool)
    clean[1, heads, rows] = False
    if where == "value":  # a weight of 0 times NaN is NaN, as in torch's own: other heads stay
        clean[1, heads] = False
    assert torch.equal(got[clean], want[clean])
    if where == "value" or value is torch.nan:
        assert not torch.isfinite(got[1, heads, rows][..., 3]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_bits(dtype, backend):
    """Axes in any order in memory, every second number, and one head expanded over all."""
    q, k, v = tensors(2, 4, 2, 33, 41, 24, 20, dtype=dtype)
    mask = blocks(torch.rand(3, 3, generator=torch.Generator().manual_seed(1)) < 0.7, 16)
    want = attention(q, k, v, mask, backend=backend)
    want.out.sum().backward()
    right = [x.grad.clone() for x in (q, k, v)]
    for order in itertools.islice(itertools.permutations(range(4)), 1, None, 5):
        back = [order.index(i) for i in range(4)]
        moved = [x.detach().permute(order).contiguous().permute(back) for x in (q, k, v)]
        for x in moved:
            x.requires_grad_()
        got = attention(*moved, mask, backend=backend)
        assert torch.equal(got.out, want.out)
        got.out.sum().backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(moved, right))
    apart = [torch.stack((x.detach(), x.detach() + 1), -1)[..., 0] for x in (q, k, v)]
    assert all(x.stride(-1) == 2 for x in apart)
    assert torch.equal(attention(*apart, mask, backend=backend).out, want.out)
    wide = k.detach()[:, :1].expand(-1, 2, -1, -1), v.detach()[:, :1].expand(-1, 2, -1, -1)
    whole = [x.contiguous() for x in wide]
    assert torch.equal(
        attention(q, *wide, mask, backend=backend).out,
        attention(q, *whole, mask, backend=backend).out,
    )


def test_counts_beyond_32_bits():
    """Pairs at a length whose square needs 64 bits."""
    n = 100_003
    assert causal().pairs(n, n) == n * (n + 1) // 2
    assert (causal() & window(1023, 0)).pairs(n, n) == 1024 * n - 1024 * 1023 // 2
    assert sinks(4).pairs(n, n) == 4 * n


def test_packed_documents_of_many_lengths_are_their_own_sequences():
    """Documents of 0, 1 and many tokens side by side, against each alone."""
    ends = torch.tensor([0, 0, 1, 1, 18, 50, 50])
    q, k, v = tensors(1, 2, 1, 50, 50, 16, 16, grad=False)
    got = attention(q, k, v, causal() & documents(ends)).out
    for low, high in itertools.pairwise(ends.tolist()):
        part = [x[:, :, low:high] for x in (q, k, v)]
        torch.testing.assert_close(got[:, :, low:high], attention(*part, causal()).out)


@pytest.mark.plain_empty
@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("backend", ["cpu", "blocks"])
def test_offsets_beyond_32_bits(backend, q_len):
    """Few tiles of a cache of 2^31 numbers; its other pages are never touched, so never had."""
    length, dim, tile = 2**25, 72, 64
    try:
        k, v = (torch.empty(1, 1, length, dim, dtype=torch.bfloat16) for _ in range(2))
    except RuntimeError:
        pytest.skip("2 x 5 GB can't be reserved here")
    seen = [0, length // tile // 2, length // tile - 1]
    rows = torch.cat([torch.arange(t * tile, (t + 1) * tile) for t in seen])
    for x in (k, v):
        x[:, :, rows] = torch.randn(1, 1, len(rows), dim).to(x.dtype)
    q = torch.randn(1, 2, q_len, dim).to(k.dtype)
    layout = Layout(
        q_len, length, tile, tile, torch.tensor([[[0, 3]]]),
        torch.tensor(seen, dtype=torch.int32), torch.zeros(3, dtype=torch.int32),
        torch.zeros(0, tile, tile // 8, dtype=torch.uint8),
    )  # fmt: skip
    found = attention(q, k, v, layout=layout, backend=backend)
    want = attention(q, k[:, :, rows], v[:, :, rows], backend=backend)
    torch.testing.assert_close(found.out, want.out)
    torch.testing.assert_close(found.lse, want.lse)


def test_pairs_are_counted_at_any_length(monkeypatch):
    from foveate.ops.layout import build

    tiles, made = [], build.layout_of_mask

    def watched(mask, q_len, kv_len, tile, *more):
        tiles.append(tile)
        return made(mask, q_len, kv_len, tile, *more)

    monkeypatch.setattr(build, "layout_of_mask", watched)
    for n in (77, 2**19 + 5, 2**20 + 5):
        assert (causal() & window(99, 0)).pairs(n, n) == sum(min(i + 1, 100) for i in range(n))
    assert causal().pairs(3, 2**20 + 5) == 3 * (2**20 + 4)
    assert tiles == [64, 128, 256, 256]
