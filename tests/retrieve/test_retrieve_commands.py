"""`foveate index` and `foveate search` as they are typed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import retrieve_models as tiny
from test_retrieve_index import silent

from foveate.cli import main
from foveate.retrieve import build
from foveate.retrieve.collection import read_judged, read_passages
from foveate.retrieve.evaluate import evaluate
from foveate.retrieve.index import Index


def typed(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def test_index_and_search_a_folder_of_texts(made, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, line in enumerate(read_passages(made / "documents")[:6]):
        (folder / f"{number}.txt").write_text(f"{line.title}\n\n{line.body}\n")
    options = (
        f"--encoder {made / 'encoder'} --single 8 --tokens 4 --second 1 --exact --steps 2 "
        f"--length 32 --batch 4 --out {tmp_path / 'index'}"
    )
    code, out, _ = typed(f"index {folder} {options}", capsys)
    assert code == 0
    assert "6 passages in" in out
    assert "kept words at 1 with ids" in out
    assert f'foveate search {tmp_path / "index"} "..."' in out.replace("\n", " ")
    code, out, _ = typed(f"index {folder} --out {tmp_path / 'index'} --json", capsys)
    told = json.loads(out)
    assert (code, told["encoded"], told["passages"]) == (0, 0, 6)
    assert told["storage"]["bytes"]["measured"] == told["storage"]["bytes"]["formula"]
    question = (folder / "2.txt").read_text().splitlines()[0]
    code, out, _ = typed(f"search {tmp_path / 'index'} '{question}' --top 2 --json", capsys)
    hits = json.loads(out)
    assert (code, len(hits)) == (0, 2)
    assert hits[0]["score"] >= hits[1]["score"]
    assert sum(w["score"] for w in hits[0]["words"]) == pytest.approx(hits[0]["token"], abs=1e-4)
    for workflow in ("words-first", "hybrid", "single", "words"):
        code, out, _ = typed(
            f"search {tmp_path / 'index'} '{question}' --workflow {workflow}", capsys
        )
        assert code == 0
        assert "1. " in out


def test_measure_an_index(made, tmp_path, capsys):
    titles = [(p.key, p.title) for p in read_passages(made / "documents")]
    rows = [json.dumps({"_id": key, "text": title}) for key, title in titles]
    (tmp_path / "queries.jsonl").write_text("\n".join(rows))
    (tmp_path / "qrels_test.tsv").write_text(
        "q\td\tg\n" + "".join(f"{k}\t{k}\t1\n" for k, _ in titles)
    )
    code, out, _ = typed(f"search {made / 'index'} --judged {tmp_path} --json", capsys)
    told = json.loads(out)
    assert code == 0
    assert told["questions"] == 24
    assert set(told["found"]) == {"refine", "hybrid", "single", "words", "BM25"}
    assert told["found"]["BM25"]["nDCG@10"] > 0.9  # titles are part of the documents
    index = Index(made / "index")
    ranks = []
    for key, title in titles:
        hits = [hit.passage.key for hit in index.search(title, top=10, workflow="words")]
        ranks.append(hits.index(key) if key in hits else None)
    found = sum(rank is not None for rank in ranks) / 24
    assert told["found"]["words"]["recall@100"] >= found
    code, out, _ = typed(f"search {made / 'index'} --judged {tmp_path}", capsys)
    assert "24 questions" in out
    assert "whole words at 4" in out
    again = evaluate(index, read_judged(tmp_path))
    assert again["found"] == told["found"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("search {0}/index", "Give a question"),
        ("search {0}/index x --judged {0}", "Give a question"),
        ("search {0}/documents x", "holds no index"),
        ("search {0}/index x --workflow both", "No workflow 'both'"),
        ("search {0}/index x --workflow words-first", "exact match"),
        ("search {0}/index x --top 0", "top=0"),
        ("search {0}/index --judged {0}", "holds no judged questions"),
        ("index {0}/nowhere", "is no folder"),
        ("index {0}/documents --out {0}/index --tokens 8", "--fresh"),
        ("index {0}/documents --out {0}/other --steps 0", "steps"),
        ("index {0}/documents --out {0}/other --encoder smollm2x", "smollm2x"),
        ("index {0}/documents --out {0}/documents/corpus.jsonl", "is a file"),
    ],
)
def test_what_is_wrong_is_said(made: Path, capsys, line, message):
    code, _, err = typed(line.format(made), capsys)
    assert code == 2
    assert message in err
    assert len(Index(made / "index")) == 24


def test_a_trained_retriever_is_taken_for_other_documents(made, tmp_path, capsys):
    tiny.documents(tmp_path / "documents", 5, seed=3)
    own = next((made / "index").glob("model-*"))
    code, _, _ = typed(
        f"index {tmp_path / 'documents'} --retriever {own} --out {tmp_path / 'index'}", capsys
    )
    assert code == 0
    assert len(Index(tmp_path / "index")) == 5
    found = build.run(tiny.job(made), silent)
    assert found["encoded"] == 0


def test_the_shipped_collection_is_whole():
    passages = read_passages("scifact")
    assert len(passages) == 5183
    train, test = (read_judged("scifact", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (809, 300)
    assert sum(map(len, test.gains)) == 339
    keys = {p.key for p in passages}
    assert all(set(gains) <= keys for gains in (*train.gains, *test.gains))
