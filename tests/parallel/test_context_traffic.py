"""What ranks send, counted where it leaves, against the spec's formulas (oracle 5)."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from sequences import on_ranks, problem

from foveate.ops import causal, documents, sinks, window
from foveate.parallel.context import ContextParallel, Sizes, run_local, scheme_of, volume

LENGTH = 203  # divides by none of the numbers of ranks


def sent(found, when, without=()):
    return [sum(n for w, n in f[when].items() if w not in without) for f in found]


@pytest.mark.parametrize("heads", [(8, 2), (8, 8)])
def test_oracle_5_numbers_sent(heads):
    """Counted where they leave; the right side is the spec's formula, written out here."""
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


@pytest.mark.parametrize(
    ("scheme", "sharding"), [("magi", "by-work(8)"), ("magi(stages=2)", "zigzag")]
)
def test_oracle_5_group_cast_sends_the_pieces_that_are_seen(scheme, sharding):
    """Each rank's numbers, both ways, from the mask's elements."""
    n, length = 4, 120
    p = problem(length, (4, 2), (16, 8), batch=1)
    for mask in (
        causal() & documents([0, 17, 18, 61, length]),
        causal() & (window(9, 0) | sinks(2)),
    ):
        found = on_ranks(n, p, scheme, sharding, mask)
        index, seen = found[0]["sharding"].index, mask.dense(length, length)[0, 0]
        travel = torch.zeros(n, n, dtype=torch.int64)  # tokens, from whom to whom
        for source in range(n):
            cuts = [0, *(index[source].diff() != 1).nonzero()[:, 0].add(1).tolist()]
            for lo, hi in zip(cuts, [*cuts[1:], len(index[source])]):
                for reader in range(n):
                    some = seen[index[reader]][:, index[source][lo:hi]].any()
                    travel[source, reader] += (hi - lo) * bool(some) * (source != reader)
        per_token = 2 * (16 + 8)
        assert 0 < travel.sum() < length * (n - 1)
        assert sent(found, "forward") == (travel.sum(1) * per_token).tolist()
        both = travel.sum(1) + travel.sum(0)  # keys again, and gradients of what came
        assert sent(found, "backward", ("dlse",)) == (both * per_token).tolist()
