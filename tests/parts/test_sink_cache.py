"""The bounded cache against lists of tokens and rotations by complex numbers."""

from __future__ import annotations

import pytest
import torch
from test_rope import by_complex_numbers

from foveate.ops import attention, causal
from foveate.ops.errors import InputError
from foveate.parts import Rope, SinkWindowCache

BATCH, HEADS, KV_HEADS, DIM, LENGTH = 2, 4, 2, 16, 60
SINKS, WINDOW = 4, 12
CHUNKS = pytest.mark.parametrize(
    "chunks", [[1] * 60, [5] * 12, [12] * 5, [7, 1, 1, 11, 1, 2, 12, 9, 1, 3, 12]]
)
ROTATED = pytest.mark.parametrize("rotated", [False, True], ids=["before rope", "after rope"])


def tokens():
    shapes = (BATCH, HEADS, LENGTH, DIM), (BATCH, KV_HEADS, LENGTH, DIM)
    q, k = (torch.randn(s, dtype=torch.float64) for s in shapes)
    return q, k, torch.randn_like(k)


def softmax_attention(q, k, v):
    """By definition, causal from the end; q (Hq, c, D), k and v (Hkv, n, D)."""
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:]).triu(scores.shape[-1] - scores.shape[-2] + 1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def kept_before(seen, new, start=0):
    """Indices of the tokens that a chunk of `new` tokens finds in the cache."""
    kept = list(range(start, seen))
    room = SINKS + max(0, WINDOW - new)
    if len(kept) > room:
        kept = kept[:SINKS] + kept[len(kept) - (room - SINKS) :]
    return kept


def streamed(q, k, v, chunks, rope, rotated, start=None):
    """Outputs of all tokens through the cache."""
    cache = SinkWindowCache(SINKS, WINDOW, rope, rotated=rotated, start=start)
    places = torch.arange(LENGTH) if start is None else torch.arange(LENGTH) - start[:, None]
    outs, at = [], 0
    for new in chunks:
        part = slice(at, at + new)
        query, key = q[:, :, part], k[:, :, part]
        if rotated:
            query, key = rope.rotate(query, places[..., part]), rope.rotate(key, places[..., part])
        keys, values = cache.update(key, v[:, :, part])
        assert keys.shape[2] <= max(cache.capacity, SINKS + new)
        assert len(cache) <= cache.capacity
        if not rotated:
            query = rope.rotate(query, cache.query_positions())
        outs.append((query, keys, values))
        at += new
    return outs


@CHUNKS
@ROTATED
def test_oracle_sink_5_reindexed_equals_dense_over_the_kept_tokens_renumbered(chunks, rotated):
    q, k, v = tokens()
    rope = Rope.of(DIM)
    at = 0
    for (query, keys, values), new in zip(streamed(q, k, v, chunks, rope, rotated), chunks):
        ours = attention(query, keys, values, causal(), backend="reference").out
        index = kept_before(at, new) + list(range(at, at + new))
        renumbered = torch.arange(len(index))
        own = by_complex_numbers(q[:, :, at : at + new], renumbered[-new:], rope.inv_freq, False)
        others = by_complex_numbers(k[:, :, index], renumbered, rope.inv_freq, False)
        for b in range(BATCH):
            expected = softmax_attention(own[b], others[b], v[b][:, index])
            torch.testing.assert_close(ours[b], expected, atol=1e-12, rtol=1e-12)
        at += new


@pytest.mark.parametrize("chunks", [[30, 1, 1, 8, 12, 8], [60]])
@ROTATED
def test_a_chunk_longer_than_the_window_is_attended_whole_and_cut_afterwards(chunks, rotated):
    q, k, v = tokens()
    rope = Rope.of(DIM)
    first = streamed(q, k, v, chunks, rope, rotated)[0]
    ours = attention(*first, causal(), backend="reference").out
    turned = (by_complex_numbers(x, torch.arange(LENGTH), rope.inv_freq, False) for x in (q, k))
    own, others = (x[0][:, : chunks[0]] for x in turned)
    torch.testing.assert_close(ours[0], softmax_attention(own, others, v[0][:, : chunks[0]]))


def test_both_ways_of_reindexing_agree_with_interleaved_partial_scaled_rope():
    q, k, v = tokens()
    inv_freq = Rope.of(6).inv_freq
    rope = Rope(inv_freq, interleaved=True, scaling=1.2)
    chunks = [20, 1, 1, 12, 5, 12, 9]
    for one, two in zip(
        streamed(q, k, v, chunks, rope, False), streamed(q, k, v, chunks, rope, True)
    ):
        torch.testing.assert_close(
            attention(*one, causal()).out, attention(*two, causal()).out, atol=1e-12, rtol=1e-12
        )


@CHUNKS
def test_oracle_sink_5_relative_rope_leaves_the_recent_part_as_it_is(chunks):
    q, k, v = tokens()
    rope = Rope.of(DIM)
    at = 0
    for (query, keys, _), new in zip(streamed(q, k, v, chunks, rope, False), chunks):
        turned_q = by_complex_numbers(
            q[:, :, at : at + new], torch.arange(at, at + new), rope.inv_freq, False
        )
        recent = max(0, keys.shape[2] - SINKS)
        where = torch.arange(at + new - recent, at + new)
        turned_k = by_complex_numbers(k[:, :, where], where, rope.inv_freq, False)
        grouped = turned_q.unflatten(1, (KV_HEADS, -1)), query.unflatten(1, (KV_HEADS, -1))
        expected = grouped[0] @ turned_k[:, :, None].mT
        ours = grouped[1] @ keys[:, :, None, SINKS:].mT
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)
        at += new


@ROTATED
def test_left_padding_each_row_streams_as_if_it_were_alone(rotated):
    q, k, v = tokens()
    rope, chunks = Rope.of(DIM), [9, 1, 1, 1, 5, 12, 8, 12, 11]
    start = torch.tensor([0, 5])
    at = 0
    for (query, keys, values), new in zip(streamed(q, k, v, chunks, rope, rotated, start), chunks):
        index = kept_before(at, new, start=5) + [i for i in range(at, at + new) if i >= 5]
        rows = min(new, at + new - 5)
        # Padding that is still held stands in front; a mask hides it.
        ours = attention(query, keys[:, :, -len(index) :], values[:, :, -len(index) :], causal())
        renumbered = torch.arange(len(index))
        own = by_complex_numbers(
            q[1:, :, at + new - rows : at + new], renumbered[-rows:], rope.inv_freq, False
        )
        others = by_complex_numbers(k[1:, :, index], renumbered, rope.inv_freq, False)
        expected = softmax_attention(own[0], others[0], v[1][:, index])
        torch.testing.assert_close(ours.out[1][:, -rows:], expected, atol=1e-12, rtol=1e-12)
        at += new


def test_sizes_are_declared_and_true():
    cache = SinkWindowCache(SINKS, WINDOW)
    assert cache.fields == ()
    assert cache.bytes() == 0
    for _ in range(3):
        cache.update(torch.zeros(2, 3, 10, 8), torch.zeros(2, 3, 10, 24))
    assert len(cache) == cache.capacity == 16
    assert cache.bytes() == 2 * 3 * 16 * (8 + 24) * 4
    assert [(f.name, f.unit, f.shape, f.limit) for f in cache.fields] == [
        ("keys", "token", (3, 8), 16),
        ("values", "token", (3, 24), 16),
    ]
    assert cache.seen == 30
    assert cache.evicted.tolist() == [14, 14]


def test_truncate_takes_back_what_was_not_dropped():
    key = torch.randn(1, 1, 10, 4)
    cache = SinkWindowCache(SINKS, WINDOW)
    cache.update(key, key)
    cache.truncate(6)
    keys, _ = cache.update(key[:, :, :1], key[:, :, :1])
    assert torch.equal(keys, torch.cat((key[:, :, :6], key[:, :, :1]), 2))
    assert cache.seen == 7
    cache.update(key, key)
    with pytest.raises(InputError, match="only to fewer|dropped"):
        cache.truncate(3)


def test_reorder_moves_rows_with_their_padding():
    key = torch.randn(2, 1, 20, 4)
    cache = SinkWindowCache(SINKS, WINDOW, start=torch.tensor([0, 3]))
    cache.update(key, key)
    one, _ = cache.update(key[:, :, :1], key[:, :, :1])
    held = one.clone()
    before = cache.evicted
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.evicted.tolist() == before[[1, 1, 0]].tolist()
    two, _ = cache.update(key[[1, 1, 0], :, :1], key[[1, 1, 0], :, :1])
    assert torch.equal(two[0, :, :SINKS], held[1, :, :SINKS])
    assert torch.equal(two[2, :, :SINKS], held[0, :, :SINKS])


@ROTATED
def test_evicting_any_token_closes_the_gap(rotated):
    rope = Rope.of(DIM)
    q, k, v = tokens()
    cache = SinkWindowCache(SINKS, WINDOW, rope, rotated=rotated)
    key = rope.rotate(k[:, :, :14], torch.arange(14)) if rotated else k[:, :, :14]
    cache.update(key, v[:, :, :14])
    cache.evict(torch.tensor([5, 6, 9]))
    kept = [i for i in range(14) if i not in (5, 6, 9)]
    one = torch.tensor([14])
    key = rope.rotate(k[:, :, 14:15], one) if rotated else k[:, :, 14:15]
    keys, values = cache.update(key, v[:, :, 14:15])
    query = rope.rotate(q[:, :, 14:15], one if rotated else cache.query_positions())
    index = [*kept, 14]
    own = by_complex_numbers(q[:, :, 14:15], torch.tensor([11]), rope.inv_freq, False)
    others = by_complex_numbers(k[:, :, index], torch.arange(12), rope.inv_freq, False)
    ours = attention(query, keys, values, causal()).out
    expected = softmax_attention(own[0], others[0], v[0][:, index])
    torch.testing.assert_close(ours[0], expected, atol=1e-12, rtol=1e-12)
    assert cache.evicted.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SinkWindowCache(-1), "sinks=-1"),
        (lambda: SinkWindowCache(4, 0), "window=0"),
        (lambda: SinkWindowCache(4, 8, start=torch.ones(2)), "start"),
        (lambda: SinkWindowCache().query_positions(), "empty"),
        (
            lambda: SinkWindowCache().update(torch.zeros(1, 1, 0, 4), torch.zeros(1, 1, 0, 4)),
            "none",
        ),
        (lambda: SinkWindowCache().update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, 2, 4)), "Dv"),
        (lambda: filled().update(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)), "continue"),
        (lambda: filled().evict(torch.tensor([2])), "sinks"),
        (lambda: filled().evict(torch.tensor([6])), "4 to 5"),
        (lambda: filled().truncate(9), "only to fewer"),
        (lambda: filled(start=torch.tensor([0, 1])), "2 rows"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def filled(**options):
    cache = SinkWindowCache(SINKS, WINDOW, **options)
    cache.update(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4))
    return cache


@ROTATED
def test_the_default_device_changes_nothing(rotated):
    def run():
        rope = Rope.of(DIM)
        cache = SinkWindowCache(SINKS, WINDOW, rope, rotated=rotated, start=start)
        found = []
        for at in range(0, LENGTH, 5):
            found += cache.update(k[:, :, at : at + 5], v[:, :, at : at + 5])
        found += [cache.query_positions(), cache.evicted]
        cache.evict(evicted)
        cache.reorder(rows)
        return [*found, *cache.update(k[:, :, :1], v[:, :, :1])]

    _, k, v = tokens()
    start, evicted, rows = torch.tensor([0, 3]), torch.tensor([9]), torch.tensor([1, 0])
    here = run()
    with torch.device("meta"):
        there = run()
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
