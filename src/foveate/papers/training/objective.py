"""The loss of a batch, and the figures of a held-out split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Split, Task


def logits_of(output: Any) -> Tensor:
    """(B, L, vocab): of a model that returns them, or an object that holds them."""
    logits = output if isinstance(output, Tensor) else output.logits
    assert isinstance(logits, Tensor)
    return logits


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats over the scored positions; logits (B, L, vocab), targets (B, L)."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy, plus the losses that the model returns itself (a router's balance).

    Those are the entries of its `aux` whose names end with "_loss", weighted already.
    """
    output = model(batch.inputs)
    loss = cross_entropy(logits_of(output), batch.targets)
    for name, value in (getattr(output, "aux", None) or {}).items():
        if name.endswith("_loss"):
            loss = loss + value
    return loss


@dataclass(frozen=True)
class BySegments:
    """An objective that reads each sequence in segments, every one behind a cache of those before.

    How Transformer-XL is trained: an attention whose state is detached (rcmha) learns within a
    segment and sees its memory; others get the gradient of the whole sequence.

    Attributes:
        length: of a segment, in tokens.

    Raises:
        InputError: length below 1.
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InputError(f"segments must hold 1 token or more, got {self.length}.")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy over all scored positions, plus each of the model's losses.

        Those are means over the segments. The model is a language model of foveate, with
        `new_cache`.
        """
        parts = batch.targets.split(self.length, 1)
        summed = own = torch.zeros((), device=batch.inputs.device)
        for output, targets in zip(self.outputs(model, batch.inputs), parts):
            summed = summed + cross_entropy(logits_of(output), targets, "sum")
            for name, value in (getattr(output, "aux", None) or {}).items():
                if name.endswith("_loss"):
                    own = own + value
        return summed / (batch.targets != IGNORED).sum().clamp(min=1) + own / len(parts)

    def outputs(self, model: nn.Module, inputs: Tensor) -> Iterator[Any]:
        """What the model says of each segment of inputs (B, L), behind those before."""
        cache = cast(Any, model).new_cache()
        for part in inputs.split(self.length, 1):
            yield model(part, past_key_values=cache)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    split: Split,
    size: int = 16,
    *,
    segments: BySegments | None = None,
) -> dict[str, float]:
    """Loss in nats for each scored token, its exponential, and next-token accuracy.

    Args:
        model: as for `train`.
        task: whose split is taken, all of it, in batches of `size`.
        split: validation or test.
        size: sequences at a time; changes nothing.
        segments: read each sequence as the model was trained, a segment behind the memory of those
            before; None reads it whole.

    Returns:
        loss, perplexity and accuracy (of the tokens with the largest logit).
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    loss = right = scored = 0.0
    for batch in task.held_out(split, size):
        batch = batch.to(device)
        if segments is None:
            logits = logits_of(model(batch.inputs))
        else:
            logits = torch.cat([logits_of(x) for x in segments.outputs(model, batch.inputs)], 1)
        asked = batch.targets != IGNORED
        loss += cross_entropy(logits, batch.targets, "sum").item()
        right += (logits.argmax(-1) == batch.targets)[asked].sum().item()
        scored += asked.sum().item()
    model.train(training)
    mean = loss / max(1.0, scored)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": right / max(1.0, scored),
    }
