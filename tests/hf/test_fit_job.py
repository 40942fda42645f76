"""The job of `foveate fit`: made once, found again, and never taken for another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny

from foveate.hf.fit import job
from foveate.hf.fit.artefacts import load
from foveate.hf.load import ModelInfo
from foveate.methods.dhsa import fit as dhsa_fit
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


def test_a_fit_is_made_once_and_says_as_what(asked):
    first, second = run(asked), run(asked)
    assert (first["found"], second["found"]) == (False, True)
    assert first["facts"] == second["facts"]
    settings = first["facts"]["settings"]
    assert settings["method"] == "dhsa"
    assert (settings["length"], settings["batch"]) == (160, 2)
    assert settings["text"].startswith("words")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "dhsa(longest=64)"}, r"method dhsa, not dhsa\(longest=64\)"),
        ({"length": 128}, "length 160, not 128"),
        ({"text": ("other words", WORDS[::-1])}, "text words.*not other words"),
    ],
)
def test_other_settings_neither_find_it_nor_replace_it(asked, tmp_path, changed, words):
    path = Path(run(asked)["path"])
    before = load(path)[0]
    other = replace(asked, **changed)
    with pytest.raises(InputError, match=words):
        run(other)
    assert torch.equal(*(x.tensors[min(x.tensors)] for x in (before, load(path)[0])))
    beside = run(replace(other, out=tmp_path / "other.safetensors"))
    assert not beside["found"]
    assert not run(replace(other, fresh=True))["found"]
    assert run(other)["found"]
    with pytest.raises(InputError, match="--fresh to replace it"):
        run(asked)


def test_what_was_begun_with_other_settings_is_not_gone_on_with(asked, monkeypatch):
    seen = []
    real = job.FileState.load
    monkeypatch.setattr(job.FileState, "load", lambda self: seen.append(real(self)) or seen[-1])
    monkeypatch.setattr(dhsa_fit, "STEPS", 24)

    def stop(share, doing):
        if share > 0.6:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            job.run(asked, stop)
    assert [one is None for one in seen] == [True, False]
    run(replace(asked, method="dhsa(longest=64)"))
    assert seen[2] is None
