"""Documents and judged questions from folders, measures, and BM25 against its formula."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch

from foveate.ops.errors import InputError
from foveate.retrieve.bm25 import BM25
from foveate.retrieve.collection import Passage, read_judged, read_passages
from foveate.retrieve.measure import judge, ndcg, recall, refined


def test_text_files_are_cut_into_passages_at_paragraphs(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("# Stars\n\nThey burn.\n\nThey fade slowly now.\n")
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbfone two three four five six seven\r\n\r\neight\n"
    )
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "other.csv").write_text("no")
    found = read_passages(tmp_path, words=4)
    assert [p.key for p in found] == ["a.txt", "deep/b.md#1", "deep/b.md#2"]
    by_key = {p.key: p for p in found}
    assert by_key["deep/b.md#1"] == Passage("deep/b.md#1", "Stars", "They burn.")
    assert by_key["deep/b.md#2"].body == "They fade slowly now."
    assert by_key["deep/b.md#1"].text == "Stars. They burn."
    long = tmp_path / "long"
    long.mkdir()
    (long / "x.txt").write_text(" ".join(f"w{i}" for i in range(25)))
    assert [p.body.split()[0] for p in read_passages(long, words=10)] == ["w0", "w10", "w20"]


def test_a_beir_folder_is_read(tmp_path):
    rows = [{"_id": "1", "title": "Stars", "text": "burn"}, {"_id": 2, "sentences": ["a.", "b."]}]
    with lzma.open(tmp_path / "corpus.jsonl.xz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    assert read_passages(tmp_path) == [Passage("1", "Stars", "burn"), Passage("2", "", "a. b.")]
    (tmp_path / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "x"}\n{"_id": "q2", "text": "y"}\n'
    )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\t1\t2\nq2\t2\t0\n")
    judged = read_judged(tmp_path)
    assert (judged.keys, judged.texts, judged.gains) == (("q2",), ("y",), ({"1": 2.0},))
    with pytest.raises(InputError, match="judged questions"):
        read_judged(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", b'{"_id": 1', "line 1 is no JSON"),
        ("corpus.jsonl", b'{"title": "x"}', "lacks _id"),
        ("corpus.jsonl", b'{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}', "called '1'"),
        ("corpus.jsonl.xz", b"no", "can't be read"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.txt", b"a\0b", "NUL"),
        ("a.csv", b"a", "holds no documents"),
    ],
)
def test_bad_documents_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_passages(tmp_path)


def test_bad_judgements_are_refused(tmp_path):
    (tmp_path / "claims.jsonl").write_text('{"_id": 1, "text": "x"}')
    for content, message in (
        ("a\tb\tc\n1\t2", "line 2"),
        ("a\tb\tc\n9\t2\t1", "names no question"),
    ):
        (tmp_path / "qrels_test.tsv").write_text(content)
        with pytest.raises(InputError, match=message):
            read_judged(tmp_path)
    with pytest.raises(InputError, match="words"):
        read_passages(tmp_path, words=0)


def test_measures_by_hand():
    gains = {3: 2.0, 5: 1.0}
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert ndcg([1, 3, 5], gains) == pytest.approx((2 / math.log2(3) + 1 / math.log2(4)) / ideal)
    assert ndcg([3, 5], gains) == pytest.approx(1.0)
    assert ndcg([1] * 10 + [3], gains) == 0.0
    assert recall([1, 3, 2, 5], gains, 3) == 0.5
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 3.0, -torch.inf, 1.0]])
    found = judge(scores, [{3: 1.0}, {2: 1.0}], first=2, among=3)
    assert found == {"nDCG@2": pytest.approx(0.5 / math.log2(3)), "recall@3": 0.5}
    with pytest.raises(InputError):
        judge(scores, [{1: 1.0}])
    with pytest.raises(InputError):
        judge(scores, [{1: 1.0}, {}])


def test_refining_ranks_the_candidates_of_the_first_score():
    first, full = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 9.0, 5.0]])
    assert refined(first, full, 2).tolist() == [[1.0, -math.inf, 5.0]]
    assert refined(first, full, 9).tolist() == full.tolist()


def test_bm25_is_its_formula():
    texts = ["stars burn stars", "the virus", "stars and the virus fade and burn"]
    found = BM25.of(texts, stem=False).scores("stars virus unheard")
    bags = [text.split() for text in texts]
    mean = sum(map(len, bags)) / 3
    for bag, score in zip(bags, found.tolist()):
        expected = 0.0
        for word in ("stars", "virus"):
            n, tf = sum(word in b for b in bags), bag.count(word)
            idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
            expected += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(bag) / mean))
        assert score == pytest.approx(expected, abs=1e-5)
    assert BM25.of(texts).scores("unheard").tolist() == [0.0] * 3
    assert BM25.of(texts).scores("star")[0] > 0
    with pytest.raises(InputError):
        BM25.of(["", " "])
