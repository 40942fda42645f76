"""The job of `foveate fit`: a method's fit on one model, resumable, its artefact where `use` looks.

While it runs, what is needed to go on lies beside the artefact's place, in `<key>.fit`; started
again with the same arguments a fit goes on from there, and a finished one isn't made twice. One
that was made with other arguments is never taken for this one, nor replaced unasked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.hf.errors import ModelError
from foveate.hf.fit.artefacts import ArtefactError, load, place, save, suffix_of
from foveate.hf.fit.frozen import FrozenModel
from foveate.hf.fit.texts import TextBatches
from foveate.hf.load import ModelInfo, load_tokenizer, load_weights, locate
from foveate.methods import make_attention
from foveate.methods.naming import spec
from foveate.ops.errors import InputError
from foveate.parts.fitting import Artefact, fitter_of

SETTINGS = "settings"  # among the facts: what the fit was asked for


@dataclass(frozen=True)
class FileState:
    """What a fit keeps to go on, as one safetensors file.

    Attributes:
        path: of the file.
        fingerprint: of the model, and of whatever else must be the same to go on.
        key: of the method.
    """

    path: Path
    fingerprint: str
    key: str

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What was saved last; None without, or if it is damaged or of another model."""
        if not self.path.is_file():
            return None
        try:
            held, made_on = load(self.path)
        except ArtefactError:
            return None
        if made_on != self.fingerprint or held.key != self.key:
            return None
        return held.facts, held.tensors

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep these in place of what was there."""
        save(Artefact(self.key, facts, tensors), self.fingerprint, self.path)

    def clear(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Job:
    """A fit.

    Attributes:
        model: as `foveate.hf.load.load_model` takes it.
        method: a key, or "key(field=value)".
        text: the text to fit on, and its title.
        length: tokens of a sequence.
        batch: sequences of a batch.
        device: to run on.
        out: file of the artefact; None is the cache, where `use` looks.
        fresh: begin anew, and replace an artefact that is there.
    """

    model: str | None
    method: str
    text: tuple[str, str] = field(repr=False)
    length: int = 1024
    batch: int = 2
    device: torch.device = torch.device("cpu")
    out: Path | None = None
    fresh: bool = False


def run(
    job: Job, tell: Callable[[float, str], None], say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Fit, and save the artefact.

    Returns:
        The method's key, the artefact's path, the model, whether it was there already, and its
        facts without the history of steps.

    Raises:
        FoveateError: bad input, before any weights are read; or a fit with other settings is there.
    """
    method = make_attention(job.method)
    fitter = fitter_of(method)
    key = job.method.partition("(")[0].strip()
    if job.out is not None and job.out.suffix not in (".safetensors", ".json"):
        raise InputError(f"--out {job.out}: name a file that ends in .safetensors or .json.")
    info = locate(job.model, progress=say)
    if info.kind != "causal-lm":
        raise ModelError(f"{info.name} is no causal language model; fits run on those.")
    batches = _batches(job, info)
    if job.out is not None:
        _writable(job.out)
    say(f"Loading {info.name}")
    model = FrozenModel(load_weights(info, device=job.device))
    path = job.out
    if path is None:
        path = place(model.fingerprint, key, suffix_of(method))
    settings = {
        "method": spec(method), "text": batches.describe(), "length": job.length,
        "batch": job.batch,
    }  # fmt: skip
    started = hashlib.sha256(json.dumps([model.fingerprint, settings]).encode()).hexdigest()
    state = FileState(path.with_suffix(".fit"), started, key)
    if job.fresh:
        state.clear()
    done = None if job.fresh else _there(path, model.fingerprint, key)
    found = done is not None
    if done is not None:
        _same_settings(done.facts.get(SETTINGS), settings, path)
    else:
        _writable(path)
        done = fitter(method, model, batches, tell, state)
        done = replace(done, facts=done.facts | {SETTINGS: settings})
        save(done, model.fingerprint, path)
        state.clear()
    facts = {name: value for name, value in done.facts.items() if name != "history"}
    return {
        "key": key, "path": str(path), "model": info.name, "fingerprint": model.fingerprint,
        "found": found, "text": batches.describe(), "facts": facts,
    }  # fmt: skip


def _batches(job: Job, info: ModelInfo) -> TextBatches:
    if info.max_positions is not None and job.length > info.max_positions:
        raise InputError(
            f"{info.name} takes {info.max_positions:,} tokens at most; --length is {job.length:,}."
        )
    tokenizer = load_tokenizer(info)
    title, content = job.text
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    return TextBatches(
        tokenizer, torch.tensor(ids, dtype=torch.int64), job.length, job.batch, title=title
    )


def _same_settings(made: dict[str, Any] | None, asked: dict[str, Any], path: Path) -> None:
    """Refuse a fit that was made with other settings; one that doesn't tell passes."""
    other = [name for name in asked if made is not None and made.get(name) != asked[name]]
    if made is not None and other:
        told = "; ".join(f"{name} {made.get(name)}, not {asked[name]}" for name in other)
        raise InputError(
            f"{path} holds a fit with other settings: {told}. Give --fresh to replace it, "
            "--out FILE to keep both, or the settings that it was made with."
        )


def _there(path: Path, fingerprint: str, key: str) -> Artefact | None:
    """A finished artefact of this model and method."""
    if not path.is_file():
        return None
    try:
        artefact, made_on = load(path)
    except ArtefactError:
        return None
    return artefact if made_on == fingerprint and artefact.key == key else None


def _writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} can't be made: {error.strerror}.") from error
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} can't be written; give --out, or set FOVEATE_CACHE.")
