"""MoBA: the spec's oracles by their number, documents, padding, and decoding with kept means."""

from dataclasses import replace

import pytest
import torch

from foveate import Context, attention, blocks, causal, documents, padding, window
from foveate.methods.moba import MoBA
from foveate.nn import Attention
from foveate.ops.errors import InputError
from foveate.parts.block_rows import Blocks, rows_by_block


def qkv(length, dtype=torch.float64, batch=2, q_len=None):
    shapes = (batch, 4, q_len or length, 16), (batch, 2, length, 16), (batch, 2, length, 24)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def naive(q, k, block, topk, start=0):
    """The rule word by word: own = +inf, future = -inf, top-k; bool (B, H, Lq, Lkv)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    length, count = k.shape[2], -(-k.shape[2] // block)
    seen = torch.zeros(*q.shape[:3], length, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            means = torch.stack([part.mean(0) for part in k[b, h].split(block)])
            for i in range(q.shape[2]):
                at = start + i
                g = means @ q[b, h, i]
                g[at // block + 1 :] = -torch.inf
                g[at // block] = torch.inf
                for c in g.topk(min(topk, count)).indices.tolist():
                    if g[c] > -torch.inf:
                        seen[b, h, i, c * block : (c + 1) * block] = True
                seen[b, h, i, at + 1 :] = False
    return seen


def dense(q, k, v, seen):
    return attention(q, k, v, blocks(seen, 1), backend="reference")


CAUSAL = Context(mask=causal())


@pytest.mark.parametrize(("block", "topk"), [(8, 5), (8, 9), (37, 1), (64, 1), (5, 8)])
def test_oracle_1_all_blocks_or_one_block_are_causal_attention(block, topk):
    q, k, v = qkv(37)
    want = attention(q, k, v, causal(), backend="reference")
    found = MoBA(block, topk)(q, k, v, CAUSAL)
    torch.testing.assert_close(found.out, want.out, atol=1e-12, rtol=1e-12)
    # Also where the choice is made, block by block.
    earlier = torch.arange(8) < torch.arange(37)[:, None] // 5
    chosen = rows_by_block(
        earlier.expand(2, 4, -1, -1),
        Blocks(torch.nn.functional.pad(torch.arange(37), (0, 3), value=-1).view(1, 8, 5)),
        37,
        (torch.arange(37)[None] // 5, torch.arange(37)[None] % 5),
    )  # fmt: skip
    assert torch.equal(chosen.dense()[0, 0], causal().dense(37, 37)[0, 0])


@pytest.mark.parametrize("block", [5, 8])
@pytest.mark.parametrize("topk", range(1, 10))
def test_oracle_2_the_mask_is_the_naive_rule(block, topk):
    q, k, v = qkv(37)
    seen = MoBA(block, topk).layout(q, k, v, CAUSAL).dense()
    assert torch.equal(seen.expand(2, 4, 37, 37), naive(q, k, block, topk))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_oracle_2_merged_parts_and_their_gradients_are_dense_masked_attention(dtype):
    q, k, v = (x.requires_grad_() for x in qkv(150, dtype))
    method = MoBA(16, 3)
    found = method(q, k, v, replace(CAUSAL, phase="train"))
    seen = method.layout(q, k, v, CAUSAL).dense()
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    want = dense(*wide, seen)
    band = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.out.double(), want.out, atol=band, rtol=band)
    weight, more = torch.randn_like(want.out), torch.randn_like(want.lse)
    loss = (found.out.double() * weight).sum() + (found.lse.double() * more).sum()
    ours = torch.autograd.grad(loss, (q, k, v))
    theirs = torch.autograd.grad((want.out * weight).sum() + (want.lse * more).sum(), wide)
    for one, two in zip(ours, theirs):
        top = float(two.abs().max())
        torch.testing.assert_close(one.double(), two, atol=2 * band * top, rtol=band)


def test_oracle_6_later_tokens_change_nothing_before_them():
    q, k, v = qkv(90, batch=1)
    method = MoBA(8, 3)
    before = method(q, k, v, replace(CAUSAL, store={})).out
    for at in (40, 43, 63):
        again = [x.clone() for x in (q, k, v)]
        for x in again:
            x[:, :, at:] = torch.randn_like(x[:, :, at:])
        after = method(*again, replace(CAUSAL, store={})).out
        assert torch.equal(after[:, :, :at], before[:, :, :at])


def test_documents_restart_the_blocks_and_never_see_each_other():
    lengths = (37, 5, 48)
    q, k, v = qkv(sum(lengths))
    ctx = Context(mask=causal() & documents([0, 37, 42, 90]))
    method = MoBA(8, 3)
    found = method(q, k, v, ctx).out
    for q1, k1, v1, out in zip(*(x.split(lengths, 2) for x in (q, k, v, found))):
        want = dense(q1, k1, v1, naive(q1, k1, 8, 3))
        torch.testing.assert_close(out, want.out, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_block(side):
    q, k, v = qkv(75)
    pads = torch.tensor([0, 13])
    real = slice(13, None) if side == "left" else slice(0, 62)
    positions = torch.arange(75) - (pads[:, None] if side == "left" else 0)
    ctx = Context(
        mask=causal() & padding(75 - pads),
        q_positions=positions if side == "left" else None,
        kv_positions=positions if side == "left" else None,
    )
    found = MoBA(8, 3)(q, k, v, ctx).out[1:, :, real]
    alone = [x[1:, :, real] for x in (q, k, v)]
    want = dense(*alone, naive(*alone[:2], 8, 3))
    torch.testing.assert_close(found, want.out, atol=1e-12, rtol=1e-12)


def test_sparse_decoding_is_the_rule_for_new_tokens_and_keeps_means():
    q, k, v = qkv(80)
    method = MoBA(8, 3, decode="sparse")
    whole = naive(q, k, 8, 3)
    method(q[:, :, :50], k[:, :, :50], v[:, :, :50], CAUSAL)
    sizes = []
    mean = Blocks.means
    counted = lambda self, x: (sizes.append(self.keys.shape[1]), mean(self, x))[1]  # noqa: E731
    for first, last in ((50, 51), (51, 54), (54, 64), (64, 65), (65, 80)):
        ctx = Context(mask=causal(), phase="decode")
        some = (q[:, :, first:last], k[:, :, :last], v[:, :, :last])
        Blocks.means = counted
        try:
            found = method(*some, ctx)
        finally:
            Blocks.means = mean
        want = dense(*some, whole[:, :, first:last, :last])
        torch.testing.assert_close(found.out, want.out, atol=1e-12, rtol=1e-12)
    assert sizes == [1, 1, 2, 1, 2]  # blocks that are new or were not whole
    # Beams in another order, and another text.
    turned = [x.flip(0) for x in (q, k, v)]
    found = method(turned[0][:, :, 79:], turned[1], turned[2], Context(mask=causal()))
    want = dense(turned[0][:, :, 79:], *turned[1:], whole.flip(0)[:, :, 79:])
    torch.testing.assert_close(found.out, want.out, atol=1e-12, rtol=1e-12)
    other = qkv(80)
    found = method(other[0][:, :, 79:], *other[1:], Context(mask=causal()))
    want = dense(other[0][:, :, 79:], *other[1:], naive(*other[:2], 8, 3)[:, :, 79:])
    torch.testing.assert_close(found.out, want.out, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sinks_softcap_and_bias_are_those_of_one_softmax(dtype):
    q, k, v = qkv(50)
    more = {
        "sink_logits": torch.randn(4, dtype=dtype),
        "bias": torch.randn(1, 4, 50, 50, dtype=dtype),
        "softcap": 5.0,
    }
    seen = MoBA(8, 3).layout(q, k, v, CAUSAL).dense()
    found = MoBA(8, 3)(*(x.to(dtype) for x in (q, k, v)), Context(mask=causal(), **more))
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    want = attention(q, k, v, blocks(seen, 1), backend="reference", **wide)
    band = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(found.out.double(), want.out, atol=band, rtol=band)
    torch.testing.assert_close(found.lse.double(), want.lse, atol=band, rtol=band)


def test_a_prompt_in_chunks_and_more_queries_than_keys():
    q, k, v = qkv(50)
    whole = MoBA(8, 3)(q, k, v, CAUSAL).out
    part = MoBA(8, 3)(q[:, :, 21:40], k[:, :, :40], v[:, :, :40], replace(CAUSAL, store={})).out
    torch.testing.assert_close(part, whole[:, :, 21:40], atol=1e-12, rtol=1e-12)
    found = MoBA(8, 3)(q, k[:, :, :30], v[:, :, :30], replace(CAUSAL, store={}))
    assert not found.out[:, :, :20].any()
    assert (found.lse[:, :, :20] == -torch.inf).all()
    alone = MoBA(8, 3)(q[:, :, 20:], k[:, :, :30], v[:, :, :30], replace(CAUSAL, store={}))
    torch.testing.assert_close(found.out[:, :, 20:], alone.out, atol=1e-12, rtol=1e-12)


def test_an_entry_of_padding_alone_is_empty():
    q, k, v = qkv(37)
    found = MoBA(8, 3)(q, k, v, Context(mask=causal() & padding([37, 0])))
    assert not found.out[1].any()
    assert (found.lse[1] == -torch.inf).all()


def test_a_layer_trains_with_it_and_may_change_to_full_attention():
    layer = Attention(32, 4, attention="moba(block=8, topk=2)")
    x = torch.randn(2, 50, 32)
    y = layer(x, mask=causal()).y
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    layer.attention = MoBA(8, 7)
    full = Attention(32, 4)
    full.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, mask=causal()).y, full(x, mask=causal()).y)


def test_work_is_what_the_rule_leaves():
    q, k, v = qkv(512)
    layout = MoBA(32, 3).layout(q, k, v, CAUSAL)
    # Own blocks, and for query block n its min(n, 2) earlier ones: about S (k - 1/2) B.
    assert layout.pairs == 16 * 32 * 33 / 2 + 32 * 32 * (1 + 14 * 2)


@pytest.mark.parametrize("mask", [None, causal() & window(20, 0), padding([37, 30])])
def test_masks_that_are_not_causal_are_refused(mask):
    with pytest.raises(InputError, match="moba is defined for causal"):
        MoBA(8, 2)(*qkv(37), Context(mask=mask))


def test_bad_fields_are_refused():
    for bad in ({"block": 0}, {"topk": 0}, {"topk": 2.5}, {"decode": "none"}):
        with pytest.raises(InputError):
            MoBA(**bad)
