"""The index on disk: whole or not at all, gone on with, added to, checked, read by two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import retrieve_models as tiny
import torch

from foveate.methods.colberter import Colberter
from foveate.ops.errors import InputError
from foveate.retrieve import build, files, segment, writer
from foveate.retrieve.collection import Passage
from foveate.retrieve.files import DamagedError
from foveate.retrieve.index import Index
from foveate.retrieve.writer import Writer, read_index

SRC = Path(__file__).resolve().parents[2] / "src"
DATA = ("single.f16", "words.f16", "ids.u32", "counts.u16", "texts.jsonl", "places.i64")


def silent(share: float, doing: str) -> None:
    """Nobody listens."""


def content(index: Path) -> dict[str, bytes]:
    """All that readers see, by name."""
    entry = read_index(index)
    found = {
        f"{e['name']}/{f}": (index / "segments" / e["name"] / f).read_bytes()
        for e in entry["segments"] for f in DATA
    }  # fmt: skip
    return found | {"list": json.dumps(entry).encode()}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of passages that are encoded from here on."""
    seen: list[int] = []
    before = build.encode

    def encode(retriever, passages, *more):
        seen.append(len(passages))
        return before(retriever, passages, *more)

    monkeypatch.setattr(build, "encode", encode)
    return seen


def test_killed_half_way_it_is_never_half_readable_and_goes_on(place, made, monkeypatch):
    env = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    index = place / "index"
    process = subprocess.Popen(
        [sys.executable, str(Path(tiny.__file__)), str(place), "0.3"],
        env=env, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 300
        noted = 0
        while noted < 2:
            assert time.monotonic() < limit
            assert process.poll() is None, "it ended before it could be killed"
            begun = files.read_json(index / writer.BUILDING)
            noted = len(begun["segments"]) if begun else 0
            time.sleep(0.02)
        with pytest.raises(InputError, match="Another foveate command"):
            build.run(tiny.job(place), silent)
        with pytest.raises(InputError, match="isn't finished: 8|isn't finished: 12"):
            Index(index)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with pytest.raises(InputError, match="Run the same foveate index again"):
        Index(index)
    seen = counted(monkeypatch)
    found = build.run(tiny.job(place), silent)
    assert found["passages"] == 24
    assert sum(seen) == found["encoded"] <= 16
    ours, theirs = content(index), content(made / "index")
    ours["list"], theirs["list"] = (
        json.dumps(read_index(at)["segments"]).encode() for at in (index, made / "index")
    )
    assert ours == theirs  # as if it had never been killed; the encoder's path alone is another
    assert not (index / writer.BUILDING).exists()


class Killed(Exception):
    """Stands for a kill at this very call."""


def written(index: Path, passages: list[Passage], per: int = 2) -> None:
    """What `build.run` does with the folder, with vectors that cost nothing."""
    with Writer(index) as open_:
        settings = open_.settings or {"model": "model-x", "single": 2, "width": 1, "exact": False}
        missing = open_.plan(passages)
        open_.begin(settings, len(passages))
        for start in range(0, len(missing), per):
            some = missing[start : start + per]
            rows = [
                (
                    torch.full((2,), float(len(p.body))),
                    torch.ones(2, 1),
                    torch.tensor([5, 2**32 - 1]),
                )
                for p in some
            ]
            open_.add(some, rows, {})
        open_.finish(passages)


def alive(index: Path) -> dict[str, str]:
    """Key and digest of what readers find, every file compared with its checksum."""
    found = {}
    for entry in read_index(index)["segments"]:
        segment.check(index / "segments", entry)
        one = segment.load(index / "segments", entry, 2, 1)
        assert one.ids.tolist() == [5, 2**32 - 1] * len(one)
        for row in one.alive.nonzero()[:, 0].tolist():
            passage = one.passage(row)
            assert one.single[row, 0] == len(passage.body)
            found[passage.key] = passage.digest
    return found


def test_stopped_at_any_write_readers_see_the_old_index_or_the_new(tmp_path):
    passages = [Passage(f"d{i}", "", "x" * (i + 1)) for i in range(3)]
    old = {p.key: p.digest for p in passages}
    changed = [replace(passages[0], body="changed"), *passages[1:]]
    more = changed + [Passage(f"e{i}", "", "y" * (i + 1)) for i in range(2)]
    new = {p.key: p.digest for p in more}
    written(tmp_path / "old", passages)
    stops = seen_new = 0
    for step in range(1000):
        index = Path(shutil.copytree(tmp_path / "old", tmp_path / str(step)))
        left = [step]

        def stopping(function, left=left):
            def called(*args, **named):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return function(*args, **named)

            return called

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", stopping(lambda handle: None))  # the disk's own is slow
            for name in ("replace", "rename"):
                patch.setattr(os, name, stopping(getattr(os, name)))
            try:
                written(index, more)
            except Killed:
                stops += 1
        found = alive(index)
        assert found in (old, new)
        seen_new += found == new
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)
            written(index, more)
        assert alive(index) == new
        names = {entry["name"] for entry in read_index(index)["segments"]}
        assert {path.name for path in (index / "segments").iterdir()} == names
        assert not (index / writer.BUILDING).exists()
        if stops == step:
            break
    assert stops > 20
    assert 1 <= seen_new < 5  # the run that wasn't stopped, and those that were behind the switch


@pytest.mark.parametrize("file", DATA)
def test_a_damaged_file_is_refused_by_its_checksum(made, tmp_path, file):
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    path = index / "segments" / read_index(index)["segments"][1]["name"] / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=f"{file} is damaged: its checksum"):
        Index(index)
    if file == "texts.jsonl":
        (tmp_path / "encoder").symlink_to(made / "encoder")
        tiny.documents(tmp_path / "documents")
        with pytest.raises(DamagedError, match=r"texts\.jsonl is damaged"):
            build.run(replace(tiny.job(tmp_path), recipe=None, encoder=None, length=None), silent)
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedError, match="its size"):
        Index(index, check=False)
    path.unlink()
    with pytest.raises(DamagedError, match="is gone"):
        Index(index)


@pytest.mark.parametrize("name", ["index.json", "head.safetensors", "colberter.json"])
def test_a_damaged_list_or_retriever_is_refused(made, tmp_path, name):
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    (path,) = index.rglob(name)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1", b"2", 1) if name.endswith("json") else data[:-1] + b"!")
    with pytest.raises(DamagedError, match="damaged"):
        Index(index)
    with pytest.raises(InputError, match="damaged"):
        build.run(replace(tiny.job(made), out=index), silent)


def test_documents_are_added_changed_and_removed(made, tmp_path, monkeypatch):
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    folder = tiny.documents(tmp_path / "documents", 27)
    job = replace(tiny.job(tmp_path), recipe=None, encoder=None, length=None)
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    changed = json.loads(lines[5]) | {"text": "stars fade. stars burn."}
    kept = [*lines[:5], json.dumps(changed), *lines[7:]]
    (folder / "corpus.jsonl").write_text("\n".join(kept))
    seen = counted(monkeypatch)
    found = build.run(job, silent)
    assert (sum(seen), found["passages"], found["gone"]) == (4, 27, 1)  # d6 stays, d5 is replaced
    opened = Index(index)
    assert opened.passage(opened.rows_of()["d5"]).body == "stars fade. stars burn."
    best = opened.search("stars fade stars burn", top=27, workflow="words")
    assert [hit.passage.key for hit in best].count("d5") == 1
    assert build.run(replace(job, prune=True), silent)["passages"] == 26
    assert "d6" not in Index(index).rows_of()
    assert build.run(replace(job, prune=True), silent)["encoded"] == 0
    (folder / "corpus.jsonl").write_text("\n".join([*kept, lines[6]]))
    assert build.run(job, silent)["encoded"] == 0  # it was there all along
    assert "d6" in Index(index).rows_of()


def test_a_fresh_index_replaces_the_old_one_in_one_step(made, tmp_path):
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    (tmp_path / "encoder").symlink_to(made / "encoder")
    tiny.documents(tmp_path / "documents", 8, seed=1)
    before = Index(index)
    other = Colberter(single=4, tokens=2, second=1, exact=True, pool="mean")
    job = tiny.job(tmp_path, recipe=other, fresh=True)
    with pytest.raises(InputError, match="--fresh"):
        build.run(replace(job, fresh=False), silent)
    assert content(index) == content(made / "index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.Writer, "finish", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build.run(job, silent)
    assert content(index) == content(made / "index")
    assert len(before.search("stars burn", workflow="words")) == 10
    found = build.run(replace(job, fresh=False), silent)  # goes on with the fresh one
    assert (found["encoded"], found["passages"]) == (0, 8)
    assert Index(index).exact
    hits = before.search("stars burn", top=24, workflow="words")  # what it mapped is there still
    assert len({hit.passage.key for hit in hits}) == 24
    names = {e["name"] for e in read_index(index)["segments"]}
    assert {p.name for p in (index / "segments").iterdir()} == names


def test_two_writers_and_a_reader(made, tmp_path):
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    with Writer(index):
        with pytest.raises(InputError, match="Another foveate command"):
            Writer(index)
        assert len(Index(index)) == 24
    Writer(index).close()


def test_a_reader_that_a_fresh_index_overtakes_reads_the_new_one(made, tmp_path, monkeypatch):
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    old = read_index(index)
    other = Path(shutil.copytree(index / "segments", index / "moved"))
    shutil.rmtree(index / "segments")
    new = old | {"segments": []}
    answers = [old, new, new, new]
    monkeypatch.setattr("foveate.retrieve.index.read_index", lambda folder: answers.pop(0))
    assert len(Index(index)) == 0
    assert other.is_dir()


def test_a_reader_that_meets_half_a_removed_model_reads_the_new_index(made, tmp_path, monkeypatch):
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    new = read_index(index)
    half = shutil.copytree(index / new["settings"]["model"], index / "model-old")
    (half / "head.safetensors").unlink()  # as a writer does it, file by file
    old = new | {"settings": new["settings"] | {"model": "model-old"}}
    answers = [old, new, new]
    monkeypatch.setattr("foveate.retrieve.index.read_index", lambda folder: answers.pop(0))
    assert len(Index(index)) == 24
    answers[:] = [old, old]
    with pytest.raises(DamagedError, match="model-old is damaged"):
        Index(index)


@pytest.mark.parametrize("half", [False, True])
def test_the_same_head_with_other_facts_is_another_model(made, tmp_path, half):
    """--fresh with a plan that trains the same weights, and over what a kill left of a model."""
    index = tmp_path / "index"
    shutil.copytree(made / "index", index)
    own = index / read_index(index)["settings"]["model"]
    given = Path(shutil.copytree(own, tmp_path / "given"))
    config = json.loads((given / "colberter.json").read_text())
    config["facts"]["note"] = "other"
    (given / "colberter.json").write_text(json.dumps(config))
    job = replace(
        tiny.job(made), out=index, recipe=None, encoder=None, length=None, retriever=given,
        fresh=True,
    )  # fmt: skip
    build.run(job, silent)
    new = index / read_index(index)["settings"]["model"]
    if half:
        shutil.copytree(new, tmp_path / "kept")
        shutil.rmtree(index)
        shutil.copytree(made / "index", index)
        shutil.copytree(tmp_path / "kept", new)
        (new / "head.safetensors").unlink()
        build.run(job, silent)
    opened = Index(index)
    assert len(opened) == 24
    assert opened.retriever.facts["note"] == "other"


def test_oracle_8_the_formula_is_the_bytes_of_the_files(made, tmp_path):
    for recipe in (None, Colberter(single=6, tokens=4, second=1, exact=True, pool="mean")):
        index = made / "index"
        if recipe is not None:
            (tmp_path / "encoder").symlink_to(made / "encoder")
            tiny.documents(tmp_path / "documents")
            build.run(tiny.job(tmp_path, recipe=recipe), silent)
            index = tmp_path / "index"
        opened = Index(index)
        own = opened.retriever.model.recipe
        counts = torch.cat([s.starts.diff() for s in opened.segments]).tolist()
        names = DATA[:3] if own.exact else DATA[:2]
        paths = [p for p in (index / "segments").rglob("*") if p.name in names]
        size = sum(p.stat().st_size for p in paths)
        assert size == sum(own.bytes_per_passage(n) for n in counts)
        told = opened.storage()["bytes"]
        assert told["measured"] == told["formula"] == size / 24
        whole = sum(p.stat().st_size for p in (index / "segments").rglob("*") if p.is_file())
        assert told["on_disk"] == whole / 24


def test_storage_counts_words_as_they_are(made):
    opened = Index(made / "index")
    told = opened.storage()
    passages = build.read_passages(made / "documents")
    tokens = opened.retriever.model.words([p.text for p in passages])
    words = [len(set(t.words.ids)) for t in tokens]
    subs = [len(t.ids) - 2 for t in tokens]
    assert told["vectors"]["sub-words"] == pytest.approx(sum(subs) / 24)
    assert told["vectors"]["whole words"] == pytest.approx(sum(words) / 24)
    assert told["bytes"]["sub-words at 24"] == pytest.approx(2 * 24 * sum(subs) / 24)
    assert told["bytes"]["whole words at 4"] == pytest.approx(16 + 8 * sum(words) / 24)
    assert told["vectors"]["kept words"] <= told["vectors"]["whole words"]


def test_wrong_folders_and_options_are_refused(made, tmp_path, place):
    with pytest.raises(InputError, match="foveate index DOCS"):
        Index(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        build.run(replace(tiny.job(tmp_path), documents=tmp_path / "none"), silent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no documents"):
        build.run(replace(tiny.job(place), documents=tmp_path / "empty"), silent)
    with pytest.raises(InputError, match="leave out"):
        build.run(tiny.job(place, retriever=made), silent)
    with pytest.raises(InputError, match="has length 32, not 16"):
        build.run(replace(tiny.job(made), length=16), silent)
    with pytest.raises(InputError, match="batch"):
        build.run(replace(tiny.job(place), batch=0), silent)
    assert not (place / "index").exists()
    for one in segment.FILES:
        assert one in DATA
