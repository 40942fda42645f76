"""ColBERTer's mechanism: bags, gates, scores and losses, against dictionaries and loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate.methods import make
from foveate.methods.colberter import (
    Bags,
    Colberter,
    ColberterHead,
    Encoding,
    Weights,
    Words,
    aggregate,
    best_matches,
    margin_mse,
    mixed,
    open_gates,
    sub_words,
    token_score,
    whole_words,
    word_id,
)
from foveate.methods.naming import make_attention
from foveate.ops.errors import InputError

HASHES = {
    "this": 43431710, "is": 1241338362, "a": 310482890, "sentence": 3608744322, "with": 1672844550,
    "redundant": 3176364122, "words": 4285244379, ",": 3288479184,
    "superlongandconnectedwords": 3315150416, "as": 2141175796, "sentences": 2870031442,
    ".": 720286925,
}  # fmt: skip
DIM = 24


def bag(*place: int) -> Words:
    """A bag whose words are hashed numbers; -1 is a special token."""
    return Words(tuple(word_id(f"w{i}") for i in range(max(place) + 1)), place)


def batch_of(*bags: Words) -> tuple[Tensor, Bags, Tensor]:
    """Random states for bags, and which tokens are real."""
    made = Bags.of(bags)
    lengths = torch.tensor([len(one.place) for one in bags])
    real = torch.arange(made.place.shape[1]) < lengths[:, None]
    return torch.randn(*made.place.shape, DIM, dtype=torch.float64), made, real


def head(**settings) -> ColberterHead:
    made = Colberter(**({"single": 6, "tokens": 4} | settings)).build(DIM).double()
    with torch.no_grad():
        made.gamma.fill_(0.3)
    return made.eval()


def encoding(vectors: Tensor, ids: Tensor, real: Tensor | None = None) -> Encoding:
    return Encoding(
        torch.zeros(len(vectors), 1, dtype=vectors.dtype), vectors, ids,
        ids > 0 if real is None else real,
    )  # fmt: skip


def by_hand(q: Encoding, p: Encoding, row: int, exact: bool) -> float:
    """s_token of one pair by loops, as the paper and its code say."""
    total = 0.0
    for j in range(q.ids.shape[1]):
        if not q.real[row, j]:
            continue
        found = []
        for i in range(p.ids.shape[1]):
            if not p.real[row, i]:
                continue
            same = int(q.ids[row, j]) == int(p.ids[row, i])
            product = math.fsum(
                float(a) * float(b) for a, b in zip(q.vectors[row, j], p.vectors[row, i])
            )
            found.append(product if same or not exact else 0.0)
        total += max(found) if found else 0.0
    return total


# -- words ----------------------------------------------------------------------------------------
def test_oracle_1_hash_vectors():
    assert {word: word_id(word) for word in HASHES} == HASHES


def test_words_hold_their_sub_words_and_repeat_none():
    # "Words, a word ": the comma is a word; "Words" and "word" are one once stemmed.
    words = [("Words", (0, 5)), (",", (5, 6)), ("a", (7, 8)), ("word", (9, 13))]
    tokens = [None, (0, 4), (4, 5), (5, 6), (7, 8), (9, 13), None]
    plain = whole_words(tokens, words)
    assert plain.place == (-1, 0, 0, 1, 2, 3, -1)
    assert plain.texts == ("words", ",", "a", "word")
    assert plain.ids == (HASHES["words"], HASHES[","], HASHES["a"], word_id("word"))
    stemmed = whole_words(tokens, words, lambda word: word.lower().rstrip("s"))
    assert stemmed.place == (-1, 0, 0, 1, 2, 0, -1)
    assert stemmed.word_map[1:] == [stemmed.ids[i] for i in (0, 0, 1, 2, 0)] + [0]
    cut = whole_words(tokens[:4], words, numbered=True)
    assert (cut.ids, cut.word_map) == ((1, 2), [0, 1, 1, 2])  # what was cut off isn't in the bag


def test_sub_words_may_begin_with_blanks():
    # "a word ," as SentencePiece cuts it; of the blanks alone nothing is kept.
    words = [("a", (0, 1)), ("word", (2, 6)), (",", (8, 9))]
    found = whole_words([(0, 1), (1, 4), (4, 6), (6, 7), (7, 9), (9, 10)], words)
    assert found.texts == ("a", "word", ",")
    assert found.place == (0, 1, 1, -1, 2, -1)


def test_sub_words_are_words_of_their_own():
    found = sub_words([101, 7, 9, 7, 102], [True, False, False, False, True])
    assert (found.ids, found.place) == ((7, 9, 7), (-1, 0, 1, 2, -1))


def test_aggregate_is_the_mean_over_all_occurrences_and_reads_no_padding():
    states, bags, _ = batch_of(bag(-1, 0, 0, 1, 2, 0, -1), bag(-1, 0, -1))
    states[bags.place < 0] = torch.nan
    found = aggregate(states, bags)
    torch.testing.assert_close(found[0, 0], states[0, [1, 2, 5]].mean(0))
    torch.testing.assert_close(found[0, 1:3], states[0, 3:5])
    torch.testing.assert_close(found[1, 0], states[1, 1])
    assert not found[1, 1:].any()
    with pytest.raises(InputError, match="aggregate"):
        aggregate(states[:, 1:], bags)


def test_compressing_before_and_after_aggregation_is_the_same():
    states, bags, _ = batch_of(bag(-1, 0, 0, 1, 0, -1), bag(-1, 0, 1, -1))
    linear = torch.nn.Linear(DIM, 5).double()
    before, after = aggregate(linear(states), bags), linear(aggregate(states, bags))
    torch.testing.assert_close(before[bags.real], after[bags.real])


def test_oracle_2_single_unstemmed_sub_words_are_plain_colbert():
    made = head(stopwords=False)
    q_states, q_bags, _ = batch_of(bag(-1, 0, 1, 2, -1), bag(-1, 0, 1, 2, -1))
    p_states, p_bags, _ = batch_of(bag(-1, *range(7), -1), bag(-1, *range(7), -1))
    s = token_score(made(q_states, q_bags, passage=False), made(p_states, p_bags, passage=True))
    with torch.no_grad():
        q, p = made.compressor(q_states[:, 1:-1]), made.compressor(p_states[:, 1:-1])
        plain = torch.einsum("bmd,bnd->bmn", q, p).amax(2).sum(1)
    torch.testing.assert_close(s, plain, atol=1e-5, rtol=1e-5)


def test_oracle_2_ones_stay_ones():
    _, bags, _ = batch_of(bag(-1, 0, 0, 1, 2, 0, -1), bag(-1, 0, -1))
    found = aggregate(torch.ones(*bags.place.shape, 3), bags)
    assert torch.equal(found[bags.real], torch.ones(4, 3))


# -- scores ---------------------------------------------------------------------------------------
def pair(m: int = 5, n: int = 8, d: int = 4, batch: int = 3) -> tuple[Encoding, Encoding]:
    """Random encodings that share some words, with padding."""
    q_ids = torch.stack([torch.randperm(9)[:m] + 1 for _ in range(batch)])
    p_ids = torch.stack([torch.randperm(9)[:n] + 1 for _ in range(batch)])
    q_ids[0, -1] = p_ids[1, -2:] = 0
    q, p = (torch.randn(*x.shape, d, dtype=torch.float64) for x in (q_ids, p_ids))
    return encoding(q, q_ids), encoding(p, p_ids)


@pytest.mark.parametrize("exact", [False, True])
def test_token_score_by_loops(exact):
    q, p = pair()
    found = token_score(q, p, exact=exact)
    for row in range(3):
        assert float(found[row]) == pytest.approx(by_hand(q, p, row, exact), abs=1e-12)
    values, places = best_matches(q, p, exact=exact)
    torch.testing.assert_close(values.sum(1), found)
    assert not values[~q.real].any()
    if not exact:
        at = p.vectors.gather(1, places[..., None].expand_as(q.vectors))
        torch.testing.assert_close((q.vectors * at).sum(-1)[q.real], values[q.real])


def test_a_passage_without_words_adds_nothing():
    q, p = pair()
    empty = replace(p, real=torch.zeros_like(p.real))
    assert not token_score(q, empty).any()


@pytest.mark.parametrize("exact", [False, True])
def test_oracle_3_a_passage_is_a_bag(exact):
    q, p = pair()
    order = torch.randperm(8)
    moved = encoding(p.vectors[:, order], p.ids[:, order])
    twice = encoding(
        torch.cat([p.vectors, p.vectors[:, 2:5]], 1), torch.cat([p.ids, p.ids[:, 2:5]], 1)
    )
    expected = token_score(q, p, exact=exact)
    torch.testing.assert_close(token_score(q, moved, exact=exact), expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(token_score(q, twice, exact=exact), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_4_padding_changes_no_score(dtype):
    made = head().to(dtype)
    for module in (made.stopwords,):
        torch.nn.init.normal_(module.weight)
    bags = [bag(-1, 0, 0, 1, 2, 0, -1), bag(-1, *range(9), 3, -1), bag(-1, 0, -1)]
    states, together, real = batch_of(*bags)
    states = states.to(dtype)
    q = made(states[1:2], Bags.of(bags[1:2]), passage=False)
    p = made(states, together, real, passage=True)
    for row, one in enumerate(bags):
        length = len(one.place)
        alone = made(states[row : row + 1, :length], Bags.of([one]), passage=True)
        for found, expected in zip(made.scores(q, p), made.scores(q, alone)):
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(
                found[row : row + 1].float(), expected.float(), atol=tolerance, rtol=tolerance
            )


def test_oracle_4_mean_pooling_reads_no_padding():
    made = head(pool="mean")
    states, bags, real = batch_of(bag(-1, 0, 1, -1), bag(-1, 0, -1))
    expected = made.retrieval(states[1:, :3].mean(1))
    states[1, 3:] = torch.nan
    torch.testing.assert_close(made(states, bags, real, passage=True).single[1:], expected)


def test_oracle_5_a_dropped_word_and_a_zero_vector_differ_below_zero():
    q = encoding(torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[1, 2]]))
    gates = torch.tensor([[2.0, 0.0]])
    kept = encoding(torch.tensor([[[2.0], [0.0]]]), torch.tensor([[1, 2]]))
    dropped = replace(kept, real=gates > 0)
    zero, drop = (best_matches(q, p, exact=False)[0][0].tolist() for p in (kept, dropped))
    assert zero == [2.0, 0.0]  # the zero vector is a floor for the second query word
    assert drop == [2.0, -2.0]  # and dropping it is not


@pytest.mark.parametrize("training", [False, True])
def test_oracle_5_closed_gates_drop_words_at_inference_only(training):
    made = head()
    torch.nn.init.normal_(made.stopwords.weight, std=3)
    states, bags, real = batch_of(bag(-1, *range(12), -1), bag(-1, *range(9), -1))
    made.train(training)
    p = made(states, bags, real, passage=True)
    closed = (p.gates == 0) & bags.real
    assert 0 < closed.sum() < bags.real.sum()
    assert torch.equal(p.real, bags.real if training else bags.real & ~closed)
    assert not p.vectors[closed].any()
    q = made(states, bags, real, passage=False)
    assert q.gates is None
    assert torch.equal(q.real, bags.real)
    with torch.no_grad():
        plain = aggregate(made.compressor(states), bags)
        r = (plain @ made.stopwords.weight[0] + made.stopwords.bias).clamp(min=0)
    torch.testing.assert_close(p.vectors, r[..., None] * plain)
    torch.testing.assert_close(q.vectors, plain)


def test_gates_begin_open():
    made = Colberter().build(DIM)
    assert made.stopwords.bias.tolist() == [1.0]
    assert made.gamma.item() == 0.0


def test_oracle_6_one_number_and_exact_match_are_a_sparse_product():
    made = head(second=1, exact=True)
    states, bags, real = batch_of(*(bag(-1, *range(n), -1) for n in (3, 9, 5, 1)))
    q = made(states[:1], Bags.of([bag(-1, 0, 1, 2, -1)], bags.place.shape[1]), passage=False)
    p = made(states, bags, real, passage=True)
    q, p = (replace(one, vectors=one.vectors.abs()) for one in (q, p))
    weights = {int(i): float(w) for i, w in zip(q.ids[0], q.vectors[0, :, 0])}
    postings: dict[int, list[tuple[int, float]]] = {}
    for doc in range(4):
        for i, w, there in zip(p.ids[doc], p.vectors[doc, :, 0], p.real[doc]):
            if there:
                postings.setdefault(int(i), []).append((doc, float(w)))
    scores = [0.0] * 4
    for word, weight in weights.items():
        for doc, other in postings.get(word, []):
            scores[doc] += weight * other
    found = token_score(q, p, exact=True)
    torch.testing.assert_close(found, torch.tensor(scores, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (found > 0).all()


def test_oracle_6_non_negative_products_by_dictionary():
    q, p = pair()
    q, p = (replace(one, vectors=one.vectors.abs()) for one in (q, p))
    found = token_score(q, p, exact=True)
    for row in range(3):
        mine, theirs = (
            {int(i): v for i, v in zip(one.ids[row], one.vectors[row]) if i} for one in (q, p)
        )
        expected = sum(float(mine[i] @ theirs[i]) for i in mine.keys() & theirs.keys())
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)


def test_oracle_7_gamma_mixes_and_its_gradient_is_as_written():
    single, token = torch.randn(2, 7, dtype=torch.float64)
    ends = [mixed(single, token, torch.tensor(g, dtype=torch.float64)) for g in (800.0, -800.0)]
    assert torch.equal(ends[0], single)
    assert torch.equal(ends[1], token)
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(7, dtype=torch.float64)
    (grad,) = torch.autograd.grad((mixed(single, token, gamma) * outer).sum(), gamma)
    sigma = 1 / (1 + math.exp(-0.7))
    expected = float((outer * sigma * (1 - sigma) * (single - token)).sum())
    assert float(grad) == pytest.approx(expected, abs=1e-6)


def test_oracle_7_margin_mse_sees_differences_only():
    better, worse, teacher = torch.randn(3, 6, dtype=torch.float64)
    found = margin_mse(better, worse, teacher)
    by_loop = sum(float(b - w - t) ** 2 for b, w, t in zip(better, worse, teacher)) / 6
    assert float(found) == pytest.approx(by_loop)
    torch.testing.assert_close(margin_mse(better + 5, worse + 5, teacher), found)


def test_oracle_8_bytes_of_a_passage():
    plain = Colberter()
    assert plain.bytes_per_passage(43) == 2 * 128 + 43 * 64
    assert Colberter(tokens=8, exact=True).bytes_per_passage(10) == 256 + 10 * (16 + 4)
    assert Colberter(second=1, exact=True).bytes_per_passage(31) == 256 + 31 * 6
    assert plain.flops_per_pair(10, 40) == 2 * 10 * 40 * 32 + 256


# -- training -------------------------------------------------------------------------------------
def test_losses_are_weighted_and_reach_all_weights():
    made = head(second=2).train()
    states, bags, real = batch_of(bag(-1, 0, 1, 2, -1), bag(-1, 0, 1, 0, -1))
    q = made(states, bags, real, passage=False)
    up = made(states.flip(2), bags, real, passage=True)
    down = made(states.roll(1, 2), bags, real, passage=True)
    margin = torch.tensor([1.0, -0.5], dtype=torch.float64)
    losses = made.loss(q, up, down, margin)
    both, cls = (
        ((made.scores(q, up)[i] - made.scores(q, down)[i] - margin) ** 2).mean() for i in (0, 1)
    )
    torch.testing.assert_close(losses["both_loss"], both)
    torch.testing.assert_close(losses["cls_loss"], 0.1 * cls)
    gates = [one.gates[bags.real].mean() for one in (up, down)]
    torch.testing.assert_close(losses["stopword_loss"], 0.75 * (gates[0] + gates[1]))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    plain = head(stopwords=False, learned_mix=False)
    assert not plain.gamma.requires_grad
    q = plain(states, bags, real, passage=False)
    up, down = (plain(x, bags, real, passage=True) for x in (states.flip(2), states.roll(1, 2)))
    found = plain.loss(q, up, down, margin)
    assert set(found) == {"both_loss", "cls_loss"}
    cls = ((plain.scores(q, up)[1] - plain.scores(q, down)[1] - margin) ** 2).mean()
    torch.testing.assert_close(found["cls_loss"], 0.5 * cls)
    none = plain.loss(q, up, down, margin, Weights(1.0, 0.0, 0.0))
    assert float(none["cls_loss"]) == 0.0


def test_gradients_of_a_head_are_those_of_differences():
    made = head(tokens=3).train()
    states, bags, real = batch_of(bag(-1, 0, 1, 0, -1), bag(-1, 0, -1))
    q = made(states, bags, real, passage=False)

    def score(x: Tensor) -> Tensor:
        return made.scores(q, made(x, bags, real, passage=True))[0]

    assert torch.autograd.gradcheck(score, states.clone().requires_grad_())


def test_open_gates_counts_words_that_are_there():
    gates = torch.tensor([[1.0, 0.5, 9.0], [0.0, 9.0, 9.0]])
    real = torch.tensor([[True, True, False], [True, False, False]])
    assert float(open_gates(gates, real)) == pytest.approx(0.5)


# -- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [{"tokens": 0}, {"single": 1.5}, {"second": 32}, {"pool": "max"}, {"exact": 1}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(InputError):
        Colberter(**settings)


def test_it_is_named_by_its_key_and_is_no_attention():
    assert make("colberter(tokens=8, exact=True)") == Colberter(tokens=8, exact=True)
    with pytest.raises(InputError, match="foveate index"):
        make_attention("colberter")


def test_bad_inputs_are_refused():
    made = head()
    states, bags, real = batch_of(bag(-1, 0, 1, -1))
    with pytest.raises(InputError, match="states have shape"):
        made(states[..., 1:], bags, passage=True)
    with pytest.raises(InputError, match="real has shape"):
        made(states, bags, real.long(), passage=True)
    with pytest.raises(InputError, match="at least one text"):
        Bags.of([])
    with pytest.raises(InputError, match="more than 2"):
        Bags.of([bag(-1, 0, -1)], 2)
    with pytest.raises(InputError, match="numbers"):
        token_score(encoding(torch.ones(1, 1, 2), bags.ids[:, :1]),
                    encoding(torch.ones(1, 1, 3), bags.ids[:, :1]))  # fmt: skip
