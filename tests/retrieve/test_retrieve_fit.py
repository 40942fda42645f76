"""Training of a retriever: its triples, its teacher, its stages, and going on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import retrieve_models as tiny
import torch

from foveate.hf.fit.job import FileState
from foveate.methods.colberter import Colberter, token_score
from foveate.ops.errors import InputError
from foveate.retrieve import fit
from foveate.retrieve import model as retrievers
from foveate.retrieve.bank import Bank, all_scores, head_encoder, raw_encoder
from foveate.retrieve.bm25 import BM25
from foveate.retrieve.collection import Judged, Passage, read_passages
from foveate.retrieve.lessons import Lessons, question_of
from foveate.retrieve.model import Retriever

SMALL = Colberter(single=8, tokens=4, pool="mean")


@pytest.fixture(scope="module")
def untrained(made: Path) -> Retriever:
    return retrievers.new(str(made / "encoder"), SMALL, length=32)


@pytest.fixture(scope="module")
def passages(made: Path) -> list[Passage]:
    return read_passages(made / "documents")


@pytest.fixture(scope="module")
def lessons(untrained: Retriever, passages: list[Passage]) -> Lessons:
    return Lessons.of(untrained.model, passages, negatives=5, weight=0.5, spread=2.0)


def test_a_passage_asks_its_title_or_its_first_sentence():
    assert question_of(Passage("a", "Stars", "They burn.")) == ("Stars", 7)
    assert question_of(Passage("a", "", "Stars burn. They fade.")) == ("Stars burn.", 12)
    assert question_of(Passage("a", "", "Stars burn")) == ("", 0)
    assert question_of(Passage("a", "Stars", " ")) == ("", 0)


def test_negatives_are_what_bm25_ranks_highest_but_the_answer(lessons, passages):
    bodies = [p.body for p in passages]
    bm25 = BM25.of(bodies)
    for pair, (question, answer) in enumerate(lessons.pairs):
        assert question_of(passages[answer])[0] == passages[answer].title
        scores = bm25.scores(passages[answer].title)
        assert float(lessons.lexical[pair, 0]) == pytest.approx(float(scores[answer]))
        others = scores.clone()
        others[answer] = -1
        expected = others.topk(5)
        torch.testing.assert_close(lessons.lexical[pair, 1:], expected.values)
        assert answer not in lessons.negatives[pair].tolist()
        assert question == pair


def test_a_question_of_the_document_itself_is_left_out_of_it(lessons, passages):
    triples = lessons.batch(0, 3, 8)
    again = lessons.batch(0, 3, 8)
    assert torch.equal(triples.margin, again.margin)
    places = [lessons.passages.tokens.index(t) for t in triples.better.tokens]
    for row, at in enumerate(places):
        title = len(passages[at].text) - len(passages[at].body)
        spans = torch.tensor(lessons.passages.tokens[at].spans)
        inside = (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= title)
        assert inside.any()
        real, place = triples.better.real[row], triples.better.whole.place[row]
        assert not real[: len(inside)][inside].any()
        assert (place[: len(inside)][inside] == -1).all()
        assert real[: len(inside)][~inside].all()
        ids = triples.better.whole.ids[row]
        assert set(place[place >= 0].tolist()) == set((ids > 0).nonzero()[:, 0].tolist())
        parts = triples.better.parts
        assert int((parts.ids[row] > 0).sum()) == int((place >= 0).sum())
    assert triples.query.real.sum() == sum(len(t.ids) for t in triples.query.tokens)


def test_the_teacher_is_maxsim_and_bm25_in_units_of_their_spread(lessons):
    triples = lessons.batch(0, 1, 6)
    raw = raw_encoder(whole=True)
    q, up, down = (
        raw(some, name != "query")
        for name in ("query", "better", "worse")
        for some in (getattr(triples, name),)
    )  # fmt: skip
    soft = token_score(q, up) - token_score(q, down)
    at = [lessons.questions.tokens.index(t) for t in triples.query.tokens]
    worse = [lessons.passages.tokens.index(t) for t in triples.worse.tokens]
    which = [lessons.negatives[i].tolist().index(w) for i, w in zip(at, worse)]
    hard = lessons.lexical[at, 0] - lessons.lexical[at, 1 + torch.tensor(which)]
    one, two, three = lessons.units
    torch.testing.assert_close(triples.margin, 2.0 * (soft / one + 0.5 * hard / two) / three)
    margins = torch.cat([lessons.batch(-1 - n, n, 32).margin for n in range(8)])
    assert float(margins.std()) == pytest.approx(2.0, rel=1e-4)


def test_judged_questions_are_lessons_too(untrained, passages, lessons):
    judged = Judged(("q",), ("virus and stars",), ({"d3": 1.0, "d7": 2.0, "gone": 1.0},))
    more = Lessons.of(untrained.model, passages, lessons.passages, judged, negatives=5)
    assert len(more.pairs) == len(lessons.pairs) + 2
    assert more.own[-2:] == (False, False)
    assert {p for _, p in more.pairs[-2:]} == {3, 7}
    assert not {3, 7} & set(more.negatives[-1].tolist())


def test_what_answers_is_no_negative_in_a_small_folder(untrained):
    """Parts of a file share its title; few others are left to be negatives."""
    parts = [Passage(f"a#{i}", "Stars", f"stars burn {w}. They fade.") for i, w in enumerate("xyz")]
    others = [
        Passage(f"b{i}", w, f"{w} infects lung tissue.") for i, w in enumerate(("virus", "mud"))
    ]
    found = Lessons.of(untrained.model, [*parts, *others])
    for (_, answer), near, lexical in zip(found.pairs, found.negatives.tolist(), found.lexical):
        right = {0, 1, 2} if answer < 3 else {answer}
        assert set(near) == set(range(5)) - right
        assert len(near) == 4
        assert (lexical >= 0).all()
    # One file alone: its title asks nothing, the first sentence of each part does.
    one = Lessons.of(untrained.model, parts)
    assert len(one.questions) == 3
    for answer, (skip, near) in enumerate(zip(one.skip, one.negatives.tolist())):
        assert parts[answer].text[skip:] == "They fade."
        assert set(near) == {0, 1, 2} - {answer}
    same = [Passage(f"a{i}", "", "Stars burn. They fade.") for i in range(3)]
    with pytest.raises(InputError, match="ask too little"):
        Lessons.of(untrained.model, same)


def test_stages_lead_to_the_recipe():
    uni = Colberter(second=1, exact=True)
    assert fit.stages(uni) == [
        Colberter(whole_words=False, stopwords=False), Colberter(), uni,
    ]  # fmt: skip
    assert fit.stages(Colberter()) == fit.stages(uni)[:2]
    first = Colberter(whole_words=False, stopwords=False)
    assert fit.stages(first) == [first]


def test_first_weights_are_main_directions_on_the_teachers_scale(lessons):
    head = Colberter(single=8, tokens=24, stopwords=False, pool="mean").build(24)
    fit.begin(head, lessons)
    q, up, down = fit.encoded(head, lessons.batch(-1, 0, 32))
    raw = [token_score(q, x).detach() for x in (up, down)]
    margins = torch.cat([
        (lambda t: torch.stack([
            t.margin, *(a - b for a, b in zip(*(
                head.scores(fit.encoded(head, t)[0], x)[1:] for x in fit.encoded(head, t)[1:]
            )))
        ], 1))(lessons.batch(-1, n, 32)) for n in range(4)
    ]).detach()  # fmt: skip
    for column in (1, 2):
        slope = (margins[:, 0] @ margins[:, column]) / margins[:, column].square().sum()
        assert float(slope) == pytest.approx(1.0, abs=1e-3)
    assert raw[0].shape == (32,)
    # In full width it is a rotation about the mean: distances are kept, but for one factor.
    states = lessons.passages.some([0, 1]).states[0].float()
    before, after = torch.pdist(states), torch.pdist(head.compressor(states).detach())
    assert float((after / before).std() / (after / before).mean()) < 1e-3


def test_training_lowers_the_loss_and_goes_on_bit_by_bit(lessons, tmp_path):
    plan = fit.Plan(steps=60, batch=8, lr=5e-3)

    def trained(state=None, stop=None):
        torch.manual_seed(0)
        head = SMALL.build(24)
        fit.begin(head, lessons)

        def tell(share: float, doing: str) -> None:
            if stop is not None and share > stop:
                raise KeyboardInterrupt

        return head, fit.train(head, lessons, plan, state=state, tell=tell)

    head, history = trained()
    first, last = (sum(h["both_loss"] for h in part) for part in (history[:10], history[-10:]))
    assert last < first
    assert history[-1]["stopword_loss"] < history[0]["stopword_loss"]
    state = FileState(tmp_path / "training-0.safetensors", "docs", "colberter")
    with pytest.raises(KeyboardInterrupt):
        trained(state, stop=0.9)
    assert len(state.load()[0]["history"]) == 50
    again, told = trained(state)
    assert len(told) == 60
    for one, two in zip(head.parameters(), again.parameters()):
        assert torch.equal(one, two)


def test_the_encoder_can_be_trained_too(made, passages, tmp_path):
    found = fit.fit_on(
        passages, SMALL, fit.Plan(steps=2, batch=4, negatives=3, encoder=True),
        str(made / "encoder"), 32, tmp_path,
    )  # fmt: skip
    before = retrievers.new(str(made / "encoder"), SMALL, length=32).model.encoder
    moved = [
        not torch.equal(a, b) for a, b in zip(found.model.encoder.parameters(), before.parameters())
    ]
    assert sum(moved) > len(moved) / 2
    retrievers.save(tmp_path / "own", found)
    again = retrievers.load(tmp_path / "own")
    assert again.own
    texts = ["stars burn", "virus"]
    with torch.no_grad():
        one, two = (r.model(texts, passage=True) for r in (found, again))
    assert torch.equal(one.vectors, two.vectors)
    assert torch.equal(one.single, two.single)


def test_a_saved_retriever_needs_the_encoder_that_it_was_trained_with(made, untrained, tmp_path):
    told = untrained.facts["encoder"] | {"fingerprint": "other"}
    retrievers.save(tmp_path / "head", replace(untrained, facts={"encoder": told}))
    with pytest.raises(InputError, match="other weights"):
        retrievers.load(tmp_path / "head")
    with pytest.raises(InputError, match="holds no retriever"):
        retrievers.load(tmp_path)
    assert (made / "encoder").is_dir()


def test_scores_of_all_pairs_are_those_of_each(untrained, lessons):
    for exact in (False, True):
        head = replace(SMALL, exact=exact).build(24).eval()
        torch.nn.init.normal_(head.stopwords.weight, std=3)
        encode = head_encoder(head)
        single, token, kept = all_scores(
            encode, lessons.questions, lessons.passages, exact=exact, size=7
        )
        counts = []
        with torch.no_grad():
            for p in range(0, 24, 5):
                passage = encode(lessons.passages.some([p]), True)
                counts.append(int(passage.real.sum()))
                for q in range(0, 24, 7):
                    query = encode(lessons.questions.some([q]), False)
                    _, s, t = head.scores(query, passage)
                    assert float(single[q, p]) == pytest.approx(float(s), abs=1e-4)
                    assert float(token[q, p]) == pytest.approx(float(t), abs=1e-4)
        assert min(counts) < kept < max(counts)


def test_a_bank_gives_back_what_the_encoder_said(untrained, passages):
    bank = Bank.of(untrained.model, [p.text for p in passages[:5]], batch=2)
    some = bank.some([3, 1])
    tokens = untrained.model.words([passages[i].text for i in (3, 1)])
    with torch.no_grad():
        states, real = untrained.model.states(tokens)
    assert torch.equal(some.real, real)
    torch.testing.assert_close(some.states[real], states[real], atol=2e-3, rtol=2e-3)
    assert [t.ids for t in some.tokens] == [t.ids for t in tokens]


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"lr": 0.0}, {"lexical": -1.0}, {"most": 1}, {"spread": 0.0}]
)
def test_bad_plans_are_refused(settings):
    with pytest.raises(InputError):
        fit.Plan(**settings)


def test_too_little_to_train_on_is_refused(untrained):
    with pytest.raises(InputError, match="two documents"):
        Lessons.of(untrained.model, [Passage("a", "", "stars burn")])
    with pytest.raises(InputError, match="ask too little"):
        Lessons.of(untrained.model, [Passage("a", "", "stars"), Passage("b", "", "sea")])
    assert tiny.WORDS
