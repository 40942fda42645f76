"""Checkpoints of a training: safetensors and JSON, whole or not there, bit-exact to go on from.

A folder holds `step-000300/` with `model.safetensors`, `optimizer.safetensors` and `state.json`,
and `best.safetensors` where training may stop early. One is written beside its place and then
moved there, and the one before is removed only afterwards, so a kill at any moment leaves one.
What can't be read is kept aside as `broken-...`, and the one before it, or the start, is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.ops.errors import MissingPackageError
from foveate.papers.training.errors import CheckpointError
from foveate.parts.weights import moments, put_moments, put_weights, weights

SCHEMA = 1


@dataclass
class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        folder: where they lie; made when the first is written.
        training: digest of whatever decides the training; another one is refused.
        notes: what was found damaged.
    """

    folder: Path
    training: str

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> None:
        """Write a checkpoint; when this returns it is on the disk and earlier ones are gone."""
        save_file = _safetensors().save_file
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".new-*"):  # by a run that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        new = self.folder / f".new-{os.getpid()}"
        new.mkdir()
        save_file(weights(model), new / "model.safetensors")
        save_file(moments(model, optimizer), new / "optimizer.safetensors")
        names = ("model.safetensors", "optimizer.safetensors")
        for name in names:
            _to_disk(new / name)
        sums = {name: _sum(new / name) for name in names}
        kept = {"schema": SCHEMA, "training": self.training, "step": step, "sums": sums} | state
        with (new / "state.json").open("w", encoding="utf-8") as file:
            json.dump(kept, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        before = self._steps()
        place = self.folder / f"step-{step:06d}"
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)
        _to_disk(self.folder)
        for old in before:
            if old != place:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put the latest checkpoint into model and optimizer; its state, or None without one.

        Raises:
            CheckpointError: it is of another training.
        """
        for place in reversed(self._steps()):
            try:
                state = self._read(place)
                load_file = _safetensors().load_file
                tensors = load_file(place / "model.safetensors")
                held = load_file(place / "optimizer.safetensors")
            except (OSError, ValueError, KeyError, _safetensors_error()) as error:
                self._put_aside(place, error)
                continue
            if state["training"] != self.training:
                raise CheckpointError(
                    f"{place} is of another training (model, regime or data differ); give another "
                    "folder with --out, or go without --resume to begin anew."
                )
            put_weights(model, tensors)
            put_moments(model, optimizer, held)
            return state
        return None

    def save_best(self, model: nn.Module) -> None:
        """Keep these weights as the best so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".best-{os.getpid()}"
        _safetensors().save_file(weights(model), new)
        new.replace(self.folder / "best.safetensors")

    def best(self) -> dict[str, Tensor]:
        """The best weights so far.

        Raises:
            CheckpointError: they can't be read.
        """
        path = self.folder / "best.safetensors"
        try:
            found: dict[str, Tensor] = _safetensors().load_file(path)
        except (OSError, _safetensors_error()) as error:
            raise CheckpointError(
                f"{path} can't be read ({error}), and no other file holds the best weights; remove "
                f"{self.folder} and train anew."
            ) from error
        return found

    def clear(self) -> None:
        """Remove all checkpoints, for a training that begins anew."""
        for place in self._steps():
            shutil.rmtree(place, ignore_errors=True)
        (self.folder / "best.safetensors").unlink(missing_ok=True)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _read(self, place: Path) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((place / "state.json").read_text(encoding="utf-8"))
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']}")
        for name, expected in state["sums"].items():
            if _sum(place / name) != expected:
                raise ValueError(f"{name} is damaged")
        return state

    def _put_aside(self, place: Path, error: Exception) -> None:
        number = 1
        while (kept := self.folder / f"broken-{number}-{place.name}").exists():
            number += 1
        place.rename(kept)
        self.notes.append(
            f"The checkpoint {place.name} can't be read ({error}); it was kept as {kept.name}."
        )


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a folder can't be opened everywhere
        return
    try:
        os.fsync(handle)
    except OSError:  # nor waited for
        pass
    finally:
        os.close(handle)


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError(
            "Checkpoints need safetensors: pip install 'foveate[hf]'"
        ) from error
    return safetensors.torch


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
