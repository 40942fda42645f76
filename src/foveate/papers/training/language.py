"""Language models on bytes: what miniatures share, and the job of `foveate train`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.compare.records import writable_folder
from foveate.compare.text import default_text
from foveate.hf.demo_models import quiet
from foveate.ops.errors import InputError
from foveate.papers.harness.paper import Trial
from foveate.papers.tasks.text import ByteText, standard_library, text_file
from foveate.papers.training.loop import Trained, train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime

SPECIAL = 3  # ByT5's tokens: padding, end, unknown, then the 256 bytes


@dataclass(frozen=True)
class Sizes:
    """Sizes of a small language model; see `foveate.models.FoveateConfig`.

    Attributes:
        layers: blocks.
        dim: width.
        heads: of the model, as the projection counts them.
        length: of the training windows, in tokens.
        vocab: tokens.
    """

    layers: int = 3
    dim: int = 128
    heads: int = 8
    length: int = 128
    vocab: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}.")


def language_model(
    sizes: Sizes, projection: str = "mha", attention: str = "full", **more: Any
) -> Any:
    """A `foveate.models.FoveateForCausalLM` with fresh weights from torch's random state.

    Args:
        sizes: as they say.
        projection: such as "mfa(head_dim=16)".
        attention: such as "sink-window(window=64)".
        more: further fields of `FoveateConfig`.

    Raises:
        InputError: sizes and composition don't fit together.
        MissingPackageError: transformers isn't there.
    """
    from foveate import models

    config = models.FoveateConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=max(4096, sizes.length),
        projection=projection,
        attention=attention,
        **more,
    )
    return models.FoveateForCausalLM(config)


def trained_on_bytes(
    trial: Trial,
    make: Callable[[], Any],
    *,
    steps: int,
    lr: float | None = None,
    length: int = 128,
    **regime: Any,
) -> tuple[Any, dict[str, Any]]:
    """Train a miniature's arm on the standard library's source and take its figures.

    Args:
        trial: whose checkpoints are kept while it runs.
        make: builds the model, from torch's random state as the trial's seed has set it.
        steps: of a whole run; two fifths of them where a learning rate is tried, four where all
            is quick.
        lr: the learning rate; None is the trial's tuned point.
        length: of the windows.
        regime: further fields of `Regime`.

    Returns:
        The model, and by metric: loss (test split, nats for each byte), validation (at the end),
        parameters, cache (numbers kept for each token, mean of the layers), curve.
    """
    task = standard_library(length, held=16 if trial.quick else 512)
    if trial.tuning:
        steps = steps * 2 // 5
    chosen = Regime(
        steps=4 if trial.quick else steps,
        lr=trial.tuned if lr is None else lr,
        every=2 if trial.quick else max(1, steps // 5),
        seed=trial.seed,
        **regime,
    )
    model = make().to(trial.device)
    done = train(model, task, chosen, folder=trial.folder, tell=trial.tell)
    caches = [layer.attention.new_cache().elements_per_token for layer in model.model.layers]
    return model, {
        "loss": evaluate(model, task, "test", chosen.batch)["loss"],
        "validation": done.history[-1]["validation"],
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "cache": sum(caches) / len(caches),
        "curve": done.curve,
    }


@dataclass(frozen=True)
class Job:
    """A training of `foveate train`.

    Attributes:
        projection, attention: as `foveate.Attention` takes them.
        data: a text file; None is the text that is shipped (WikiText-2).
        sizes: of the model.
        regime: of the training.
        out: folder of the model, in transformers' form, and of checkpoints.
        device: to run on.
        resume: go on from the checkpoints in `out`.
    """

    projection: str
    attention: str
    data: str | None
    sizes: Sizes
    regime: Regime
    out: Path
    device: torch.device
    resume: bool


def run(job: Job, tell: Callable[[float, str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Train, and save what plain transformers loads after `import foveate`.

    Returns:
        The composition, regime, data, figures on the test split (loss in nats and bits for each
        byte, perplexity, accuracy), a sample and the history.

    Raises:
        FoveateError: bad input, before any work; or the training diverged.
    """
    from transformers import ByT5Tokenizer

    task = _text(job)
    checkpoints = job.out / "checkpoints"
    held = job.out / "config.json"
    if not job.resume and (held.exists() or any(checkpoints.glob("step-*"))):
        raise InputError(
            f"{job.out} holds a training already; give --resume to go on with it, or another --out."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.regime.seed)
        model = language_model(
            job.sizes, job.projection, job.attention, pad_token_id=0, eos_token_id=1
        )
    writable_folder(job.out)
    model.to(job.device)
    done = train(model, task, job.regime, folder=checkpoints, tell=tell)
    for note in done.notes:
        say(note)
    with quiet():
        model.save_pretrained(job.out)
        ByT5Tokenizer(extra_ids=0).save_pretrained(job.out)
    facts = _facts(job, task, model, done)
    new = job.out / ".training.new"
    new.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(job.out / "training.json")
    return facts


def _text(job: Job) -> ByteText:
    if job.data is not None:
        return text_file(job.data, job.sizes.length, offset=SPECIAL)
    shipped = default_text().encode()
    return ByteText(shipped, job.sizes.length, "WikiText-2 test split", (0.9, 0.05), 512, SPECIAL)


def _facts(job: Job, task: ByteText, model: Any, done: Trained) -> dict[str, Any]:
    found = evaluate(model, task, "test", job.regime.batch)
    return {
        "projection": job.projection,
        "attention": job.attention,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": task.describe(),
        "regime": job.regime.as_dict(),
        "steps": done.steps,
        "stopped_early": done.stopped_early,
        "resumed_at": done.resumed_at,
        "seconds": round(done.seconds, 1),
        "test": found | {"bits_per_byte": found["loss"] / math.log(2)},
        "sample": sample(model, task),
        "history": done.history,
        "folder": str(job.out),
    }


@torch.no_grad()
def sample(model: Any, task: ByteText, prompt: int = 48, tokens: int = 96) -> dict[str, str]:
    """What the model writes on from the beginning of the test split, greedily.

    Args:
        model: with transformers' `generate`.
        task: whose text it was trained on.
        prompt: tokens of the beginning, at most the task's length.
        tokens: to write.

    Returns:
        The prompt and what followed; bytes that are no UTF-8 are shown as replaced.
    """
    batch = next(iter(task.held_out("test", 1)))
    ids = batch.inputs[:, :prompt].to(next(model.parameters()).device)
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0]
    parts = (out[: ids.shape[1]], out[ids.shape[1] :])
    texts = [
        bytes(t - task.offset for t in part.tolist() if t >= task.offset).decode("utf-8", "replace")
        for part in parts
    ]
    return {"prompt": texts[0], "followed": texts[1]}
