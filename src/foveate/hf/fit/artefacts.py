"""Artefacts of fits as files: one safetensors (or JSON) each, under the model's fingerprint.

`FOVEATE_CACHE/fitted/<fingerprint>/<key>.safetensors`, and beside the weights of a model that was
saved with them, `foveate-<key>.safetensors`. Facts lie in the file's header as JSON; what has no
weights ends in `.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.hf.assignment import HeadGroup
from foveate.hf.demo_models import cache_folder
from foveate.hf.errors import ModelError
from foveate.methods.naming import spec
from foveate.ops.errors import InputError
from foveate.parts.fitting import Artefact, Fittable, missing

SCHEMA = 1
_SAMPLES = 64


class ArtefactError(InputError):
    """An artefact can't be read, or was made on another model."""


def fingerprint(model: nn.Module) -> str:
    """A digest (hex) of a model's weights that its dtype and device don't change.

    Of every parameter the name, the shape and 64 evenly spread values count, rounded to bfloat16.
    """
    made = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        at = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
        some = flat[at].to("cpu", torch.bfloat16).view(torch.int16)
        made.update(f"{name}{tuple(weight.shape)}".encode())
        made.update(some.numpy().tobytes())
    return made.hexdigest()


SUFFIXES = (".safetensors", ".json")


def place(model_fingerprint: str, key: str, suffix: str = SUFFIXES[0]) -> Path:
    """Where the artefact of a model and a method is kept."""
    return cache_folder() / "fitted" / model_fingerprint[:16] / f"{key}{suffix}"


def suffix_of(method: Any) -> str:
    """What the artefact of a method ends in: .json where it has no weights."""
    return str(getattr(method, "suffix", SUFFIXES[0]))


def contents(artefact: Artefact) -> str:
    """A digest (hex) of what an artefact says."""
    made = hashlib.sha256(json.dumps([artefact.key, artefact.facts], sort_keys=True).encode())
    for name, x in sorted(artefact.tensors.items()):
        made.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        made.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def save(artefact: Artefact, model_fingerprint: str, path: Path) -> Path:
    """Write an artefact, whole or not at all: safetensors, or JSON if the path says so.

    Raises:
        InputError: the place can't be written, or JSON can't hold its tensors.
    """
    head = {
        "foveate": SCHEMA, "key": artefact.key, "model": model_fingerprint, "facts": artefact.facts
    }  # fmt: skip
    new = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            if artefact.tensors:
                raise InputError(f"{path}: {artefact.key} has weights; name it .safetensors.")
            new.write_text(json.dumps(head, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        else:
            tensors = {n: t.detach().cpu().contiguous() for n, t in artefact.tensors.items()}
            save_file(tensors, new, {"foveate": json.dumps(head, allow_nan=False)})
        new.replace(path)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}.") from error
    return path


def load(path: Path) -> tuple[Artefact, str]:
    """An artefact, and the fingerprint of the model that it was made on.

    Raises:
        ArtefactError: there is none, it is damaged, or it is of another version.
    """
    tensors: dict[str, Tensor] = {}
    try:
        if path.suffix == ".json":
            head: Any = json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {})["foveate"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if head["foveate"] != SCHEMA:
            raise ArtefactError(
                f"{path} is an artefact of version {head['foveate']}, this reads version {SCHEMA}; "
                "fit anew."
            )
        return Artefact(head["key"], head["facts"], tensors), str(head["model"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"{path} can't be read as an artefact of foveate fit ({error}); make it with: foveate "
            "fit MODEL --method KEY."
        ) from error


def beside(folder: Path, key: str, suffix: str = SUFFIXES[0]) -> Path:
    """Where an artefact lies in a folder of weights."""
    return folder / f"foveate-{key}{suffix}"


class Shelf:
    """The artefacts of one model, looked up once each.

    Args:
        model: transformers' model.
        given: a file or a folder to look in instead of the usual places.
    """

    def __init__(self, model: nn.Module, given: str | Path | None = None) -> None:
        self._model = weakref.ref(model)
        self._given = None if given is None else Path(given).expanduser()
        self._fingerprint: str | None = None
        self.taken: dict[str, tuple[Artefact, str]] = {}

    def _alive(self) -> nn.Module:
        model = self._model()
        assert model is not None, "artefacts are looked up while the model is there"
        return model

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._alive())
        return self._fingerprint

    def bind(self, key: str, method: Any) -> Any:
        """The method, with its artefact if it needs one.

        Raises:
            ModelError: there is none; says how to make it.
            ArtefactError: it was made on another model, or can't be read.
        """
        if not isinstance(method, Fittable) or not method.needs_fit:
            return method
        if key not in self.taken:
            path = self._find(key, suffix_of(method))
            artefact, made_on = load(path)
            if artefact.key != key or made_on != self.fingerprint:
                raise ArtefactError(
                    f"{path} was fitted for {artefact.key!r} on a model with fingerprint "
                    f"{made_on[:16]}; this is {key!r} on {self.fingerprint[:16]}. Fit it on this "
                    f"model: foveate fit MODEL --method {key}."
                )
            self.taken[key] = (artefact, made_on)
        return method.with_artefact(self.taken[key][0])

    def bind_all(self, plan: dict[nn.Module, list[HeadGroup]]) -> dict[nn.Module, list[HeadGroup]]:
        """What modules run, each method with its artefact; one that all share stays shared."""
        bound: dict[int, Any] = {}

        def one(method: Any) -> Any:
            if not isinstance(method, Fittable) or not method.needs_fit:
                return method
            if id(method) not in bound:
                bound[id(method)] = self.bind(spec(method).partition("(")[0], method)
            return bound[id(method)]

        return {
            module: [HeadGroup(group.heads, one(group.method)) for group in groups]
            for module, groups in plan.items()
        }

    def _find(self, key: str, suffix: str) -> Path:
        if self._given is not None:
            path = beside(self._given, key, suffix) if self._given.is_dir() else self._given
            if path.is_file():
                return path
            raise ModelError(f"There is no artefact at {path}. {missing(key, 'artefact')}")
        name = str(getattr(getattr(self._alive(), "config", None), "_name_or_path", "") or "")
        usual = place(self.fingerprint, key, suffix)
        for path in ([beside(Path(name), key, suffix)] if name else []) + [usual]:
            if path.is_file():
                return path
        raise ModelError(missing(key, "artefact"))

    def save_beside(self, folder: Path) -> None:
        """Copy the artefacts that are in use to a folder of weights."""
        for key, (artefact, made_on) in self.taken.items():
            suffix = SUFFIXES[0] if artefact.tensors else SUFFIXES[1]
            save(artefact, made_on, beside(folder, key, suffix))
