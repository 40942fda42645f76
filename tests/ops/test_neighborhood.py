"""The neighborhood mask: the papers' tables, brute force, and what interval reasoning knows."""

from __future__ import annotations

import random

import pytest
import torch
from neighbors import axis_table, random_setting, settings_1d, table

from foveate import attention, causal, neighborhood, parse_mask, region, window
from foveate.ops import cpu
from foveate.ops.errors import InputError
from foveate.ops.masks.axis import Axis


def seen(mask, tokens):
    return mask.dense(tokens, tokens)[0, 0]


def lists(mask, tokens):
    return [row.nonzero()[:, 0].tolist() for row in seen(mask, tokens)]


def starts(*args, **kwargs):
    return [row[0] for row in lists(neighborhood(*args, **kwargs), args[0])]


def test_fna_sheets_starts_and_counts():
    assert starts(8, 3) == [0, 0, 1, 2, 3, 4, 5, 5]
    assert starts(8, 4) == [0, 0, 0, 1, 2, 3, 4, 4]
    for k, counts in ((3, [2, 3, 4, 3, 3, 4, 3, 2]), (4, [3, 4, 5, 6, 5, 4, 3, 2])):
        one = seen(neighborhood(8, k), 8)
        assert one.sum(0).tolist() == counts
        assert set(one.sum(1).tolist()) == {k}
        assert not torch.equal(one, one.T)


def test_fna_sheets_dilation():
    free, past = neighborhood(7, 3, dilation=2), neighborhood(7, 3, dilation=2, causal=True)
    assert lists(free, 7) == [
        [0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6],
    ]  # fmt: skip
    assert lists(past, 7) == [[0], [1], [0, 2], [1, 3], [0, 2, 4], [1, 3, 5], [2, 4, 6]]


def test_fna_sheets_grids():
    flat = lists(neighborhood((4, 4), 3), 16)
    assert flat[0] == flat[5] == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert flat[15] == [5, 6, 7, 9, 10, 11, 13, 14, 15]
    assert sum(map(len, flat)) == 144
    deep = lists(neighborhood((3, 4, 4), (2, 3, 3), causal=(True, False, False)), 48)
    assert sum(map(len, deep)) == 720
    assert (len(deep[0]), len(deep[21])) == (9, 18)


@pytest.mark.parametrize(
    ("given", "out", "lse"),
    [
        ({"window": 3}, [2.445888, 2.759935, 3.002349, 3.036290, 3.013430],
         [2.349012, 4.129109, 6.002599, 8.018479, 10.006760]),
        ({"window": 2}, [1.119203, 1.017986, 2.999877, 3.000335, 4.993307], None),
        ({"window": 3, "causal": True}, [1, 1.017986, 2.905042, 3.000329, 3.013430], None),
        ({"window": 2, "dilation": 2}, [2.462117, 3.761594, 2.905148, 3.964028, 3.013386], None),
    ],
)  # fmt: skip
def test_fna_sheets_numbers(given, out, lse):
    q = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64).view(1, 1, 5, 1)
    k = torch.tensor([1.0, -1, 2, 0, 1], dtype=torch.float64).view(1, 1, 5, 1)
    found = attention(q, k, q, neighborhood(5, **given), scale=1.0)
    expected = torch.tensor(out, dtype=torch.float64)
    torch.testing.assert_close(found.out.flatten(), expected, atol=6e-7, rtol=0)
    if lse:
        expected = torch.tensor(lse, dtype=torch.float64)
        torch.testing.assert_close(found.lse.flatten(), expected, atol=6e-7, rtol=0)


def spans(*args, **kwargs):
    return [(row[0], row[-1]) for row in lists(neighborhood(*args, **kwargs), args[0])]


def test_gna_sheets_tables():
    assert spans(8, 4, stride=2) == [(0, 3)] * 2 + [(1, 4)] * 2 + [(3, 6)] * 2 + [(4, 7)] * 2
    assert spans(8, 4, stride=3) == [(0, 3)] * 3 + [(2, 5)] * 3 + [(4, 7)] * 2
    assert spans(8, 4, stride=4) == [(0, 3)] * 4 + [(4, 7)] * 4
    assert spans(10, 4, stride=4) == [(0, 3)] * 4 + [(4, 7)] * 4 + [(6, 9)] * 2
    past = lists(neighborhood(8, 4, stride=2, causal=True), 8)
    assert past == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [2, 3, 4], [2, 3, 4, 5], [4, 5, 6], [4, 5, 6, 7],
    ]  # fmt: skip
    assert lists(neighborhood(7, 2, stride=2, dilation=3), 7) == [
        [0, 3], [1, 4], [2, 5], [0, 3], [1, 4], [2, 5], [3, 6],
    ]  # fmt: skip
    square = neighborhood((6, 6), 4, stride=2)
    assert square.pairs(36, 36) == 576
    assert starts(6, 4, stride=2) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("past", [False, True])
def test_every_1d_setting_by_brute_force(past):
    count = 0
    for length, k, s, d, flag in settings_1d(24):
        if flag is past:
            got = neighborhood(length, k, s, d, flag)
            assert torch.equal(seen(got, length), axis_table(length, k, s, d, flag)), got
            count += 1
    fits = (length // d for length in range(1, 24) for d in range(1, length + 1))
    assert count == sum(k * (k + 1) // 2 for k in fits)


@pytest.mark.parametrize("rank", [2, 3])
def test_random_grids_by_brute_force(rank):
    for seed in range(60):
        setting = random_setting(rank, seed)
        mask = neighborhood(*setting)
        assert torch.equal(seen(mask, mask.tokens), table(*setting)), mask


def test_a_first_axis_of_one_changes_nothing():
    flat, deep = neighborhood((5, 7), (3, 4)), neighborhood((1, 5, 7), (1, 3, 4))
    assert torch.equal(seen(flat, 35), seen(deep, 35))


def test_windows_hold_their_query_and_rise():
    for length, k, s, d, past in settings_1d(18):
        one = axis_table(length, k, s, d, past)
        assert one.diagonal().all()
        first = one[::d].int().argmax(1)
        assert (first.diff() >= 0).all()


def test_the_inverse_range_is_the_column_for_every_length_below_26():
    checked = 0
    for length, k, s, _, past in (x for x in settings_1d(26) if x[3] == 1):
        i, axis = torch.arange(length), Axis(length, k, s, 1, past)
        first, last = axis.queries(i, length)
        inside = (i[:, None] >= first) & (i[:, None] < last)
        assert torch.equal(
            inside, (i >= axis.start(i, length)[:, None]) & (i < axis.end(i, length)[:, None])
        )
        checked += length
    assert checked == 111_150  # the spec's 110,500 and those of a window of 1


def test_special_cases():
    assert torch.equal(seen(neighborhood(24, 24), 24), torch.ones(24, 24, dtype=torch.bool))
    assert torch.equal(seen(neighborhood(24, 24, causal=True), 24), seen(causal(), 24))
    sliding = causal() & window(4, 0)
    assert torch.equal(seen(neighborhood(24, 5, causal=True), 24), seen(sliding, 24))
    block = torch.arange(24) // 6
    assert torch.equal(seen(neighborhood(24, 6, stride=6), 24), block[:, None] == block)
    past = (block[:, None] == block) & torch.ones(24, 24, dtype=torch.bool).tril()
    assert torch.equal(seen(neighborhood(24, 6, stride=6, causal=True), 24), past)


@pytest.mark.parametrize(("block", "halo"), [(4, 2), (4, 1), (8, 3), (2, 4)])
def test_halonet_away_from_the_borders(block, halo):
    length = 64
    got = seen(neighborhood(length, block + 2 * halo, stride=block), length)
    for first in range(block * 2, length - block * 3, block):
        keys = set(range(first - halo, first + block + halo))
        if first - halo >= 0 and first + block + halo <= length:
            for row in got[first : first + block]:
                assert set(row.nonzero()[:, 0].tolist()) == keys


def test_reflection_holds_where_window_and_stride_have_one_parity():
    def mirrored(length, k, s):
        one = axis_table(length, k, s)
        return torch.equal(one, one.flip(0, 1))

    broken = []
    for length in range(2, 30):
        for k in range(1, length + 1):
            for s in (s for s in range(1, k + 1) if length % s == 0):
                if k % 2 == s % 2:
                    assert mirrored(length, k, s), (length, k, s)
                else:
                    broken.append(not mirrored(length, k, s))
    assert sum(broken) > len(broken) / 2
    assert mirrored(28, 7, 1)
    assert mirrored(28, 4, 2)
    assert not mirrored(28, 4, 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_interval_reasoning_is_never_wrong(rank):
    sure = 0
    for seed in range(25):
        setting = random_setting(rank, 1000 + seed, most=300)
        mask, want = neighborhood(*setting), table(*setting)
        n, draw = mask.tokens, random.Random(seed)
        for _ in range(40):
            q, k = (sorted(draw.choices(range(-3, n + 3), k=2)) for _ in range(2))
            if draw.random() < 0.5:
                q[1], k[1] = q[0] + min(2, q[1] - q[0]), k[0] + min(2, k[1] - k[0])
            sides = [torch.tensor(x) for x in (*q, *k)]
            none, full = mask._tiles(*sides, 0, 0)
            box = torch.zeros(q[1] - q[0] + 1, k[1] - k[0] + 1, dtype=torch.bool)
            for a in range(max(q[0], 0), min(q[1], n - 1) + 1):
                for b in range(max(k[0], 0), min(k[1], n - 1) + 1):
                    box[a - q[0], b - k[0]] = want[a, b]
            assert not (none and box.any())
            assert not (full and not box.all())
            sure += bool(none | full)
    assert sure > 300


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layouts_hold_the_mask_and_the_expression_reads_back(rank):
    for seed in range(12):
        setting = random_setting(rank, 2000 + seed)
        mask = neighborhood(*setting)
        n = mask.tokens
        for tile in (16, (8, 32)):
            assert torch.equal(mask.layout(n, n, tile).dense()[0, 0], table(*setting))
        again = parse_mask(repr(mask))
        assert again == mask
        order = torch.randperm(n)
        mixed = mask.layout(n, n, 16, q_positions=order, kv_positions=order)
        assert torch.equal(mixed.dense()[0, 0], table(*setting)[order][:, order])


def test_text_beside_a_grid_is_told_by_regions():
    mask = region(neighborhood((4, 4), 3), (0, 16), (0, 16))
    mask = mask | region(None, (0, 16), (16, 19)) | region(None, (16, 19), (0, 19))
    want = torch.ones(19, 19, dtype=torch.bool)
    want[:16, :16] = table((4, 4), (3, 3))
    assert torch.equal(seen(mask, 19), want)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (((8, 8), 9), "axis 0 has 8 tokens"),
        (((8, 8), (3, 3), (1, 4)), "axis 1 has stride 4"),
        (((8, 8), (3, 3), 1, 4), "dilation 4"),
        (((8, 8), (3, 3, 3)), "expected 2 values"),
        (((2, 2, 2, 2), 1), "1 to 3 axes"),
        (((8,), 0), "at least 1"),
        (((8,), 2.5), "for each axis"),
        (((8,), 3, 1, 1, 2), "True or False"),
    ],
)
def test_bad_numbers_are_refused(given, says):
    with pytest.raises(InputError, match=says):
        neighborhood(*given)


def test_other_lengths_are_refused():
    x = torch.randn(1, 1, 17, 8)
    with pytest.raises(InputError, match="4 x 4 = 16 tokens, but there are 17 queries and 17 keys"):
        attention(x, x, x, neighborhood((4, 4), 3))


ENGINE = pytest.mark.skipif(not cpu.available(), reason="the C++ engine isn't built")


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=ENGINE), "blocks"])
@pytest.mark.parametrize(
    "setting",
    [((16, 16), (5, 7), (1, 3)), ((7, 9, 11), (3, 4, 5), 1, 2), ((301,), (21,), 1, 5, True)],
)
def test_the_core_op_goes_by_multi_axis_tiles(backend, setting):
    mask = neighborhood(*setting)
    inputs = [torch.randn(2, 4 if i == 0 else 2, mask.tokens, 16) for i in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = attention(*inputs, mask, backend=backend)
    want = attention(*exact, mask, backend="reference")
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(want.out)
    ours = torch.autograd.grad((got.out * weight).sum() + got.lse.sum(), inputs)
    theirs = torch.autograd.grad((want.out * weight).sum() + want.lse.sum(), exact)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one.double(), two, atol=1e-4, rtol=1e-4)


def test_tiles_of_residues_are_fewer_than_those_of_rows():
    """On one axis, too: a window of 15 with dilation 8 of 1,024 tokens."""
    mask = neighborhood(1024, 15, dilation=8)
    ordered = mask._ordered(1024, 1024, (128, 128), torch.device("cpu"))
    assert ordered is not None
    assert torch.equal(ordered.dense()[0, 0], seen(mask, 1024))
    assert ordered.pairs == mask.pairs(1024, 1024)
    assert len(ordered.cols) < 0.5 * len(mask.layout(1024, 1024, 128).cols)
    plain = neighborhood(1024, 15)
    assert plain._ordered(1024, 1024, (128, 128), torch.device("cpu")) is None
