"""Decoding over a cache that lies on several ranks, against the reference op on one."""

from __future__ import annotations

import pytest
import torch
from sequences import one_rank, problem

from foveate.ops import causal, sinks, window
from foveate.ops.errors import InputError
from foveate.parallel.context import ContextParallel, ShardedCache, run_local


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


def test_decoding_begins_before_every_rank_holds_something():
    """From the first token on; after six tokens in turns of four the third rank holds none."""
    p = problem(6)
    want = one_rank(p, causal())

    def work(links):
        cache, outs = ShardedCache(links, block=4), []
        with pytest.raises(InputError, match="nothing is cached"):
            cache.attend(p["q"][:, :, :1])
        for t in range(6):
            cache.append(*(p[n][:, :, t : t + 1] for n in "kv"))
            outs.append(cache.attend(p["q"][:, :, t : t + 1]).out)
        return torch.cat(outs, 2), cache.held

    found = run_local(3, work)
    assert [held for _, held in found] == [4, 2, 0]
    for out, _ in found:
        torch.testing.assert_close(out, want["out"], rtol=0, atol=1e-12)
