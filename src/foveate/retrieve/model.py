"""A retriever on disk: ColBERTer's head and what it stands on, in a folder.

- colberter.json: recipe, longest text, stemming, and the encoder by name and fingerprint.
- head.safetensors: the head's weights.
- encoder/: the encoder, if it was trained too; else it is the one that is named.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.hf.load import ModelInfo, load_tokenizer, load_weights, locate
from foveate.methods.colberter import Colberter
from foveate.models.colberter import ColberterModel
from foveate.ops.errors import InputError
from foveate.retrieve.files import sum_of, sync_folder, write_new

CONFIG, HEAD, ENCODER = "colberter.json", "head.safetensors", "encoder"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Retriever:
    """A model and what its folder says.

    Attributes:
        model: in evaluation mode.
        facts: the encoder, and whatever was noted of the training.
        own: the encoder was trained too, and goes with the head.
    """

    model: ColberterModel = field(repr=False)
    facts: dict[str, Any]
    own: bool = False


def new(
    source: str | None,
    recipe: Colberter,
    *,
    length: int = 256,
    stem: bool = True,
    device: torch.device | str = "cpu",
    say: Say = lambda text: None,
) -> Retriever:
    """An untrained head on an encoder.

    Args:
        source: a text encoder as `foveate.hf.load.load_model` takes it; None is minilm.

    Raises:
        InputError: it is no text encoder, or doesn't fit.
    """
    info = _encoder(source or "minilm", say)
    model = _made(info, recipe, length, stem, device)
    encoder = {"source": info.source, "name": info.name, "fingerprint": info.fingerprint}
    return Retriever(model, {"encoder": encoder})


def _encoder(source: str, say: Say) -> ModelInfo:
    info = locate(source, progress=say)
    if info.kind != "encoder":
        raise InputError(
            f"{info.name} is a {info.kind}; a retriever needs a text encoder, such as minilm or a "
            "folder with a BERT."
        )
    return info


def _made(
    info: ModelInfo, recipe: Colberter, length: int, stem: bool, device: torch.device | str
) -> ColberterModel:
    encoder = load_weights(info, dtype=torch.float32, device=device)
    encoder.requires_grad_(False)
    model = ColberterModel(encoder, load_tokenizer(info), recipe, length=length, stem=stem)
    return model.to(device).eval()


def save(folder: Path, retriever: Retriever) -> dict[str, str]:
    """Write a retriever; it appears under its name when it is whole.

    Args:
        folder: replaced if it is there.
        retriever: what to write; its encoder only if it is its own.

    Returns:
        By file name the sha256 of its content.
    """
    from safetensors.torch import save as packed

    model = retriever.model
    config = {
        "recipe": dataclasses.asdict(model.recipe), "dim": model.head.dim,
        "length": model.words.length, "stem": model.words.stem, "facts": retriever.facts,
        "own_encoder": retriever.own,
    }  # fmt: skip
    work = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    state = {name: x.detach().cpu().contiguous() for name, x in model.head.state_dict().items()}
    write_new(work / HEAD, packed(state))
    write_new(work / CONFIG, json.dumps(config, indent=1, allow_nan=False).encode())
    if retriever.own:
        model.encoder.save_pretrained(work / ENCODER)  # type: ignore[operator]
        model.words.tokenizer.save_pretrained(work / ENCODER)
    sync_folder(work)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(work, folder)
    sync_folder(folder.parent)
    return sums(folder)


def sums(folder: Path) -> dict[str, str]:
    """By file name the sha256 of each of a retriever's files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): sum_of(p) for p in files}


def load(
    folder: Path, *, device: torch.device | str = "cpu", say: Say = lambda text: None
) -> Retriever:
    """A retriever that `save` wrote.

    Raises:
        InputError: the folder holds none, its files are damaged, or its encoder isn't here or has
            other weights than the one that it was trained with.
    """
    from safetensors.torch import load as unpacked

    config = read_config(folder)
    try:
        recipe = Colberter(**config["recipe"])
        told, length, stem = config["facts"]["encoder"], config["length"], config["stem"]
        own = config["own_encoder"]
        weights = unpacked((folder / HEAD).read_bytes())
    except (KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder} holds no whole retriever ({error}).") from error
    except Exception as error:  # safetensors' own error
        raise InputError(f"{folder / HEAD} is damaged: {error}.") from error
    info = _encoder(str(folder / ENCODER) if own else told["source"], say)
    if not own and info.fingerprint != told["fingerprint"]:
        raise InputError(
            f"{folder} was trained with {told['name']} of other weights than those that "
            f"{told['source']!r} has here; use these, or train anew with --fresh."
        )
    model = _made(info, recipe, length, stem, device)
    try:
        model.head.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{folder / HEAD} doesn't fit its recipe {recipe}.") from error
    return Retriever(model, config["facts"], own)


def read_config(folder: Path) -> dict[str, Any]:
    """What `colberter.json` says.

    Raises:
        InputError: it isn't there or can't be read.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no retriever: {CONFIG} {error}.") from error
    return config
