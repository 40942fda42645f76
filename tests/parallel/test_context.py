"""Every scheme on ranks that are threads of this process, against the reference op on one rank."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from sequences import check_equal, on_ranks, one_rank, problem, this_rank

from foveate.ops import Layout, attention, blocks, causal, documents, padding, prefix, sinks, window
from foveate.ops.errors import InputError
from foveate.parallel.context import (
    ContextParallel,
    Ring,
    ShardedCache,
    Sizes,
    balance,
    by_work,
    contiguous,
    document_zigzag,
    row_pairs,
    run_local,
    scheme_of,
    striped,
    varlen,
    volume,
    zigzag,
)
from foveate.parallel.context.partial import How, add, finished
from foveate.parallel.context.ring import Rounds
from foveate.parallel.context.rule import LayoutRule, MaskRule

LENGTH = 203  # divides by none of the numbers of ranks
BOUNDS = (0, 37, 38, 140, 203)
MASKS = {
    "full": None,
    "causal": causal(),
    "document": causal() & documents(BOUNDS),
    "full-document": documents(BOUNDS),
    "sliding": causal() & (window(19, 0) | sinks(3)),
    "prefix": causal() | prefix(50),
    "empty-rows": causal() & ~window(30, -1),
}
SCHEMES = [
    (2, "ring"), (4, "ring"), (4, "ring(window=2)"), (4, "ring(window=1)"),
    (3, "ring(overlap=False)"), (2, "all-gather"), (4, "all-gather(groups=2)"),
    (2, "ulysses"), (4, "ulysses"),
    (4, "usp(ulysses=2)"), (4, "usp(ulysses=2, placement='context')"),
    (8, "loongtrain(ulysses=2, window=2)"), (3, "magi"), (4, "magi(stages=2)"), (1, "ring"),
]  # fmt: skip


SHARDINGS = ["contiguous", "zigzag", "striped", "by-work(16)", "document-zigzag"]


@pytest.fixture(scope="module")
def answers():
    """One rank's answers to all masks, computed once."""
    p = problem(LENGTH)
    return p, {name: one_rank(p, mask) for name, mask in MASKS.items()}


@pytest.mark.parametrize(("ranks", "scheme"), SCHEMES)
def test_oracle_1_schemes_equal_one_rank(ranks, scheme, answers):
    """Each scheme with every mask, and over the schemes each mask with every sharding."""
    p, want = answers
    first = SCHEMES.index((ranks, scheme))
    for number, (name, mask) in enumerate(MASKS.items()):
        sharding = SHARDINGS[(first + number) % 5]
        found = on_ranks(ranks, p, scheme, sharding, mask)
        check_equal(found, want[name], torch.float64)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (6, 3)])
def test_oracle_1_ratios_of_heads(heads):
    p = problem(70, heads)
    want = one_rank(p, causal())
    for ranks, scheme in ((2, "ulysses"), (2, "ring"), (4, "usp(ulysses=2)"), (2, "magi")):
        found = on_ranks(ranks, p, scheme, "zigzag", causal())
        check_equal(found, want, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_1_other_precisions(dtype):
    p = problem(150, dim=(32, 32), dtype=dtype)
    mask = causal() & documents([0, 60, 150])
    want = one_rank(p, mask)
    for ranks, scheme in ((4, "ring"), (2, "ulysses"), (4, "usp(ulysses=2)"), (4, "magi"),
                          (2, "all-gather")):  # fmt: skip
        found = on_ranks(ranks, p, scheme, "zigzag", mask)
        check_equal(found, want, dtype)


def test_masks_that_differ_by_head_and_batch_entry():
    p = problem(96)
    table = torch.rand(4, 12, 12) < 0.5
    for mask in (blocks(table, 8), causal() & padding([96, 41]), blocks(table[:2], 8) & causal()):
        want = one_rank(p, mask)
        for ranks, scheme in ((4, "ulysses"), (4, "usp(ulysses=2)"), (2, "all-gather(groups=2)"),
                              (3, "magi")):  # fmt: skip
            found = on_ranks(ranks, p, scheme, "zigzag", mask)
            check_equal(found, want, torch.float64)


def any_layouts() -> dict[str, Layout]:
    """Kinds of tiles that no mask makes: gathered keys, ranges, rows in an order of their own."""
    n, tile = 96, 16
    tiles = torch.rand(1, 4, 6, 6) < 0.3
    keys = torch.rand(1, 4, 6, n) < 0.2
    order = torch.randperm(n)[None, None].int()
    plain = causal().layout(n, n, tile)
    ranged = torch.stack((torch.arange(n) // 3, torch.arange(n) + 1), -1).int()[None, None]
    return {
        "tiles": Layout.from_tiles(tiles, n, n, tile, causal()),
        "single keys": Layout.from_selection(tiles[:, :2], keys[:, :2], n, n, tile, causal()),
        "ordered": replace(plain, q_index=order, kv_index=order, _counts=[]),
        "key ranges": replace(plain, kinds=torch.full_like(plain.kinds, -1), key_range=ranged,
                              _counts=[]),
        "row ranges": replace(plain, kinds=torch.full_like(plain.kinds, -2), row_range=ranged,
                              _counts=[]),
    }  # fmt: skip


def test_any_layout_is_shared_out():
    p = problem(96)
    for name, layout in any_layouts().items():
        want = one_rank(p, layout=layout)
        for ranks, scheme, sharding in ((4, "ring", "zigzag"), (4, "ulysses", "contiguous"),
                                        (3, "magi(stages=2)", "by-work(8)"),
                                        (2, "all-gather(groups=2)", "striped")):  # fmt: skip
            found = on_ranks(ranks, p, scheme, sharding, layout=layout)
            try:
                check_equal(found, want, torch.float64)
            except AssertionError as error:
                raise AssertionError(f"{name}, {scheme}: {error}") from error


def test_what_a_restricted_layout_visits():
    for layout in any_layouts().values():
        rows, cols = torch.randperm(96)[:40], torch.randperm(96)[:33]
        small = LayoutRule(layout).part(rows, cols).layout.checked()
        assert torch.equal(small.dense(), layout.dense()[:, :, rows][..., cols])


@pytest.mark.parametrize("length", [1, 3, 5])
def test_fewer_tokens_than_ranks(length):
    p = problem(length)
    for scheme in ("ring", "all-gather", "ulysses", "usp(ulysses=2)", "magi", "ring(window=2)"):
        for sharding in ("zigzag", "contiguous"):
            check_equal(
                on_ranks(4, p, scheme, sharding, causal()), one_rank(p, causal()), torch.float64
            )


def test_inputs_with_strides_of_their_own():
    p = problem(40)
    wide = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in p.items() if n != "dlse"}
    found = on_ranks(2, wide | {"dlse": p["dlse"]}, "usp(ulysses=2)", "zigzag", causal())
    check_equal(found, one_rank(p, causal()), torch.float64)


def test_one_of_two_gradients_is_enough():
    """A loss of the output alone, and one of the lse alone."""
    p = problem(40)
    for name in ("dout", "dlse"):
        some = p | {name: torch.zeros_like(p[name])}
        for scheme in ("ring", "ulysses"):
            check_equal(
                on_ranks(2, some, scheme, "zigzag", causal()), one_rank(some, causal()),
                torch.float64,
            )  # fmt: skip

    def work(links):
        sequence = ContextParallel(links, "ulysses").sequence(40, causal())
        q, k, v = (sequence.split(p[n], 2).requires_grad_() for n in "qkv")
        lse = sequence.attention(q, k, v).lse
        return torch.autograd.grad(lse.sum(), (q, k))

    q, k = (p[n].clone().requires_grad_() for n in "qk")
    lse = attention(q, k, p["v"], causal(), backend="reference").lse
    want = torch.autograd.grad(lse.sum(), (q, k))
    found = run_local(2, work)
    whole = zigzag(40, 2)
    for i in range(2):
        got = whole.join([f[i] for f in found], 2)
        torch.testing.assert_close(got, want[i], rtol=0, atol=1e-12)


def test_options_of_the_op():
    p = problem(64)
    sinks_of = torch.randn(4, dtype=torch.float64)
    for options in ({"scale": 0.3}, {"softcap": 2.0}, {"sink_logits": sinks_of}):
        found = on_ranks(2, p, "ring", "zigzag", causal(), **options)
        check_equal(found, one_rank(p, causal(), **options), torch.float64)


def test_positions_of_a_batch_that_is_padded_in_front():
    p = problem(64)
    at = torch.arange(64) - torch.tensor([[0], [13]])
    mask = causal() & padding([64, 51])
    dense = mask.dense(64, 64, q_positions=at, kv_positions=at)
    want = one_rank(p, blocks(dense, 1))
    found = on_ranks(4, p, "ring", "zigzag", mask, positions=at)
    check_equal(found, want, torch.float64)


# -- oracles of single parts ---------------------------------------------------------------------
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
    """Zig-zag and striped causal steps, by the sheet's rules, for every rank and step."""
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


def sent(found, when, without=()):
    return [sum(n for w, n in f[when].items() if w not in without) for f in found]


@pytest.mark.parametrize("heads", [(8, 2), (8, 8)])
def test_oracle_5_numbers_sent(heads):
    """Counted where they leave; the right side is the sheet's formula, written out here."""
    (hq, hkv), d, s = heads, 8, 128
    p = problem(s, heads, (d, d), batch=1, dtype=torch.float32)
    p["dlse"] = torch.zeros_like(p["dlse"])
    for n, u, scheme in ((4, 1, "ring"), (4, 1, "ring(window=2)"), (4, 1, "all-gather"),
                         (2, 2, "ulysses"), (4, 4, "ulysses"), (4, 2, "usp(ulysses=2)"),
                         (8, 2, "loongtrain(ulysses=2, window=2)"), (1, 1, "ring"),
                         (1, 1, "ulysses")):  # fmt: skip
        found = on_ranks(n, p, scheme, "zigzag", causal())
        r, most = n // u, max(hkv, u)
        heads_part = Fraction(u - 1, u) * (s // n) * d * (2 * hq + 2 * most)
        ring_part = Fraction(r - 1, r) * s * 2 * most * d / u
        assert sent(found, "forward", ("lse",)) == [heads_part + ring_part] * n
        lse = Fraction(u - 1, u) * (s // n) * hq
        assert [f["forward"].get("lse", 0) for f in found] == [lse] * n
        assert sent(found, "backward", ("dlse",)) == [heads_part + 2 * ring_part] * n
        told = volume(scheme_of(scheme), Sizes(s, n, hq, hkv, d, d))
        assert sum(told.forward.values()) == sent(found, "forward")[0]
        assert sum(told.backward.values()) == sent(found, "backward", ("dlse",))[0]


def test_oracle_5_bytes_sent():
    """In bf16, where sums travel in fp32."""
    p = problem(64, (8, 2), (8, 8), batch=1, dtype=torch.bfloat16)
    for n, scheme in ((4, "ring"), (4, "usp(ulysses=4)"), (4, "usp(ulysses=2)"), (2, "ulysses"),
                      (4, "all-gather")):  # fmt: skip

        def work(links, scheme=scheme):
            cp = ContextParallel(links, scheme, "zigzag")
            sequence = cp.sequence(64, causal())
            own = [sequence.split(p[name], 2).requires_grad_() for name in "qkv"]
            out = sequence.attention(*own).out
            forward = sum(cp.traffic.bytes.values())
            cp.traffic.reset()
            out.sum().backward()
            return forward, sum(cp.traffic.bytes.values())

        told = volume(scheme_of(scheme), Sizes(64, n, 8, 2, 8, 8))
        want = (told.bytes(2), told.bytes(2, backward=True))
        assert run_local(n, work) == [want] * n


def test_oracle_5_uneven_shares_send_the_same_in_all():
    p = problem(LENGTH, batch=1)
    found = on_ranks(4, p, "ring", "zigzag", causal())
    assert sum(sent(found, "forward")) == 3 * LENGTH * 2 * (16 + 8)
    assert sum(sent(found, "backward")) == 2 * 3 * LENGTH * 2 * (16 + 8)


def test_oracle_5_group_cast_saves_a_quarter_on_zigzag():
    p = problem(128, (4, 2), (8, 8), batch=1)
    for n in (2, 4):
        found = on_ranks(n, p, "magi", "zigzag", causal())
        half_chunk = 128 // (2 * n) * 2 * 2 * 8
        assert sum(sent(found, "forward")) == 1.5 * n * (n - 1) * half_chunk
        found = on_ranks(n, p, "magi", "contiguous", causal() & documents([0, 32, 64, 96, 128]))
        assert sum(sent(found, "forward")) == sum(sent(found, "backward")) == 0


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
    rule, every = MaskRule(MASKS["empty-rows"], 90), torch.arange(90)
    how = How(0.25)
    want = one_rank(p, MASKS["empty-rows"])
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


def test_decoding_over_a_sharded_cache():
    p = problem(61, (4, 2), (16, 8))
    mask = causal() & (window(20, 0) | sinks(2))
    want = one_rank(p, mask)

    def work(links):
        cp = ContextParallel(links, "ring", "zigzag")
        sequence, cache = cp.sequence(40, mask), ShardedCache(links, block=4)
        cache.load(sequence, *(sequence.split(p[n][:, :, :40], 2) for n in "kv"))
        outs = []
        for lo, hi in ((40, 43), (43, 44), (44, 58), (58, 59)):
            cache.append(*(p[n][:, :, lo:hi] for n in "kv"))
            links.traffic.reset()
            outs.append(cache.attend(p["q"][:, :, lo:hi], mask))
        numbers = links.traffic.numbers["partials"]
        cache.append(p["q"][:, :2, :1], p["v"][:, :, :1])  # a wrong token, taken back
        cache.truncate(59)
        cache.append(*(p[n][:, :, 59:] for n in "kv"))
        outs.append(cache.attend(p["q"][:, :, 59:], mask))
        return outs, numbers, cache.held

    found = run_local(3, work)
    for outs, numbers, _ in found:
        got = [torch.cat(x, 2) for x in zip(*outs)]
        torch.testing.assert_close(got[0], want["out"][:, :, 40:], rtol=0, atol=1e-12)
        torch.testing.assert_close(got[1], want["lse"][:, :, 40:], rtol=0, atol=1e-12)
        assert numbers == 2 * 2 * 4 * (8 + 1)  # to two others: batch, heads, out and lse
        assert torch.equal(got[0], torch.cat([o.out for o in found[0][0]], 2))
    assert sum(held for *_, held in found) == 61


# -- refusals -------------------------------------------------------------------------------------
def refused(match, ranks, scheme, **options):
    def work(links):
        p = problem(32, (6, 3))
        return this_rank(links, p, scheme, options.pop("sharding", "zigzag"), causal(), **options)

    with pytest.raises(InputError, match=match):
        run_local(ranks, work)


def test_refusals_say_why():
    refused("query heads that 4 divides", 4, "ulysses")
    refused("divide the 4 ranks", 4, "usp(ulysses=3)")
    refused("don't divide a ring", 4, "ring(window=3)")
    refused("is not known", 1, "rng")
    refused("sharding 'zagzig'", 1, "ring", sharding="zagzig")
    refused("no attention dropout", 1, "ring", dropout=0.1)
    refused("takes no bias", 1, "ring", bias=torch.zeros(1))
    refused("loongtrain needs window", 2, "loongtrain(ulysses=2)")
    with pytest.raises(InputError, match="torchrun"):
        ContextParallel(None)
    with pytest.raises(InputError, match="fewer than the 8 ranks"):
        by_work(torch.ones(64), 8, 16)


def test_a_rank_that_raises_stops_the_others():
    def work(links):
        if links.rank == 1:
            raise ValueError("rank 1 is broken")
        return this_rank(links, problem(32), "ring", "zigzag", causal())

    with pytest.raises(ValueError, match="rank 1 is broken"):
        run_local(3, work)
