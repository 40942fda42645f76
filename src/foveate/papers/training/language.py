"""Small language models on bytes: what the miniatures share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.ops.errors import InputError
from foveate.papers.harness.paper import Check, Trial, at_most
from foveate.papers.tasks.base import Task
from foveate.papers.tasks.text import standard_library
from foveate.papers.training.loop import Watch, train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime

REQUIRES = ("transformers", "safetensors")


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

    All start as torch makes them: linear maps by their fan-in, uniform within fan_in ** -0.5, the
    embedding normal. One deviation for all of them (transformers' 0.02) is far too small at these
    widths, most of all for a map out of a low rank, and would judge arms by how they start.

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

    positions = sizes.length if more.get("position") == "learned" else max(4096, sizes.length)
    config = models.FoveateConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        projection=projection,
        attention=attention,
        **({"max_position_embeddings": positions} | more),
    )
    model = models.FoveateForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
    return model


def trained_on(
    trial: Trial,
    task: Task,
    make: Callable[[], Any],
    *,
    steps: int,
    lr: float | None = None,
    watch: Watch | None = None,
    **regime: Any,
) -> tuple[Any, dict[str, Any]]:
    """Train a miniature's arm on a task and take its figures.

    Args:
        trial: whose checkpoints are kept while it runs.
        task: of next tokens.
        make: builds the model, from torch's random state as the trial's seed has set it.
        steps: of a whole run; `Trial.steps` of them.
        lr: the learning rate; None is the trial's tuned point.
        watch: as in `train`.
        regime: further fields of `Regime`.

    Returns:
        The model, and by metric: loss (test split, nats for each token), validation (at the end),
        parameters, cache (numbers kept for each token, mean of the layers), curve.
    """
    steps = trial.steps(steps)
    chosen = Regime(
        steps=steps,
        lr=trial.tuned if lr is None else lr,
        every=max(2, steps // 5),
        seed=trial.seed,
        **regime,
    )
    model = make().to(trial.device)
    more: dict[str, Any] = {} if watch is None else {"watch": watch}
    done = train(model, task, chosen, folder=trial.folder, tell=trial.tell, **more)
    caches = [layer.new_cache().elements_per_token for layer in model.model.layers]
    return model, {
        "loss": evaluate(model, task, "test", chosen.batch)["loss"],
        "validation": done.history[-1]["validation"],
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "cache": sum(caches) / len(caches),
        "curve": done.curve,
    }


def trained_on_bytes(
    trial: Trial, make: Callable[[], Any], *, steps: int, length: int = 128, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """As `trained_on`, on windows of so many bytes of the standard library's source."""
    task = standard_library(length, held=16 if trial.quick else 512)
    return trained_on(trial, task, make, steps=steps, **more)


def learnt(arm: str) -> Check:
    """That a baseline learnt the text: a table of byte pairs has about 2.46 nats on the test split.

    Without it a comparison says nothing: two models that learnt nothing are equal.
    """
    return at_most(f"loss: {arm}", lambda at: at[arm]["loss"], 2.2)
