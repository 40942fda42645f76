"""SnapKV and H2O on one layer; under transformers' generation see tests/hf/test_hf_eviction.py."""

import pytest
import torch

from foveate import Context, attention, causal, padding
from foveate.methods import make
from foveate.ops.errors import InputError
from foveate.parts.estimate import received
from foveate.parts.eviction import PADDING, EvictingCache
from foveate.parts.tokens import tokens_of


def step(method, cache, q, k, v, **more):
    """One call as a layer makes it: the cache first, then attention."""
    keys, values = cache.update(k, v)
    return method(q, keys, values, Context(mask=causal(), cache=cache, **more))


@pytest.mark.parametrize("last", [None, 7])
def test_what_keys_receive_is_the_sum_of_dense_weights(last):
    q, k = torch.randn(2, 4, 50, 16).double(), torch.randn(2, 2, 50, 16).double()
    pads = torch.tensor([0, 11])
    at = torch.arange(50) - pads[:, None]
    ctx = Context(
        mask=causal() & padding(50 - pads), q_positions=at, kv_positions=at, softcap=3.0, scale=0.4,
        bias=torch.randn(4, 50, 50).double(),
    )  # fmt: skip
    scores = 3.0 * torch.tanh(0.4 * (q @ k.repeat_interleave(2, 1).mT) / 3.0) + ctx.bias
    seen = (torch.arange(50) <= torch.arange(50)[:, None]) & (at >= 0)[:, None, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    want = torch.softmax(scores, -1).nan_to_num(0.0)
    want = want[:, :, 0 if last is None else -last :].sum(2)
    got = received(q, k, lse, ctx, tokens_of(q, k, ctx), last)
    torch.testing.assert_close(got, want)


def planted(n=300, at=40):
    """A head whose last queries all look for key `at`; another that looks for `at` + 100."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16)
    for head in range(2):
        u = torch.nn.functional.normalize(torch.randn(16), dim=0)
        k[0, head, at + 100 * head] += 12 * u
        q[0, head, -20:] += 8 * u
    return q, k, v


@pytest.mark.parametrize("text", ["snapkv(budget=40, window=16)", "h2o(heavy=8, recent=32)"])
def test_each_head_keeps_the_key_that_it_needs(text):
    q, k, v = planted()
    cache = EvictingCache()
    step(make(text), cache, q, k, v)
    assert cache.positions.shape == (1, 2, 40)
    for head, key in ((0, 40), (1, 140)):
        mine = cache.positions[0, head].tolist()
        assert key in mine
        assert (180 - key) not in mine
        assert set(range(300 - 16, 300)) <= set(mine)


def test_pooling_keeps_the_neighbours_of_what_counts():
    q, k, v = planted()
    kept = {}
    for kernel in (1, 7):
        cache = EvictingCache()
        step(make(f"snapkv(budget=24, window=16, kernel={kernel})"), cache, q, k, v)
        kept[kernel] = set(cache.positions[0, 0].tolist())
    assert {38, 39, 40, 41, 42} <= kept[7]
    assert not {38, 39, 40, 41, 42} <= kept[1]


def test_sinks_are_reserved_and_counted_in_the_budget():
    q, k, v = planted()
    q[..., :20, :] *= 0
    for text in ("snapkv(budget=40, window=16, sinks=5)", "h2o(heavy=8, recent=32, sinks=5)"):
        cache = EvictingCache()
        step(make(text), cache, q, k, v)
        assert len(cache) == 40
        for head in range(2):
            assert set(range(5)) <= set(cache.positions[0, head].tolist())


def test_h2o_counts_its_budget_at_every_step_and_drops_the_lowest():
    q, k, v = torch.randn(3, 1, 2, 30, 16).double().unbind(0)
    method, cache = make("h2o(heavy=3, recent=2)"), EvictingCache()
    step(method, cache, q[:, :, :5], k[:, :, :5], v[:, :, :5])
    for t in range(5, 30):
        before = cache.scores.clone(), cache.positions.clone()
        at = [x[:, :, t : t + 1] for x in (q, k, v)]
        result = step(method, cache, *at)
        assert len(cache) == 5
        for h in range(2):
            old = dict(zip(before[1][0, h].tolist(), before[0][0, h].tolist(), strict=False))
            places = [*old, t]
            weights = torch.softmax(q[0, h, t] @ k[0, h, places].T / 4, -1)
            torch.testing.assert_close(result.out[0, h, 0], weights @ v[0, h, places])
            score = {p: old.get(p, 0.0) + float(w) for p, w in zip(places, weights)}
            least = min((p for p in places if p < t - 1), key=score.__getitem__)
            assert set(cache.positions[0, h].tolist()) == set(places) - {least}


@pytest.mark.parametrize("text", ["snapkv(budget=64)", "h2o(heavy=0, recent=64)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_oracle_7_prefill_and_decode_are_dense_at_a_full_budget(text, dtype):
    q, k, v = (torch.randn(2, h, 64, 16, dtype=dtype) for h in (4, 2, 2))
    cache = EvictingCache()
    parts = [step(make(text), cache, *(x[:, :, a:b] for x in (q, k, v))).out
             for a, b in ((0, 40), (40, 41), (41, 60), (60, 61), (61, 64))]  # fmt: skip
    dense = attention(q, k, v, causal(), backend="reference").out
    band = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(torch.cat(parts, 2), dense, atol=band, rtol=band)
    assert cache.evicted == 0


def test_the_time_of_choosing_is_told_as_building():
    told = []
    q, k, v = planted()
    step(make("h2o(heavy=8, recent=8)"), EvictingCache(), q, k, v, stats=lambda **x: told.append(x))
    assert len(told) == 1
    assert told[0]["build_seconds"] > 0 < told[0]["attend_seconds"]
    assert told[0]["layout"].pairs == causal().pairs(300, 300)


def test_the_cache_tells_what_it_keeps():
    cache = EvictingCache()
    k, v = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 4)
    assert (len(cache), cache.bytes(), cache.fields) == (0, 0, ())
    cache.update(k, v)
    cache.learn(torch.arange(10) >= torch.tensor([[0], [4]]))
    assert {f.name: f.shape for f in cache.fields} == {
        "keys": (3, 8), "values": (3, 4), "positions": (3,), "scores": (3,),
    }  # fmt: skip
    assert cache.bytes() == 2 * 3 * 10 * (8 + 4 + 1 + 1) * 4
    assert cache.positions[1, 0].tolist() == [PADDING] * 4 + [4, 5, 6, 7, 8, 9]
    cache.keep(torch.arange(10.0).expand(2, 3, -1), 7)
    assert cache.positions[0, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert cache.positions[1, 0].tolist() == [PADDING] + [4, 5, 6, 7, 8, 9]
    cache.update(k[:, :, :1], v[:, :, :1])
    cache.keep(torch.full((2, 3, 8), 0.5), 7)
    # Padding goes before all, else of equal ones the last.
    assert cache.positions[0, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert cache.positions[1, 0].tolist() == [4, 5, 6, 7, 8, 9, 10]
    keys, _ = cache.update(k[:, :, :2], v[:, :, :2])
    assert cache.positions[1, 0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    torch.testing.assert_close(keys[1], torch.cat((k[1, :, 4:], k[1, :, :1], k[1, :, :2]), 1))
    for wrong in (k[:, :, :0], k[:1, :, :1], k[:, :, :1].double()):
        with pytest.raises(InputError):
            cache.update(wrong, v[: len(wrong), :, : wrong.shape[2]])
    with pytest.raises(InputError, match="dropped"):
        cache.truncate(3)


def test_tokens_taken_back_take_their_padding_along():
    cache, k = EvictingCache(), torch.randn(2, 1, 6, 4)
    real = torch.arange(6) >= torch.tensor([[4], [0]])
    cache.update(k, k)
    cache.learn(real)
    assert (cache.pads.tolist(), cache.started) == ([4, 0], True)
    cache.truncate(3)
    assert (cache.pads.tolist(), cache.started) == ([3, 0], False)
    cache.update(k[:, :, :2], k[:, :, :2])
    cache.learn(torch.tensor([[False, True], [True, True]]))
    assert cache.pads.tolist() == [4, 0]
    assert cache.positions[0, 0].tolist() == [PADDING] * 4 + [4]
    with pytest.raises(InputError, match="left only"):
        cache.learn(torch.tensor([[True], [False]]))
    cache.truncate(0)  # nothing is left that a new prompt would have to fit
    cache.update(k[:1], k[:1])
    cache.learn(real[:1])
    assert cache.pads.tolist() == [4]


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv_keeps_what_the_papers_lines_choose(pooling, kernel):
    """Padded rows choose as they would alone; query heads of a group choose together."""
    n, window, budget, pads = 61, 7, 20, (0, 9)
    q, k, v = (torch.randn(2, h, n, 16).double() for h in (6, 2, 2))
    at = torch.arange(n) - torch.tensor(pads)[:, None]
    cache = EvictingCache()
    keys, values = cache.update(k, v)
    method = make(f"snapkv(budget={budget}, window={window}, kernel={kernel}, pooling='{pooling}')")
    mask = causal() & padding(n - torch.tensor(pads))
    method(q, keys, values, Context(mask=mask, q_positions=at, kv_positions=at, cache=cache))
    assert len(cache) == budget
    for b, first in enumerate(pads):
        for h in range(2):
            total = torch.zeros(n - first - window, dtype=torch.float64)
            for query in q[b, 3 * h : 3 * h + 3, -window:].unbind(0):
                s = query @ k[b, h, first:].T / 4
                seen = torch.ones_like(s).tril(n - first - window).bool()
                total += torch.softmax(s.masked_fill(~seen, -torch.inf), -1)[:, :-window].sum(0) / 3
            ends, half = torch.zeros(kernel // 2, dtype=torch.float64), kernel // 2
            runs = torch.cat((ends, total, ends)).unfold(0, kernel, 1)
            pooled = runs.mean(-1) if pooling == "mean" else runs.amax(-1)
            best = {int(i) + first for i in pooled.topk(budget - window).indices}
            got = cache.positions[b, h].tolist()
            assert got[-window:] == list(range(n - window, n))
            if pooling == "max" and half:  # equal maxima: any of those at the edge will do
                edge = pooled.topk(budget - window).values[-1]
                chosen = torch.tensor(got[:-window]) - first
                assert len(set(got)) == budget
                assert (pooled[chosen] >= edge - 1e-12).all()
            else:
                assert set(got[:-window]) == best


@pytest.mark.parametrize(
    "text",
    ["snapkv(budget=8)", "snapkv(kernel=4)", "snapkv(pooling='sum')", "snapkv(window=0)",
     "h2o(heavy=3, sinks=4)", "h2o(recent=0)", "h2o(heavy=-1)"],
)  # fmt: skip
def test_bad_fields_are_refused(text):
    with pytest.raises(InputError):
        make(text)


@pytest.mark.parametrize("more", [1, 3])
def test_ranks_that_are_no_numbers_go_first(more):
    cache = EvictingCache()
    x = torch.randn(1, 2, 6 + more, 4)
    cache.update(x, x)
    rank = torch.arange(6.0 + more).expand(1, 2, -1).clone()
    rank[:, :, -more:] = float("nan")
    cache.keep(rank, 6)
    torch.testing.assert_close(cache.positions, torch.arange(6).expand(1, 2, -1), check_dtype=False)
