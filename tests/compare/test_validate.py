"""Bad input: a named error that says what to do, before any weights are loaded."""

import pytest

from foveate.compare import run, validate
from foveate.compare.options import Options
from foveate.ops.errors import FoveateError, InputError, MissingPackageError, UnknownMethodError
from foveate.runs.text import load_text


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(run, "load_weights", refuse)


@pytest.fixture
def base(tiny, prose, tmp_path):
    return {"model": str(tiny), "text": str(prose), "out": str(tmp_path / "out"),
            "lengths": "256,512"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": "sinkwindow"}, UnknownMethodError, "did you mean 'sink-window'"),
        ({"methods": "full,,full"}, InputError, "method is missing"),
        ({"methods": "sink-window(window=0)"}, InputError, "window"),
        ({"methods": "sink-window(windows=3)"}, InputError, "window"),
        (
            {
                "methods": "full(",
            },
            InputError,
            "missing",
        ),
        ({"lengths": "256,2048"}, InputError, "beyond the 1024 positions"),
        ({"lengths": "many"}, InputError, "1024,2048,4096"),
        ({"lengths": "0"}, InputError, "no number of tokens"),
        ({"lengths": "-5"}, InputError, "no number of tokens"),
        ({"lengths": "64"}, InputError, "little room beside the pass key"),
        ({"dtype": "int8"}, InputError, "--dtype int8 is not known"),
        ({"dtype": "fp16"}, InputError, "for GPUs"),
        ({"device": "gpu"}, InputError, "expected cpu, cuda"),
        ({"device": "cuda:99"}, InputError, "CUDA devices"),
        ({"device": "meta"}, InputError, "cpu and cuda"),
        ({"batch": 0}, InputError, "--batch 0"),
        ({"repeats": 0}, InputError, "--repeats 0"),
        ({"threads": 0}, InputError, "--threads 0"),
        ({"decode_tokens": -1}, InputError, "--decode-tokens -1"),
        ({"decode_tokens": 3}, InputError, "too few for an answer"),
        ({"needle_depths": "0.5,2"}, InputError, "between 0 and 1"),
        ({"needle_depths": "deep"}, InputError, "between 0 and 1"),
        ({"max_ppl_loss": -0.1}, InputError, "--max-ppl-loss"),
        ({"max_needle_loss": float("nan")}, InputError, "--max-needle-loss"),
        ({"text": "nowhere.txt"}, InputError, "no such file"),
        ({"text": "."}, InputError, "is a folder"),
        ({"text": "nowhere.wav"}, InputError, "no such file"),
        ({"model": "./nowhere"}, InputError, "no folder"),
        ({"model": "nobody/no-such-model-xyz"}, InputError, "no-such-model-xyz"),
        ({"model": "smollm"}, InputError, "'smollm2'"),
    ],
)
def test_bad_options(base, changes, error, words):
    with pytest.raises(error, match=".*") as caught:
        run.compare(Options(**(base | changes)))
    assert words in str(caught.value)
    assert isinstance(caught.value, FoveateError)


def test_text_shorter_than_the_longest_length(base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Few words. " * 30)
    with pytest.raises(InputError, match="330 characters, too few for the longest length, 512"):
        run.compare(Options(**(base | {"text": str(short)})))
    wide = tmp_path / "wide.txt"
    wide.write_text("日本" * 100)  # 600 bytes, so 600 tokens of this tokenizer: long enough
    job = validate.validate(Options(**(base | {"text": str(wide)})))
    assert len(job.tokens) == 600


def test_text_that_is_too_short_only_in_tokens(base, tmp_path, tiny):
    from transformers import AutoTokenizer

    folder = tmp_path / "wordy"
    import shutil

    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["The river rose."])
    tokenizer.save_pretrained(folder)
    text = tmp_path / "river.txt"
    text.write_text("The river rose." * 100)
    with pytest.raises(InputError, match=r"100 tokens, too few for the longest length, 512"):
        run.compare(Options(**(base | {"model": str(folder), "text": str(text)})))


@pytest.mark.parametrize("content", [b"", b"   \n", b"\xff\xfe\x00a", b"abc\x00def"])
def test_files_that_are_no_text(base, tmp_path, content):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    with pytest.raises(InputError, match="UTF-8|empty|NUL"):
        run.compare(Options(**(base | {"text": str(bad)})))


def test_an_output_folder_that_cannot_be_written(base, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/below"):
        with pytest.raises(InputError, match="--out"):
            run.compare(Options(**(base | {"out": str(tmp_path / out)})))


def test_corrupt_results_are_kept_aside_before_any_weights_load(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_bytes(b"garbage\n")
    with pytest.raises(InputError, match="kept as results.corrupt-1.jsonl"):
        run.compare(Options(**base))
    assert (out / "results.corrupt-1.jsonl").read_bytes() == b"garbage\n"


def test_a_model_folder_without_weights_or_with_pickles_only(base, tiny, tmp_path):
    import shutil

    for name, words in ((None, "no weights"), ("pytorch_model.bin", "only pickled weights")):
        folder = tmp_path / str(name)
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").unlink()
        if name:
            (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(InputError, match=words):
            run.compare(Options(**(base | {"model": str(folder)})))


def test_without_matplotlib_it_says_what_to_install(base, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else real(n, *a)
    )
    with pytest.raises(MissingPackageError, match=r"pip install 'foveate\[report\]'"):
        run.compare(Options(**base))


def test_good_input_passes(base):
    job = validate.validate(Options(**base))
    assert job.lengths == (256, 512)
    assert job.passes == 3
    assert len(job.entries) == 5
    assert validate.validate(Options(**(base | {"lengths": "1k"}))).lengths == (1024,)
    fewer = validate.validate(Options(**(base | {"needle_depths": "none", "repeats": 1})))
    assert (fewer.depths, fewer.passes) == ((), 1)
    free = validate.validate(Options(**(base | {"lengths": None})))
    assert free.lengths == (1024,)


def test_the_shipped_text_is_the_file_that_its_readme_describes():
    import hashlib
    import re

    from foveate.runs.text import DATA

    folder = DATA / "wikitext2"
    readme = (folder / "README.md").read_text()
    packed = (folder / "wiki.test.tokens.xz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() in readme
    assert f"{len(packed):,} bytes" in readme
    assert len(packed) <= 400_000
    assert "CC BY-SA 3.0" in (folder / "LICENSE.txt").read_text()
    text = load_text().content
    assert len(text) > 1_000_000
    assert not re.search(r" @[-,.]@ | 's | n't | ,|\n\n\n", text)
    assert text.startswith("== Robert <unk> ==\n")
    assert "guest-starring role" in text


def test_detokenising_loses_only_blanks_and_marks():
    import lzma

    from foveate.runs.text import DATA

    raw = lzma.decompress((DATA / "wikitext2" / "wiki.test.tokens.xz").read_bytes()).decode()

    def bare(text):
        return "".join(c for c in text if c.isalnum())

    assert bare(load_text().content) == bare(raw)
