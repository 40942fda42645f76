"""A-shape and block-sparse heads, and the miniature comparison of the spec mminference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate.methods.attention_sink import SinkWindow
from foveate.methods.mminference import AShape, BlockSparse, VerticalSlash
from foveate.ops import blocks, causal, padding, window
from foveate.parts import Context


def qkv(batch=1, heads=4, kv_heads=2, q_len=203, kv_len=203, dtype=torch.float64):
    shapes = (batch, heads, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 8)
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def by_definition(q, k, v, table):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~table, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


# -- A-shape ------------------------------------------------------------------------------------
@pytest.mark.parametrize("q_len", [203, 60])
def test_a_shape_is_the_sheets_mask(q_len):
    q, k, v = qkv(q_len=q_len)
    method, ctx = AShape(sinks=9, local=33), Context(mask=causal())
    rows = [i + 203 - q_len for i in range(q_len)]
    table = torch.tensor([[j <= i and (j < 9 or i - j < 33) for j in range(203)] for i in rows])
    assert torch.equal(method.layout(q, k, v, ctx).dense()[0, 0], table)
    torch.testing.assert_close(method(q, k, v, ctx).out, by_definition(q, k, v, table))


@pytest.mark.parametrize("method", [AShape(0, 203), AShape(203, 1), AShape(100, 103), AShape()])
def test_oracle_1_a_shape_with_room_for_all_is_dense(method):
    q, k, v = qkv()
    dense = causal().dense(203, 203)
    assert torch.equal(method.layout(q, k, v, Context(mask=causal())).dense(), dense)
    ours = method(q, k, v, Context(mask=causal())).out
    torch.testing.assert_close(ours, by_definition(q, k, v, dense), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("method", [AShape(4, 8), BlockSparse(1, 32)], ids=repr)
def test_decode_is_dense(method):
    q, k, v = qkv(q_len=1)
    ours = method(q, k, v, Context(mask=causal()))
    torch.testing.assert_close(ours.out, by_definition(q, k, v, torch.ones(1, 203).bool()))
    q, k, v = qkv(q_len=3)
    ours = method(q, k, v, Context(mask=causal(), phase="decode"))
    torch.testing.assert_close(ours.out, by_definition(q, k, v, causal().dense(3, 203)))


# -- block-sparse -------------------------------------------------------------------------------
def chosen_by_loops(q, k, blocks, tile, real_q, real_k, both_ways=False):
    """Key blocks of each row block, one head, q (Lq, D), k (Lkv, D); queries end with the keys."""
    shift = len(k) - len(q)

    def mean(x, real, at):
        rows = [x[i] for i in range(at * tile, min(at * tile + tile, len(x))) if real[i]]
        return torch.stack(rows).mean(0) if rows else torch.zeros_like(x[0])

    rows, cols = -(-len(q) // tile), -(-len(k) // tile)
    found = []
    for m in range(rows):
        last = min(m * tile + tile, len(q)) - 1 + shift
        pairs = []
        for n in range(cols):
            if both_ways or n * tile <= last:
                score = mean(q.double(), real_q, m) @ mean(k.double(), real_k, n)
                pairs.append((-float(score), n))
        best = {n for _, n in sorted(pairs)[:blocks]}
        found.append(best | {(m * tile + shift) // tile, last // tile})
    return found


def tiles_of(chosen, b, h):
    return [set(row.nonzero()[:, 0].tolist()) for row in chosen[b, h]]


@pytest.mark.parametrize(("q_len", "blocks", "tile"), [(203, 3, 16), (203, 1, 64), (75, 2, 8)])
@pytest.mark.parametrize("mask", [causal(), None], ids=["causal", "both ways"])
def test_block_sparse_is_the_sheets_choice(q_len, blocks, tile, mask):
    q, k, v = qkv(batch=2, q_len=q_len)
    method, ctx = BlockSparse(blocks, tile), Context(mask=mask)
    chosen = method.choose(q, k, ctx)
    real = [True] * 203
    for b, h in ((0, 0), (0, 1), (1, 3)):
        expected = chosen_by_loops(q[b, h], k[b, h // 2], blocks, tile, real, real, mask is None)
        assert tiles_of(chosen, b, h) == expected
    table = chosen.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[..., :q_len, :203]
    if mask is not None:
        table = table & mask.dense(q_len, 203)
    assert torch.equal(method.layout(q, k, v, ctx).dense(), table)
    torch.testing.assert_close(method(q, k, v, ctx).out, by_definition(q, k, v, table))


@pytest.mark.parametrize("method", [BlockSparse(13, 16), BlockSparse(), BlockSparse(4, 64)])
def test_oracle_1_all_blocks_is_dense(method):
    q, k, v = qkv()
    ctx, dense = Context(mask=causal()), causal().dense(203, 203)
    assert (method.layout(q, k, v, ctx).dense() == dense).all()
    ours = method(q, k, v, ctx).out
    torch.testing.assert_close(ours, by_definition(q, k, v, dense), atol=1e-12, rtol=1e-12)


def alone_and_padded(method, length, pads, **sizes):
    """Outputs of sequences run one by one and as one padded batch: [(alone, in the batch)]."""
    most = length + max(pads)
    q, k, v = qkv(batch=len(pads), q_len=most, kv_len=most, **sizes)
    places = torch.arange(most) - torch.tensor(pads)[:, None]
    mask = causal() & padding([most - p for p in pads])
    for x in (q, k):
        for b, p in enumerate(pads):
            x[b, :, :p] = 1e3
    ctx = Context(mask=mask, q_positions=places, kv_positions=places)
    together = method(q, k, v, ctx).out
    found = []
    for b, p in enumerate(pads):
        one = method(*(x[b : b + 1, :, p:] for x in (q, k, v)), Context(mask=causal()))
        found.append((one.out[0], together[b, :, p:]))
    return found


@pytest.mark.parametrize("pads", [[11], [0, 11], [3, 8, 29, 53], [64, 1]], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        BlockSparse(2, 8),
        BlockSparse(2, 16),
        BlockSparse(tile=8, fraction=0.2),
        VerticalSlash(5, 50, last=8, forced_verticals=2, forced_slashes=3),
        AShape(3, 17),
    ],
    ids=repr,
)
def test_left_padding_changes_nothing(method, pads):
    for alone, padded in alone_and_padded(method, 145, pads):
        torch.testing.assert_close(padded, alone, atol=1e-12, rtol=0)


def test_left_padding_changes_nothing_where_a_table_tells_of_it():
    """The mask as a boolean table by index, as transformers hands it over, without positions."""
    q, k, v = qkv(q_len=96, kv_len=96)
    table = causal().dense(96, 96)[0, 0].clone()
    table[:, :11] = False
    method = BlockSparse(2, 8)
    ours = method(q, k, v, Context(mask=blocks(table, 1))).out[:, :, 11:]
    alone = method(*(x[:, :, 11:] for x in (q, k, v)), Context(mask=causal())).out
    torch.testing.assert_close(ours, alone, atol=1e-12, rtol=0)


def test_gradients_pass_where_blocks_are_moved():
    q, k, v = (x.requires_grad_() for x in qkv(batch=2, q_len=75, kv_len=75))
    places = torch.arange(75) - torch.tensor([[11], [0]])
    mask = causal() & padding([64, 75])
    ctx = Context(mask=mask, q_positions=places, kv_positions=places)
    method = BlockSparse(2, 8)
    table = method.layout(q, k, v, ctx).dense()
    grads = torch.autograd.grad(method(q, k, v, ctx).out.square().sum(), (q, k, v))
    # A row that sees nothing is 0 whatever it holds.
    seen = table.any(-1)[..., None]
    expected = by_definition(q, k, v, table | ~seen) * seen
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_of_the_means(side):
    q, k, v = qkv(batch=2)
    pads = torch.tensor([0, 53])
    places = torch.arange(203) - pads[:, None]
    mask = causal() & padding((203 - pads).tolist())
    ctx = Context(mask=mask)
    real = (torch.arange(203) < 150).tolist()
    if side == "left":
        ctx = Context(mask=mask, q_positions=places, kv_positions=places)
        real = (torch.arange(203) >= 53).tolist()
    q[1, :, ~torch.tensor(real)] = 1e3
    k[1, :, ~torch.tensor(real)] = -1e3
    chosen = BlockSparse(2, 16).choose(q, k, ctx)
    start = int(torch.tensor(real).int().argmax())
    alone = [x[1:, :, start : start + 150] for x in (q, k)]
    expected = BlockSparse(2, 16).choose(*alone, Context(mask=causal()))
    # Blocks are counted from the first real token, behind those that hold only padding.
    skip, count = -(-start // 16), -(-150 // 16)
    theirs = chosen[1:, :, skip : skip + count]
    assert torch.equal(theirs[..., skip : skip + count], expected)
    assert not theirs[..., :skip].any()
    assert not theirs[..., skip + count :].any()


def test_fraction_is_a_share_of_each_sequences_blocks():
    q, k, _ = qkv(batch=2, q_len=160, kv_len=160)
    ctx = Context(mask=causal() & padding([160, 80]))
    chosen = BlockSparse(tile=8, fraction=0.25).choose(q, k, ctx)
    assert int(chosen[0, :, -1].sum(-1).max()) in (5, 6)
    assert int(chosen[1, :, 9].sum(-1).max()) in (3, 4)
    assert (
        BlockSparse(blocks=2, tile=8, fraction=1.0).choose(q, k, ctx)[0, :, -1].sum(-1).max() <= 3
    )


def test_it_stays_within_a_window_of_the_model():
    q, k, v = qkv()
    mask = causal() & window(40, 0)
    table = BlockSparse(2, 16).layout(q, k, v, Context(mask=mask)).dense()
    assert not (table & ~mask.dense(203, 203)).any()
    assert table.any(-1).all()


def test_oracle_7_block_sparse_outputs_are_causal_with_the_choice_held():
    """The layout is the choice; with the same one, later tokens change nothing before them."""
    q, k, v = qkv()
    ctx, cut = Context(mask=causal()), 100
    method = BlockSparse(2, 16)
    layout = method.layout(q, k, v, ctx)
    other = [torch.cat((x[:, :, :cut], torch.randn_like(x[:, :, cut:])), 2) for x in (q, k, v)]
    from foveate.ops import attention

    before = attention(q, k, v, layout=layout).out
    after = attention(*other, layout=layout).out
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(layout.dense(), method.layout(*other, ctx).dense())


@pytest.mark.parametrize(
    "method",
    [BlockSparse(2, 8), AShape(2, 9), VerticalSlash(5, 50, forced_verticals=2, forced_slashes=3)],
    ids=repr,
)
def test_an_empty_batch_gives_an_empty_output(method):
    q, k, v = qkv(batch=0)
    out = method(q, k, v, Context(mask=causal()))
    assert out.out.shape == (0, 4, 203, 8)
    assert out.lse.shape == (0, 4, 203)


@pytest.mark.parametrize(
    "method",
    [
        BlockSparse(2, 8),
        AShape(2, 9),
        SinkWindow(2, 9),
        VerticalSlash(5, 50, last=8, forced_verticals=2, forced_slashes=3),
    ],
    ids=repr,
)
def test_the_default_device_changes_nothing(method):
    q, k, v = qkv(batch=2, q_len=96, kv_len=96)
    places = torch.arange(96) - torch.tensor([[0], [11]])
    ctx = Context(mask=causal() & padding([96, 85]), q_positions=places, kv_positions=places)
    here = method(q, k, v, ctx).out
    with torch.device("meta"):
        there = method(q, k, v, replace(ctx, store={})).out
    assert torch.equal(here, there)
