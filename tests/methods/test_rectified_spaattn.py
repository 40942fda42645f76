"""Rectified SpaAttn: the spec's oracles by their number, a slow definition, padding, gradients."""

import math
from dataclasses import replace

import pytest
import torch

from foveate import Context, attention, causal, padding
from foveate.methods.rectified_spaattn import RectifiedSpaAttn
from foveate.methods.rectified_spaattn.pooled import best_blocks, keep_of, pooled_map, worth_it
from foveate.ops.errors import InputError
from foveate.parts.block_rows import Blocks
from foveate.parts.grid_blocks import boxes, curve, equal_runs, touching

GRID, BLOCK = (4, 6, 8), 16
SMALL = RectifiedSpaAttn(drop=0.7, p_thr=0.1, block=BLOCK, neighbours=False)
CTX = Context(grid=GRID)


def qkv(text=0, dtype=torch.float64, length=192, batch=2):
    n = length + text
    shapes = (batch, 4, n, 16), (batch, 2, n, 16), (batch, 2, n, 24)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def constant(heads, text, order):
    """Rows that are equal within each run of the order, and text behind them."""
    rows = torch.randn(2, heads, len(order) // BLOCK, 1, 16, dtype=torch.float64)
    rows = rows.expand(-1, -1, -1, BLOCK, -1).reshape(2, heads, -1, 16)
    grid = torch.empty_like(rows).index_copy(2, order, rows)
    return torch.cat((grid, torch.randn(2, heads, text, 16, dtype=torch.float64)), 2)


def slow(method, q, k, v, text, real_text):
    """Steps 1 to 6 word by word, block by block, for one sequence: out (H, L, Dv)."""
    heads, n, _ = q.shape
    k, v = (x.repeat_interleave(heads // len(k), 0) for x in (k, v))
    visual, d = n - text, q.shape[2]
    order = curve(GRID)
    parts = order.split(BLOCK)
    near = torch.zeros(len(parts), len(parts), dtype=torch.bool)
    if method.neighbours:
        near = touching(equal_runs(order, BLOCK), GRID)
    words = torch.arange(visual, visual + real_text)
    every = torch.cat((order, words))
    out = torch.zeros(heads, n, v.shape[2], dtype=q.dtype)
    for h in range(heads):
        qm, km, vm = (torch.stack([x[h, p].mean(0) for p in parts]) for x in (q, k, v))
        dq = torch.stack([(q[h, p] - qm[i]).abs().mean(0) for i, p in enumerate(parts)])
        dk = torch.stack([(k[h, p] - km[i]).abs().mean(0) for i, p in enumerate(parts)])
        for i, p in enumerate(parts):
            logits = torch.cat((qm[i] @ km.T, qm[i] @ k[h, words].T)) / math.sqrt(d)
            small = logits.softmax(0)
            mass = small.clone()
            if method.ipar:
                mass[: len(parts)] *= BLOCK
                mass /= mass.sum()
            share = torch.cat((mass[: len(parts)], mass[len(parts) :].sum()[None]))
            rank = share.argsort(descending=True)
            count = int((share[rank].cumsum(0) <= method.p_thr).sum()) + 1
            count = max(count, int((1 - method.drop) * len(parts) + 1e-9))
            chosen = set(rank[:count].tolist()) | {m for m in range(len(parts)) if near[i, m]}
            pooled = []
            for m in range(len(parts)):
                error = abs(float(dq[i] @ km[m])) + abs(float(qm[i] @ dk[m]))
                worth = abs(float(qm[i] @ km[m])) > error or not method.gapr
                if m not in chosen and worth:
                    pooled.append(m)
            keys = torch.cat([parts[m] for m in sorted(chosen - {len(parts)})] + [words])
            weights = (q[h, p] @ k[h, keys].T / math.sqrt(d)).softmax(1)
            kept = 1 - sum(float(share[m]) for m in pooled)
            more = sum((share[m] * vm[m] for m in pooled), torch.zeros_like(vm[0]))
            out[h, p] = kept * (weights @ v[h, keys]) + more
        out[h, words] = (q[h, words] @ k[h, every].T / math.sqrt(d)).softmax(1) @ v[h, every]
    return out


@pytest.mark.parametrize("text", [0, 10])
@pytest.mark.parametrize(
    "change", [{}, {"neighbours": True}, {"ipar": False}, {"gapr": False}, {"drop": 0.9}]
)
def test_a_call_is_the_sheets_steps(text, change):
    q, k, v = qkv(text)
    method = replace(SMALL, after=text, **change)
    valid = torch.tensor([192 + text, 192 + max(0, text - 3)])
    found = method(q, k, v, Context(grid=GRID, mask=padding(valid) if text else None)).out
    for b in range(2):
        words = int(valid[b]) - 192
        want = slow(method, q[b], k[b], v[b], text, words)
        real = 192 + words
        torch.testing.assert_close(found[b, :, :real], want[:, :real], atol=1e-12, rtol=1e-12)


# -- oracles -------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [0, 10])
@pytest.mark.parametrize("order", ["curve", "rows"])
def test_oracle_1_constant_blocks_are_full_attention(text, order):
    tokens = curve(GRID) if order == "curve" else torch.arange(192)
    q, k = constant(4, text, tokens), constant(2, text, tokens)
    v = torch.randn(2, 2, 192 + text, 24, dtype=torch.float64)
    want = attention(q, k, v, backend="reference")
    method = replace(SMALL, after=text, order=order)
    assert method.choose(q, k, CTX).pooled.any()
    found = method(q, k, v, CTX)
    torch.testing.assert_close(found.out, want.out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.lse, want.lse, atol=1e-12, rtol=1e-12)
    sparse = replace(method, rectify=False)(q, k, v, CTX).out
    assert (sparse - want.out).abs().max() > 0.05
    if text:
        plain = replace(method, ipar=False)(q, k, v, CTX).out
        assert (plain - want.out).abs().max() > 0.05


@pytest.mark.parametrize("text", [0, 10])
def test_oracle_2_mass(text):
    q, k, _ = qkv(text)
    choice = replace(SMALL, after=text).choose(q, k, CTX)
    made_up = (choice.map[..., :-1] * choice.pooled).sum(-1)
    ones = torch.ones_like(made_up)
    torch.testing.assert_close(choice.share + made_up, ones, atol=1e-12, rtol=0)
    torch.testing.assert_close(choice.map.sum(-1), ones, atol=1e-12, rtol=0)
    parts = curve(GRID).split(BLOCK)
    mean_q, mean_k = (torch.stack([x[:, :, p].mean(2) for p in parts], 2) for x in (q, k))
    keys = torch.cat((mean_k, k[:, :, 192:]), 2).repeat_interleave(2, 1)
    logits = mean_q @ keys.mT / 4
    logits[..., :12] += math.log(BLOCK)
    p = logits.softmax(-1)
    want = torch.cat((p[..., :12], p[..., 12:].sum(-1, keepdim=True)), -1)
    torch.testing.assert_close(choice.map, want, atol=1e-12, rtol=1e-12)


def test_oracle_3_everything_selected_is_dense():
    q, k, v = qkv(10)
    method = replace(SMALL, after=10, p_thr=1.0)
    choice = method.choose(q, k, CTX)
    assert choice.computed.all()
    assert not choice.pooled.any()
    torch.testing.assert_close(choice.share, torch.ones_like(choice.share))
    found, want = method(q, k, v, CTX), attention(q, k, v, backend="reference")
    torch.testing.assert_close(found.out, want.out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.lse, want.lse, atol=1e-12, rtol=1e-12)
    # As many as there are blocks isn't enough: text takes a place.
    assert not replace(SMALL, after=10, drop=0.0).choose(q, k, CTX).computed.all()
    assert replace(SMALL, drop=0.0).choose(*qkv()[:2], CTX).computed.all()


def test_oracle_4_without_pooling_it_is_the_sparse_output_times_r():
    q, k, v = qkv(10)
    method = replace(SMALL, after=10)
    choice = method.choose(q, k, CTX)
    share = choice.share
    assert (share > 0).all()
    assert (share <= 1 + 1e-12).all()
    # Values that are 0 wherever blocks are made up for leave R times the sparse output.
    row = int(choice.pooled[0, 0].sum(-1).argmax())
    parts = curve(GRID).split(BLOCK)
    v = v.clone()
    for m in choice.pooled[0, 0, row].nonzero()[:, 0].tolist():
        v[0, 0, parts[m]] = 0
    sparse = replace(method, rectify=False)(q, k, v, CTX).out[0, 0, parts[row]]
    found = method(q, k, v, CTX).out[0, 0, parts[row]]
    torch.testing.assert_close(found, share[0, 0, row] * sparse, atol=1e-12, rtol=1e-12)
    assert share[0, 0, row] < 1


def test_oracle_4_nothing_is_made_up_for_where_means_say_nothing():
    """Blocks whose tokens cancel out: every pooled score is noise, C is empty, R is 1."""
    q, k, v = qkv()
    q, k = (torch.stack((x[:, :, :96], -x[:, :, :96]), 3).flatten(2, 3) for x in (q, k))
    method = replace(SMALL, order="rows")
    choice = method.choose(q, k, CTX)
    assert not choice.computed.all()
    assert not choice.pooled.any()
    sparse = replace(method, rectify=False)(q, k, v, CTX).out
    torch.testing.assert_close(method(q, k, v, CTX).out, sparse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("text", [0, 10])
def test_oracle_5_more_budget_never_removes_a_block(text):
    q, k, _ = qkv(text)
    before = None
    for drop in (1.0, 0.8, 0.5, 0.2, 0.0):
        now = replace(SMALL, after=text, drop=drop, p_thr=0.0).choose(q, k, CTX).computed
        assert before is None or not (before & ~now).any()
        before = now
    before = None
    for p_thr in (0.0, 0.2, 0.5, 0.9, 1.0):
        now = replace(SMALL, after=text, drop=1.0, p_thr=p_thr).choose(q, k, CTX).computed
        assert before is None or not (before & ~now).any()
        before = now


def test_oracle_6_tokens_may_change_places_inside_a_block():
    q, k, v = qkv()
    want = SMALL(q, k, v, CTX).out
    turned = torch.arange(192)
    for part in curve(GRID).split(BLOCK):
        turned[part] = part[torch.randperm(BLOCK)]
    found = SMALL(q, k[:, :, turned], v[:, :, turned], CTX).out
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)
    found = SMALL(q[:, :, turned], k, v, CTX).out
    torch.testing.assert_close(found, want[:, :, turned], atol=1e-12, rtol=1e-12)


def test_oracle_7_worked_example():
    q = torch.tensor([[1.0, 0]]).repeat(9, 1)[None, None]
    k = torch.tensor([[1.0, 0]] * 4 + [[0.0, 0]] * 5)[None, None]
    blocks, text = Blocks(torch.arange(8).view(1, 2, 4)), torch.tensor([[8]])
    found = pooled_map(q, k, blocks, text, 1.0).map[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.6850, 0.2520, 0.0630]), atol=5e-5, rtol=0)
    plain = pooled_map(q, k, blocks, text, 1.0, ipar=False).map[0, 0, 0]
    torch.testing.assert_close(plain, torch.tensor([0.5761, 0.2119, 0.2119]), atol=5e-5, rtol=0)


# -- what is beside the oracles ------------------------------------------------------------------
def test_counts_of_the_choice():
    p = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    assert best_blocks(p, 1, 0.3).tolist() == [[True, False, False, False]]
    assert best_blocks(p, 1, 0.45).tolist() == [[True, False, True, False]]
    assert best_blocks(p, 3, 0.3).tolist() == [[True, False, True, True]]
    assert best_blocks(p, 9, 0.3).all()
    assert [keep_of(d, 10) for d in (0.8, 0.75, 0.9, 0.0, 1.0)] == [2, 2, 1, 10, 0]


def test_gapr_compares_gain_and_error_by_hand():
    q = torch.tensor([[1.0, 0], [1, 0], [2, 1], [0, -1]])[None, None]
    k = torch.tensor([[3.0, 0], [3, 0], [0, 2], [0, -2]])[None, None]
    blocks = Blocks(torch.arange(4).view(1, 2, 2))
    pooled = pooled_map(q, k, blocks, torch.zeros(1, 0, dtype=torch.int64), 1.0)
    # Block 1 of q has mean (1, 0) and d (1, 1); of k mean (0, 0) and d (0, 2).
    # Rows 0 and 1 on k_0: gain 3 and 3, errors 0 and 3; on k_1: gain 0, error 0 either way.
    assert worth_it(pooled, q, k, blocks)[0, 0].tolist() == [[True, False], [False, False]]


def test_neighbours_and_first_frames_are_computed():
    q, k, _ = qkv()
    near = touching(equal_runs(curve(GRID), BLOCK), GRID)
    chosen = replace(SMALL, neighbours=True).choose(q, k, CTX).computed
    assert (chosen | ~near).all()
    # By hand: blocks of a plane are neighbours if their tokens' places differ by one at most.
    where = torch.stack(torch.unravel_index(torch.arange(192), GRID), -1)
    parts = curve(GRID).split(BLOCK)
    for i, one in enumerate(parts):
        for j, two in enumerate(parts):
            away = (where[one][:, None] - where[two][None]).abs().amax(-1).min()
            assert bool(near[i, j]) == bool(away <= 1)
    first = torch.tensor([bool((where[p, 0] == 0).any()) for p in parts])
    chosen = replace(SMALL, first_frame=True).choose(q, k, CTX).computed
    assert (chosen | ~(first[:, None] & first)).all()


@pytest.mark.parametrize(
    "grid", [(8, 16, 16), (5, 7, 9), (3, 4), (7,), (2, 30, 52), (21, 30, 52), (1, 6, 8)]
)
def test_the_curve_visits_every_token_and_stays_near(grid):
    order = curve(grid)
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid)))
    where = torch.stack(torch.unravel_index(order, grid), -1)
    steps = where.diff(dim=0).abs().sum(1)
    assert steps.double().mean() < 1.05  # long steps are rare
    if all(side % 2 == 0 or side == 1 for side in grid):
        assert steps.max() == 1


def test_boxes_in_place_of_runs():
    method = replace(SMALL, box=(2, 2, 4))
    assert torch.equal(method.cut(GRID).tokens, boxes(GRID, (2, 2, 4)).tokens)
    q, k, v = qkv()
    assert not torch.equal(method(q, k, v, CTX).out, SMALL(q, k, v, CTX).out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [16, 40, 192])
def test_low_precision_and_blocks_that_do_not_divide(dtype, block):
    q, k, v = qkv(10, dtype)
    method = replace(SMALL, after=10, block=block)
    found = method(q, k, v, CTX)
    want = method(q.double(), k.double(), v.double(), CTX)
    band = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert found.out.dtype == dtype
    torch.testing.assert_close(found.out.double(), want.out, atol=band, rtol=band)


def test_gradients_hold_the_choice_constant():
    q, k, v = (x.requires_grad_() for x in qkv(4, batch=1))
    method = replace(SMALL, after=4)
    choice = method.choose(q, k, CTX)
    weight = torch.randn(1, 4, 196, 24, dtype=torch.float64)
    ours = torch.autograd.grad((method(q, k, v, CTX).out * weight).sum(), (q, k, v))
    # Differences along a direction, small enough to change no choice.
    for x, grad in zip((q, k, v), ours):
        step = torch.randn_like(x)
        ends = []
        for sign in (1, -1):
            moved = [(y + sign * 1e-6 * step if y is x else y).detach() for y in (q, k, v)]
            again = method.choose(moved[0], moved[1], CTX)
            assert torch.equal(again.computed, choice.computed)
            assert torch.equal(again.pooled, choice.pooled)
            ends.append((method(*moved, CTX).out * weight).sum())
        torch.testing.assert_close(
            (grad * step).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("rule", [{"drop": 1.0, "p_thr": 0.2}, {"drop": 0.7, "p_thr": 0.0}])
def test_padded_frames_are_a_shorter_last_block(rule):
    """The mass and the number of blocks are each sequence's own."""
    q, k, v = qkv()
    method = replace(SMALL, order="rows", **rule)
    ctx = Context(grid=GRID, mask=padding([192, 144]))
    found = method(q, k, v, ctx)
    short = method(*(x[1:, :, :144] for x in (q, k, v)), Context(grid=(3, 6, 8)))
    torch.testing.assert_close(found.out[1:, :, :144], short.out, atol=1e-12, rtol=1e-12)
    assert not found.out[1, :, 144:].any()
    assert found.out.isfinite().all()


def test_the_first_steps_may_stay_dense():
    q, k, v = qkv()
    method = replace(SMALL, dense_until=0.1)
    want = attention(q, k, v, backend="reference").out
    torch.testing.assert_close(method(q, k, v, Context(grid=GRID, step=0.05)).out, want)
    assert not torch.allclose(method(q, k, v, Context(grid=GRID, step=0.1)).out, want)
    # Padding on the left, told by positions; what was visited is told, too.
    pads, heard = torch.tensor([0, 48]), []
    places = torch.arange(192) - pads[:, None]
    found = method(q, k, v, Context(
        grid=GRID, mask=padding(192 - pads), q_positions=places, kv_positions=places, step=0.0,
        stats=lambda **said: heard.append(said["layout"].density),
    )).out  # fmt: skip
    want = attention(*(x[1:, :, 48:] for x in (q, k, v)), backend="reference").out
    torch.testing.assert_close(found[1:, :, 48:], want)
    assert heard == [pytest.approx((1 + 0.75) / 2)]


def test_layers_of_one_forward_may_have_other_grids():
    q, k, v = qkv()
    store = {}
    SMALL(q, k, v, Context(grid=GRID, store=store))
    found = SMALL(q, k, v, Context(grid=(2, 8, 12), store=store)).out
    want = SMALL(q, k, v, Context(grid=(2, 8, 12))).out
    assert torch.equal(found, want)


def test_work_is_told():
    q, k, v = qkv(10)
    heard = []
    method = replace(SMALL, after=10)
    method(q, k, v, Context(grid=GRID, stats=lambda **said: heard.append(said)))
    pairs = method.choose(q, k, CTX).computed.sum((2, 3)).double().mean() * BLOCK**2
    assert heard[0]["layout"].pairs == pytest.approx(float(pairs) + 192 * 10 + 10 * 202)


def test_what_it_is_not_for_is_refused():
    q, k, v = qkv()
    with pytest.raises(InputError, match="use moba"):
        SMALL(q, k, v, Context(grid=GRID, mask=causal()))
    with pytest.raises(InputError, match="no decoding"):
        SMALL(q[:, :, :1], k, v, Context(grid=GRID, phase="decode"))
    with pytest.raises(InputError, match="softcap"):
        SMALL(q, k, v, Context(grid=GRID, softcap=30.0))
    with pytest.raises(InputError, match="dropout"):
        SMALL(q, k, v, Context(grid=GRID, dropout=0.1))
    for bad in ({"drop": 1.5}, {"p_thr": -1}, {"block": 0}, {"order": "zigzag"}, {"after": -1}):
        with pytest.raises(InputError):
            RectifiedSpaAttn(**bad)
