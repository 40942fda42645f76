"""Context parallelism part by part: shares and their balance, steps, merging, rings, metadata."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from sequences import any_layouts, one_rank, problem, this_rank

from foveate.ops import causal, documents, sinks, window
from foveate.parallel.context import (
    Ring,
    Sizes,
    balance,
    by_work,
    contiguous,
    document_zigzag,
    row_pairs,
    run_local,
    striped,
    varlen,
    volume,
    zigzag,
)
from foveate.parallel.context.partial import How, add, finished
from foveate.parallel.context.ring import Rounds
from foveate.parallel.context.rule import MaskRule

EMPTY_ROWS = causal() & ~window(30, -1)


def areas(mask, sharding):
    return list(balance(mask, sharding, tile=8).pairs)


def test_oracle_2_areas_of_ranks():
    assert areas(causal(), contiguous(48, 4)) == [78, 222, 366, 510]
    assert areas(causal(), zigzag(48, 4)) == [294] * 4
    assert areas(causal(), striped(48, 4)) == [276, 288, 300, 312]
    packed = causal() & documents([0, 5, 25, 26, 48])
    for sharding, uneven in ((contiguous(48, 4), 1.653), (zigzag(48, 4), 1.111),
                             (striped(48, 4), 1.094)):  # fmt: skip
        assert balance(packed, sharding, 8).imbalance == pytest.approx(uneven, abs=5e-4)
    shared = causal() & (documents([0, 5, 9, 16]) | sinks(5))
    assert areas(shared, contiguous(16, 4)) == [10, 26, 30, 42]
    assert sorted(areas(shared, zigzag(16, 4))) == [26, 26, 26, 30]
    assert areas(shared, striped(16, 4)) == [24, 24, 28, 32]


def test_documents_balance_by_document_zigzag_and_by_work():
    random = torch.Generator().manual_seed(0)
    sizes = (torch.randn(10, generator=random) + 6).exp().int().tolist()
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    length, mask = bounds[-1], causal() & documents(bounds)
    assert balance(mask, contiguous(length, 8)).imbalance > 1.5
    assert balance(mask, document_zigzag(bounds, 8)).imbalance < 1.05
    assert balance(mask, by_work(row_pairs(mask, length), 8, 32)).imbalance < 1.1
    assert length < 10_000
    for wide in (causal(), window(300, 0) & causal()):
        work = row_pairs(wide, length)
        assert torch.equal(work, wide.dense(length, length)[0, 0].sum(1))
        assert balance(wide, by_work(work, 8, 32)).imbalance < 1.1


def test_row_pairs_of_any_layout():
    for layout in any_layouts().values():
        assert torch.equal(row_pairs(layout), layout.dense().sum((0, 1, 3)))


def test_short_documents_are_spread_over_ranks():
    sharding = document_zigzag(list(range(0, 3 * 64 + 1, 3)), 4)  # of 3 tokens, ranks' chunks 8
    assert sharding.sizes == [48] * 4


def test_oracle_3_step_masks():
    """Zig-zag and striped causal steps, by the spec's rules, for every rank and step."""
    for ranks in (2, 4):
        n, own = 16 * ranks, 16
        rule = MaskRule(causal(), n)
        zig, stripe = zigzag(n, ranks), striped(n, ranks)
        half, lower = own // 2, torch.ones(own, own, dtype=torch.bool).tril()
        for r in range(ranks):
            for t in range(ranks):
                s = (r - t) % ranks
                seen = torch.zeros(own, own, dtype=torch.bool)
                if t == 0:
                    seen = lower
                elif t <= r:
                    seen[:, :half] = True
                else:
                    seen[half:] = True
                assert torch.equal(dense_of(rule.part(zig.index[r], zig.index[s])), seen)
                want = lower if t <= r else lower.tril(-1)
                assert torch.equal(dense_of(rule.part(stripe.index[r], stripe.index[s])), want)


def dense_of(part):
    if part.layout is None:
        return torch.ones(part.queries, part.keys, dtype=torch.bool)
    return part.layout.dense()[0, 0]


def test_double_rings_leave_their_window_less():
    rounds = Rounds(8, 4)
    for step in range(8):
        for rank in range(8):
            assert rounds.worker(step, rounds.chunk(step, rank)) == rank
    fed = sorted(t for step in range(8) for t in rounds.fed(step))
    assert fed == list(range(1, 8))  # each later step is fed once
    crossing = [
        (step, t) for step in range(8) for t in rounds.fed(step)
        if rounds.worker(step, 0) // 4 != rounds.worker(t, 0) // 4
    ]  # fmt: skip
    assert len(crossing) == 8 // 4 - 1
    assert volume(Ring(4), Sizes(64, 8, 2, 2, 8, 8)).crossing == Fraction(1, 7)


def test_oracle_6_merging_in_any_order_and_empty_parts():
    p = problem(90)
    rule, every = MaskRule(EMPTY_ROWS, 90), torch.arange(90)
    how = How(0.25)
    want = one_rank(p, EMPTY_ROWS)
    for cuts in ((90,), (13, 13, 64), (1, 89), (0, 90)):
        for order in (1, -1):
            sofar = None
            for keys in every.split(cuts)[::order]:
                at = keys.tolist()
                sofar = add(sofar, p["q"], p["k"][:, :, at], p["v"][:, :, at],
                            rule.part(every, keys), how)  # fmt: skip
            out, lse = finished(sofar, p["q"], 8)
            torch.testing.assert_close(out, want["out"], rtol=0, atol=1e-12)
            torch.testing.assert_close(lse, want["lse"], rtol=0, atol=1e-12)
    assert (want["lse"] == -torch.inf).any()
    assert not out[lse == -torch.inf].any()


def test_oracle_7_gradients_come_home_and_windows_dont_matter():
    """dK of a rank's chunk is its own; rings of one window, and of windows of one, are plain."""
    p = problem(64, (2, 2), (8, 8))
    found = {
        w: run_local(4, lambda links, w=w: this_rank(links, p, Ring(w), "zigzag", causal()))
        for w in (None, 1, 4)
    }
    want = one_rank(p, causal())
    for rank, one in enumerate(found[None]):
        own = one["sharding"].split(want["dk"], rank, 2)
        torch.testing.assert_close(one["dk"], own, rtol=0, atol=1e-12)
        for w in (1, 4):
            for name in ("out", "lse", "dq", "dk", "dv"):
                assert torch.equal(one[name], found[w][rank][name])


def test_oracle_8_metadata_of_packed_sequences():
    cu = [0, 7, 14, 16]
    two = [varlen(cu, 2, r) for r in range(2)]
    assert [x.cu_q.tolist() for x in two] == [[0, 7, 8], [0, 6, 8]]
    assert [x.cu_k.tolist() for x in two] == [[0, 7, 8], [0, 7, 9]]
    assert [x.keys for x in two] == [slice(0, 8), slice(7, 16)]
    four = [varlen(cu, 4, r) for r in range(4)]
    assert [x.cu_q.tolist() for x in four] == [[0, 4], [0, 3, 4], [0, 4], [0, 2, 4]]
    assert [x.cu_k.tolist() for x in four] == [[0, 4], [0, 7, 8], [0, 5], [0, 7, 9]]
    assert [x.keys for x in four] == [slice(0, 4), slice(0, 8), slice(7, 12), slice(7, 16)]
    whole = (causal() & documents(cu)).dense(16, 16)[0, 0]
    for rank, one in enumerate(four):  # pieces, bottom-right aligned, say what the mask says
        seen = torch.zeros(4, 16, dtype=torch.bool)
        for q0, q1, k0, k1 in zip(one.cu_q, one.cu_q[1:], one.cu_k, one.cu_k[1:]):
            start = one.keys.start
            seen[q0:q1, start + k0 : start + k1] = causal().dense(int(q1 - q0), int(k1 - k0))[0, 0]
        assert torch.equal(seen, whole[rank * 4 : rank * 4 + 4])
