"""A small encoder that learns to classify texts: what the miniatures of encoders share.

task = Classification(load("banking77"))
model = encoder_classifier(Sizes(layers=2, dim=64, heads=4, vocab=task.vocab), task.classes,
                           attention="full")
train(model, task, Regime(steps=800))
evaluate(model, task, "test")["accuracy"]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from foveate.papers.harness.paper import Trial
from foveate.papers.tasks.classification import PADDING, Classification
from foveate.papers.training.language import Sizes
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime


class Classifier(nn.Module):
    """A sequence classifier as `train` and `evaluate` want it: one prediction for each row.

    Args:
        model: takes input_ids and attention_mask and returns logits (B, classes), and perhaps aux:
            a `foveate.models.FoveateForSequenceClassification`, or any other of transformers'.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        """Inputs (B, L), padded with PADDING; returns logits (B, 1, classes) and aux."""
        real = (inputs != PADDING).long()
        out = self.model(input_ids=inputs, attention_mask=real)
        return SimpleNamespace(logits=out.logits[:, None], aux=getattr(out, "aux", None))


def encoder_classifier(
    sizes: Sizes, classes: int, projection: str = "mha", attention: str = "full", **more: Any
) -> Classifier:
    """A `foveate.models.FoveateForSequenceClassification` with fresh weights, for `train`.

    All start as torch makes them, as in `language_model`.

    Args:
        sizes: as they say; `length` isn't looked at.
        classes: number of labels.
        projection: such as "gqa(kv_heads=2)".
        attention: such as "flowformer".
        more: further fields of `FoveateEncoderConfig`, such as pooling.

    Raises:
        InputError: sizes and composition don't fit together.
        MissingPackageError: transformers isn't there.
    """
    from foveate import models

    config = models.FoveateEncoderConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        projection=projection,
        attention=attention,
        num_labels=classes,
        pad_token_id=PADDING,
        **more,
    )
    model = models.FoveateForSequenceClassification(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
    return Classifier(model)


def trained_on_texts(
    trial: Trial,
    task: Classification,
    make: Callable[[Classification], nn.Module],
    *,
    steps: int,
    lr: float | None = None,
    **regime: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a miniature's arm to classify texts and take its figures.

    Args:
        trial: whose checkpoints are kept while it runs.
        task: the texts; a quick trial holds out few of them.
        make: builds the model, from torch's random state as the trial's seed has set it.
        steps: of a whole run; `Trial.steps` of them.
        lr: the learning rate; None is the trial's tuned point.
        regime: further fields of `Regime`.

    Returns:
        The model, and by metric: accuracy (test split), loss (there, in nats), validation (loss at
        the end), parameters, curve.
    """
    if trial.quick:
        task = replace(task, held=32)
    steps = trial.steps(steps)
    chosen = Regime(
        steps=steps,
        lr=trial.tuned if lr is None else lr,
        every=max(2, steps // 5),
        seed=trial.seed,
        **({"batch": 32, "weight_decay": 0.01} | regime),
    )
    model = make(task).to(trial.device)
    done = train(model, task, chosen, folder=trial.folder, tell=trial.tell)
    found = evaluate(model, task, "test", chosen.batch)
    return model, {
        "accuracy": found["accuracy"],
        "loss": found["loss"],
        "validation": done.history[-1]["validation"],
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "curve": done.curve,
    }
