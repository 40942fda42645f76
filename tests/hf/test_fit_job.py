"""The job of `foveate fit`: made once, found again, and never taken for another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny

from foveate.hf.fit import job
from foveate.hf.load import ModelInfo
from foveate.methods.dhsa import fit as dhsa_fit
from foveate.methods.flux import fit as flux_fit
from foveate.ops.errors import InputError

WORDS = " ".join("abcdefghij"[i * 7 % 10] * (1 + i % 5) for i in range(4000))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dhsa_fit, "STEPS", 4)
    model = tiny("llama")
    info = ModelInfo("tiny", None, None, "causal-lm", "", None, model.config)
    letters = lambda text, **_: type("Ids", (), {"input_ids": [ord(c) % 97 for c in text]})()  # noqa: E731
    monkeypatch.setattr(job, "locate", lambda *_, **__: info)
    monkeypatch.setattr(job, "load_tokenizer", lambda _: letters)
    monkeypatch.setattr(job, "load_weights", lambda *_, **__: model)
    return job.Job(None, "dhsa", ("words", WORDS), length=160)


def run(one):
    return job.run(one, lambda share, doing: None)


def test_a_fit_is_made_once_and_found_by_what_matters_to_it(asked):
    first, second = run(asked), run(asked)
    assert (first["found"], second["found"]) == (False, True)
    assert first["facts"] == second["facts"]
    renamed = run(replace(asked, text=("the same words", WORDS)))
    assert renamed["found"]
    assert renamed["text"].startswith("words (")  # as it was made
    assert run(replace(asked, method="dhsa(budget=512)"))["found"]  # no matter of the fit


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"length": 128}, "160 tokens.*not.*128 tokens"),
        ({"batch": 1}, "2 sequences.*not.*1 sequences"),
        ({"text": ("other", WORDS[::-1])}, "on words .*, not other "),
    ],
)
def test_another_text_neither_finds_it_nor_replaces_it(asked, tmp_path, changed, words):
    made = Path(run(asked)["path"])
    before = made.read_bytes()
    other = replace(asked, **changed)
    with pytest.raises(InputError, match=words):
        run(other)
    assert made.read_bytes() == before
    assert not run(replace(other, out=tmp_path / "other.safetensors"))["found"]
    assert made.read_bytes() == before
    assert not run(replace(other, fresh=True))["found"]
    assert run(other)["found"]
    with pytest.raises(InputError, match="--fresh to replace it"):
        run(asked)


def test_settings_that_a_fit_keeps_are_compared(asked, monkeypatch):
    monkeypatch.setattr(flux_fit, "STEPS", 1)
    flux = replace(asked, method="flux(sinks=4, local=16, block=16, pool=8)")
    assert not run(flux)["found"]
    assert run(flux)["found"]
    with pytest.raises(InputError, match="pool 8, not 4"):
        run(replace(flux, method="flux(sinks=4, local=16, block=16, pool=4)"))


def test_a_named_file_is_replaced_only_if_asked(asked, tmp_path, monkeypatch):
    out = tmp_path / "own.safetensors"
    mine = replace(asked, out=out)
    run(mine)
    before = out.read_bytes()
    loaded = []
    real = job.load_weights
    monkeypatch.setattr(job, "load_weights", lambda *_, **__: loaded.append(1) or real())
    for other, words in (
        (replace(mine, method="flux(pool=8)"), "a fit of dhsa, not flux"),
        (replace(mine, length=128), "160 tokens"),
    ):
        with pytest.raises(InputError, match=words):
            run(other)
    assert not loaded  # before any weights are read
    monkeypatch.setattr(job, "load_weights", lambda *_, **__: tiny("llama", seed=3))
    with pytest.raises(InputError, match="another model"):
        run(mine)
    assert out.read_bytes() == before
    out.write_bytes(b"weights of mine")
    with pytest.raises(InputError, match="--fresh replaces"):
        run(mine)
    assert out.read_bytes() == b"weights of mine"
    assert not run(replace(mine, fresh=True))["found"]
