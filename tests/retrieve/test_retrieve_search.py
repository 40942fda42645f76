"""Search: every workflow against brute force over the mapped vectors, and what is shown of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import retrieve_models as tiny
import torch

from foveate.methods.colberter import Colberter, token_score, word_id
from foveate.methods.colberter.score import Encoding
from foveate.models.whole_words import porter
from foveate.ops.errors import InputError
from foveate.retrieve import build
from foveate.retrieve import evaluate as evaluation
from foveate.retrieve.bm25 import BM25
from foveate.retrieve.collection import Judged
from foveate.retrieve.index import WORKFLOWS, Index
from foveate.retrieve.measure import judge

QUESTION = "virus burns sands, and stars cells"


@pytest.fixture(scope="module")
def exact(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index with exact match, two numbers a word, and documents that changed since."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "encoder").symlink_to(made / "encoder")
    tiny.documents(folder / "documents")
    recipe = Colberter(single=8, tokens=4, second=2, exact=True, pool="mean")
    build.run(tiny.job(folder, recipe=recipe), lambda share, doing: None)
    lines = (folder / "documents" / "corpus.jsonl").read_text().splitlines()
    lines[3] = '{"_id": "d3", "title": "stars", "text": "virus"}'
    lines[4] = '{"_id": "d4", "title": "", "text": ""}'
    lines[5] = '{"_id": "d5", "title": "", "text": "virus"}'
    (folder / "documents" / "corpus.jsonl").write_text("\n".join(lines))
    build.run(tiny.job(folder, recipe=recipe), lambda share, doing: None)
    return Index(folder / "index")


@pytest.fixture(scope="module")
def plain(made: Path) -> Index:
    return Index(made / "index")


def by_hand(index: Index, question: str) -> tuple[torch.Tensor, torch.Tensor]:
    """s_CLS and s_token of all rows, passage by passage, by the paper's definition."""
    query = index.ask(question)
    single, token = [], []
    for one in index.segments:
        for row in range(len(one)):
            start, end = one.starts[row : row + 2].tolist()
            ids = one.ids[start:end][None]
            passage = Encoding(
                one.single[row][None].float(), one.vectors[start:end][None].float(), ids, ids > 0
            )
            single.append(float((query.single @ passage.single.T).squeeze()))
            empty = start == end
            token.append(0.0 if empty else float(token_score(query, passage, exact=index.exact)))
    return torch.tensor(single), torch.tensor(token)


@pytest.mark.parametrize("which", ["plain", "exact"])
def test_every_workflow_is_what_brute_force_finds(which, request):
    index: Index = request.getfixturevalue(which)
    single, token = by_hand(index, QUESTION)
    gamma = index.retriever.model.head.gamma.detach()
    both = torch.sigmoid(gamma) * single + (1 - torch.sigmoid(gamma)) * token
    alive, query = index.alive, index.ask(QUESTION)
    assert int(alive.sum()) == 24
    if which == "exact":
        assert len(alive) == 27  # three were replaced
        asked = set(query.ids[query.real].tolist())
        holds = torch.tensor(
            [bool(asked & set(s.ids[a:b].tolist())) for s in index.segments
             for a, b in zip(s.starts.tolist(), s.starts[1:].tolist())]
        )  # fmt: skip
        assert 3 < int((holds & alive).sum()) < 24
    else:
        holds = torch.ones_like(alive)
    expected = {
        "single": single.masked_fill(~alive, -torch.inf),
        "words": token.masked_fill(~(alive & holds), -torch.inf),
    }
    for name, first in (("refine", "single"), ("words-first", "words")):
        kept = expected[first].topk(7)
        rows = kept.indices[kept.values > -torch.inf]
        expected[name] = torch.full_like(both, -torch.inf).index_put((rows,), both[rows])
    either = torch.maximum(expected["refine"], expected["words-first"])
    expected["hybrid"] = either
    for name in WORKFLOWS:
        if name == "words-first" and which == "plain":
            with pytest.raises(InputError, match="exact match"):
                index.scores(query, name)
            continue
        found = index.scores(query, name, candidates=7)[0]
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-5)
        hits = index.search(QUESTION, top=5, workflow=name, candidates=7)
        order = expected[name].argsort(descending=True)[:5]
        assert [hit.row for hit in hits] == order.tolist()
        assert [hit.passage.key for hit in hits] == [index.passage(r).key for r in order.tolist()]


def test_oracle_6_the_inverted_index_is_the_sum_over_common_words(exact):
    """With one word or none, with negative products, and passages that hold nothing."""
    query = exact.ask(QUESTION)
    signs = torch.tensor([-1.0, 1.0]).repeat(9)[: query.vectors.shape[1], None]
    query = replace(query, vectors=query.vectors * signs)
    weights = {int(i): v for i, v in zip(query.ids[0], query.vectors[0]) if i}
    found = exact.word_scores(query)
    row = negative = alone = 0
    for one in exact.segments:
        for a, b in zip(one.starts.tolist(), one.starts[1:].tolist()):
            bag = dict(zip(one.ids[a:b].tolist(), one.vectors[a:b].float()))
            common = weights.keys() & bag.keys()
            products = {i: float(weights[i] @ bag[i]) for i in common}
            negative += any(x < 0 for x in products.values())
            alone += len(bag) == 1 and bool(common)
            total = sum(max(x, 0.0) if len(bag) > 1 else x for x in products.values())
            if common:
                assert float(found[row]) == pytest.approx(total, abs=1e-5)
            else:
                assert found[row] == -torch.inf
            row += 1
    assert negative
    assert alone
    assert row == 27


def test_what_words_add_sums_up_to_their_score(plain, exact):
    for index in (plain, exact):
        for hit in index.search(QUESTION, top=24, workflow="refine"):
            why = index.why(QUESTION, hit.row)
            assert [m.word for m in why] == QUESTION.replace(",", " ,").split()
            assert sum(m.score for m in why) == pytest.approx(hit.token, abs=1e-4)
            assert all(m.match in hit.passage.text for m in why if m.match is not None)
            if index.exact:
                stem = porter()
                assert all(stem(m.match) == stem(m.word) for m in why if m.match is not None)
                assert all(m.score == 0 for m in why if m.match is None)


def test_a_reduced_index_is_in_half_precision(made, plain):
    model = plain.retriever.model
    passages = build.read_passages(made / "documents")
    found = model([p.text for p in passages[:4]], passage=True)
    one = plain.segments[0]
    torch.testing.assert_close(one.single, found.single.half(), atol=2e-3, rtol=2e-3)
    for row in range(4):
        start, end = one.starts[row : row + 2].tolist()
        assert one.ids[start:end].tolist() == found.ids[row, found.real[row]].tolist()
        expected = found.vectors[row, found.real[row]].half()
        torch.testing.assert_close(one.vectors[start:end], expected, atol=2e-3, rtol=2e-3)


def test_bad_questions_are_refused(plain):
    for settings in ({"top": 0}, {"candidates": 1.5}, {"workflow": "both"}):
        with pytest.raises(InputError):
            plain.search(QUESTION, **settings)
    with pytest.raises(InputError, match="holds no word"):
        plain.search("  ")


def test_words_that_are_unknown_are_words_too(exact):
    row = exact.rows_of()["d3"]
    assert word_id("star") in exact.segments[int(row) and -1].ids.tolist()
    assert exact.search("unheard", workflow="words") == []
    assert len(exact.search("unheard", top=3)) == 3


def test_a_passage_cut_off_by_its_length_is_told(plain):
    long = replace(build.read_passages(plain.folder.parent / "documents")[0], body="stars " * 60)
    (tokens,) = plain.retriever.model.words([long.text])
    assert tokens.cut
    assert len(tokens.ids) == 32
    assert tokens.words.place[-1] == -1


def test_bm25_counts_no_text_that_was_replaced(exact):
    index, judged = exact, Judged(("q",), (QUESTION,), ({"d7": 1.0, "d9": 1.0},))
    seen = {}

    def kept(scores, gains):
        seen["rows"] = scores[0]
        return judge(scores, gains)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "judge", kept)
        evaluation.evaluate(index, judged)  # BM25 is the last one that is judged
    rows = index.alive.nonzero()[:, 0].tolist()
    expected = BM25.of([index.passage(row).text for row in rows]).scores(QUESTION)
    torch.testing.assert_close(seen["rows"][rows], expected)
    assert (seen["rows"][~index.alive] == -torch.inf).all()
