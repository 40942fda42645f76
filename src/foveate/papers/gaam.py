"""Gaussian adaptive attention: a gate of a few hundred parameters on a frozen encoder's layers.

The encoder is a transformer of 12 layers of width 64 with the weights it was drawn with; layers'
means over time are what classifiers are trained on. Its input is generated "speech": 64 frames of
16 channels of noise, and in it a burst of 8 frames whose channels tell one of 6 classes. Noise has
the same variance everywhere ("stationary"), or one that changes by up to ten times from sample to
sample and at random frames within it ("changing"). A quarter of all (layer, feature) entries is
replaced by noise of its own, the same entries for all samples, so that it is known which entries
say something.

All arms share the classifier (two convolutions and a linear map), data, steps and a grid of
learning rates; they differ in the module in front of it: none, multi-head attention over the
layers, with batch norm, the gate in both published forms, and the gate in front of attention.
"AUC" is how well the gate's Importance Factor tells entries that say something from noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods.gaam import GaussianGate
from foveate.models.gat import GAT, GaussianBlock, LayerAttention, importance_of, layer_features
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least, at_most
from foveate.papers.tasks.base import Batch, Split, generator
from foveate.papers.training.language import REQUIRES
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime

LAYERS, DIM, CLASSES = 12, 64, 6
FRAMES, BANDS, BURST = 64, 16, 8
SIZES: dict[Split, int] = {"train": 2000, "validation": 500, "test": 1500}
SETTINGS = ("stationary", "changing")
STEPS, CHANNELS, LOUD = 900, 128, 0.6

MODULES: dict[str, Callable[[], nn.Module | None]] = {
    "identity": lambda: None,
    "MHA": lambda: LayerAttention(DIM, 4),
    "MHA + BN": lambda: LayerAttention(DIM, 4, norm=True),
    "GAAM": lambda: GaussianGate(4, form="density", features=DIM),
    "GAAM, package": lambda: GaussianBlock([GaussianGate(4, 5)]),
    "gated MHA": lambda: LayerAttention(DIM, 4, gate=GaussianGate(4, form="density", features=DIM)),
}


@dataclass(frozen=True)
class Speech:
    """Layers' features of generated speech, as a task; see the module's text.

    Attributes:
        setting: of the noise, one of SETTINGS.
        seed: of the encoder, the classes' channels and the entries that are noise.
        quick: a few samples only.
    """

    setting: str
    seed: int
    quick: bool = False

    @property
    def vocab(self) -> int:
        """Number of labels."""
        return CLASSES

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number`: features (size, N, D), targets (size, 1)."""
        x, labels = features(self, "train")
        at = torch.arange(number * size, (number + 1) * size)
        epochs = (at // len(x)).tolist()
        orders = {
            epoch: torch.randperm(len(x), generator=generator("speech", seed, epoch))
            for epoch in set(epochs)
        }
        rows = torch.stack([orders[epoch][i % len(x)] for epoch, i in zip(epochs, at.tolist())])
        return Batch(x[rows], labels[rows])

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """All samples of a split."""
        x, labels = features(self, split)
        for start in range(0, len(x), size):
            yield Batch(x[start : start + size], labels[start : start + size])

    def describe(self) -> str:
        """The task and its parameters."""
        return f"{self!r}, {SIZES} samples, {FRAMES} x {BANDS}, bursts of {BURST} at {LOUD}"


def sounds(task: Speech, split: Split) -> tuple[Tensor, Tensor]:
    """Frames (count, FRAMES, BANDS) and labels (count, 1)."""
    count = 64 if task.quick else SIZES[split]
    patterns = torch.randn(CLASSES, BANDS, generator=generator("classes", task.seed))
    random = generator("sounds", task.setting, task.seed, split)
    labels = torch.randint(CLASSES, (count,), generator=random)
    noise = torch.randn(count, FRAMES, BANDS, generator=random)
    if task.setting == "changing":
        # A variance for each sample, and another factor from a random frame on: up to 10 in all.
        whole = 10 ** torch.rand(count, 1, generator=random)
        later = 10 ** (torch.rand(count, 1, generator=random) - 0.5)
        since = torch.randint(FRAMES, (count, 1), generator=random)
        variance = torch.where(torch.arange(FRAMES) >= since, whole * later, whole).clamp(1, 10)
        noise = noise * variance.sqrt()[..., None]
    start = torch.randint(FRAMES - BURST + 1, (count, 1), generator=random)
    inside = (torch.arange(FRAMES) >= start) & (torch.arange(FRAMES) < start + BURST)
    return noise + LOUD * inside[..., None] * patterns[labels][:, None], labels[:, None]


def noisy(seed: int) -> Tensor:
    """(N, D) bool: the entries that are replaced by noise."""
    return torch.rand(LAYERS, DIM, generator=generator("entries", seed)) < 0.25


@lru_cache(maxsize=24)
@torch.no_grad()
def features(task: Speech, split: Split) -> tuple[Tensor, Tensor]:
    """The frozen encoder's features (count, N, D) and labels (count, 1)."""
    from foveate.models import FoveateEncoder, FoveateEncoderConfig

    frames, labels = sounds(task, split)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator("encoder", task.seed).initial_seed())
        encoder = FoveateEncoder(
            FoveateEncoderConfig(
                vocab_size=1, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=4
            )
        ).eval()
        enter = nn.Linear(BANDS, DIM)
        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    found = []
    for some in frames.split(250):
        out = encoder(inputs_embeds=enter(some), output_hidden_states=True)
        found.append(layer_features(out.hidden_states[1:]))
    x = torch.cat(found)
    drawn = torch.randn(x.shape, generator=generator("noise", task.setting, task.seed, split))
    return torch.where(noisy(task.seed), drawn * x.std(), x), labels


class OneLabel(nn.Module):
    """A classifier as `train` wants it: logits (B, 1, classes)."""

    def __init__(self, model: GAT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x (B, N, D)."""
        return self.model(x)[:, None]


def run(trial: Trial) -> Found:
    """Train one arm in one setting."""
    module, setting = trial.cell.rsplit(", ", 1)
    task = Speech(setting, trial.seed, trial.quick)
    gat = GAT(LAYERS, DIM, CLASSES, MODULES[module](), CHANNELS)
    model = OneLabel(gat).to(trial.device)
    steps = trial.steps(STEPS)
    regime = Regime(
        steps=steps, batch=32, lr=trial.tuned, weight_decay=0.1, every=max(2, steps // 6),
        seed=trial.seed,
    )  # fmt: skip
    done = train(model, task, regime, folder=trial.folder, tell=trial.tell)
    found: dict[str, Any] = {
        "accuracy": evaluate(model, task, "test", 250)["accuracy"],
        "module": float(sum(p.numel() for p in gat.module.parameters())),
        # Nothing stops early, so the grid looks at the least: all arms overfit in the end.
        "validation": done.best,
    }
    if isinstance(gat.module, GaussianGate):
        found["AUC"] = auc(gat.module, task, trial.device)
    return {trial.cell: found}


def auc(gate: GaussianGate, task: Speech, device: torch.device) -> float:
    """How often an entry that says something has a larger Importance Factor than one of noise."""
    batches = (batch.inputs.to(device) for batch in task.held_out("validation", 250))
    factor = importance_of(gate, batches).factor.cpu()
    noise = noisy(task.seed)
    one, other = factor[~noise], factor[noise]
    return ((one[:, None] > other) + 0.5 * (one[:, None] == other)).double().mean().item()


def _above(arm: str, other: str, setting: str, least: float, **more: Any) -> Check:
    ours, base = f"{arm}, {setting}", f"{other}, {setting}"
    return at_least(
        f"accuracy: {arm} - {other}, {setting}",
        lambda at: at[ours]["accuracy"] - at[base]["accuracy"],
        least,
        **more,
    )


def _arms(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}, {setting}" for setting in SETTINGS for module in modules)


PAPER = Paper(
    key="gaam",
    claim="A gate of a few parameters on a frozen encoder's layers beats attention over them.",
    metric="test accuracy of 6 classes; parameters of the module",
    cells=_arms(*MODULES),
    run=run,
    baseline=_arms("identity", "MHA", "MHA + BN"),
    ours=_arms("GAAM", "GAAM, package", "gated MHA"),
    checks=(
        _above("GAAM", "MHA", "stationary", -0.005),
        _above("GAAM", "MHA", "changing", 0.02),
        _above("GAAM", "identity", "changing", 0.005, refuted=0.0),
        at_most(
            "parameters: GAAM / MHA",
            lambda at: at["GAAM, changing"]["module"] / at["MHA, changing"]["module"],
            0.05,
            exact=True,
        ),
        at_least("AUC: GAAM, changing", lambda at: at["GAAM, changing"]["AUC"], 0.7,
                 refuted=-math.inf),
    ),
    needs=(
        at_least(
            "accuracy: best without a gate, stationary",
            lambda at: max(at[arm]["accuracy"] for arm in _arms("identity", "MHA")),
            0.4,
        ),
    ),
    requires=REQUIRES,
    grid=Grid("learning rate", (1e-3, 3e-3), share=0.4),
    data=lambda: Speech("changing", 0).describe(),
)  # fmt: skip
