"""The job of `foveate fit`: a method's fit on one model, resumable, its artefact where `use` looks.

While it runs, what is needed to go on lies beside the artefact's place, in `<key>.fit`; started
again with the same arguments a fit goes on from there, and a finished one isn't made twice. A
finished one of other text or settings is neither taken for it nor replaced unasked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
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
from foveate.ops.errors import InputError
from foveate.parts.fitting import Artefact, fitter_of


@dataclass(frozen=True)
class FileState:
    """What a fit keeps to go on, as one safetensors file."""

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
        FoveateError: bad input, before any weights are read; what is there is another fit (told of
            the cache, whose place goes by the weights, once they are read).
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
        if job.out.is_file() and not job.fresh:
            _same(_own(job.out, key), method, batches, job.out)
    say(f"Loading {info.name}")
    model = FrozenModel(load_weights(info, device=job.device))
    path = job.out
    if path is None:
        path = place(model.fingerprint, key, suffix_of(method))
    state = FileState(path.with_suffix(".fit"), model.fingerprint, key)
    if job.fresh:
        state.clear()
    done = None if job.fresh else _there(path, model.fingerprint, key)
    found = done is not None
    if done is not None:
        _same(done, method, batches, path)
    elif job.out is not None and path.is_file() and not job.fresh:
        raise InputError(f"{path} is of another model; --fresh replaces it.")
    else:
        _writable(path)
        done = fitter(method, model, batches, tell, state)
        save(done, model.fingerprint, path)
        state.clear()
    facts = {name: value for name, value in done.facts.items() if name != "history"}
    return {
        "key": key, "path": str(path), "model": info.name, "fingerprint": model.fingerprint,
        "found": found, "text": facts.get("text", batches.describe()), "facts": facts,
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


def _own(path: Path, key: str) -> Artefact:
    """The artefact in a file that the user named."""
    try:
        artefact, _ = load(path)
    except ArtefactError as error:
        raise InputError(f"{error} --fresh replaces {path}.") from error
    if artefact.key != key:
        raise InputError(f"{path} holds a fit of {artefact.key}, not {key}; --fresh replaces it.")
    return artefact


def _same(there: Artefact, method: Any, batches: TextBatches, path: Path) -> None:
    """Refuse a fit of other text, or with other settings, of those that fits keep as facts."""
    facts, asked, other = there.facts, batches.describe(), []
    # The title may change, the digest of the text and how it is cut may not.
    if "text" in facts and facts["text"].rpartition(" (")[2] != asked.rpartition(" (")[2]:
        other.append(f"on {facts['text']}, not {asked}")
    for one in fields(method):
        value = getattr(method, one.name)
        value = list(value) if isinstance(value, tuple) else value
        if one.init and value is not None and facts.get(one.name, value) != value:
            other.append(f"{one.name} {facts[one.name]}, not {value}")
    if other:
        raise InputError(
            f"{path} holds a fit with other settings: {'; '.join(other)}. Give --fresh to replace "
            "it, --out FILE to keep both, or the settings that it was made with."
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
