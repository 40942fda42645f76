"""The Gaussian adaptive transformer's head: it classifies by the layers of a frozen encoder.

Each layer's hidden states are averaged over time, which gives X (N layers, D features); a module
weighs or mixes them; two convolutions over the D features as a map, with the N layers as channels,
and a linear map follow:

    X -> module(X) -> conv 3x3 (N -> channels), ReLU -> conv 3x3 (channels -> N), ReLU -> linear

Only this is trained. Modules: `foveate.methods.gaam.GaussianGate` (DAAMv1 has 8 heads, DAAMv2 one,
both in the density form), a `GaussianBlock` of the package, or `LayerAttention`, attention over the
layers as tokens: multi-head, with batch norm, or grouped-query behind a gate (GQGAAM).
Ioannides et al. 2024, arXiv 2401.11143, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.gaam import GaussianGate, Importance
from foveate.models.canvas import pyplot, save
from foveate.nn import Attention
from foveate.ops.errors import InputError


class GAT(nn.Module):
    """Features (B, N, D) of a frozen encoder's layers to logits (B, classes).

    Args:
        layers: N.
        features: D; the map is as nearly square as its divisors allow (5,120 is 64 x 80).
        classes: of the labels.
        module: (B, N, D) -> (B, N, D); None leaves the features as they are.
        channels: between the convolutions (paper: 512).
    """

    def __init__(
        self,
        layers: int,
        features: int,
        classes: int,
        module: nn.Module | None = None,
        channels: int = 512,
    ) -> None:
        super().__init__()
        self.layers, self.features = layers, features
        self.grid = grid_of(features)
        self.module = nn.Identity() if module is None else module
        self.first = nn.Conv2d(layers, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, layers, 3, padding=1)
        self.head = nn.Linear(layers * features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x (B, N, D).

        Raises:
            InputError: another shape.
        """
        if x.dim() != 3 or x.shape[1:] != (self.layers, self.features):
            raise InputError(
                f"GAT: expected (B, {self.layers}, {self.features}), got {tuple(x.shape)}."
            )
        x = self.module(x).unflatten(2, self.grid)
        x = functional.relu(self.second(functional.relu(self.first(x))))
        return self.head(x.flatten(1))


class GaussianBlock(nn.Module):
    """The package's block of layers: x <- x + gate(x), one gate after another.

    Args:
        gates: each with its own axis, heads and Gaussians.
    """

    def __init__(self, gates: Sequence[GaussianGate]) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh x, of any shape that the gates take."""
        for gate in self.gates:
            x = x + gate(x)
        return x


class LayerAttention(nn.Module):
    """Dot-product attention over the layers of (B, N, D) as tokens.

    Args:
        features: D.
        heads: query heads.
        kv_heads: key and value heads; None is as many as heads.
        norm: a batch norm behind it ("MHA + BN").
        gate: in front of it; with 8 heads and 2 kv_heads that is GQGAAM.
    """

    def __init__(
        self,
        features: int,
        heads: int = 8,
        kv_heads: int | None = None,
        norm: bool = False,
        gate: GaussianGate | None = None,
    ) -> None:
        super().__init__()
        projection = "mha" if kv_heads is None else f"gqa(kv_heads={kv_heads})"
        self.gate = nn.Identity() if gate is None else gate
        self.attention = Attention(
            features, heads, projection, position="none", bias=True, out_bias=True
        )
        self.norm = nn.BatchNorm1d(features) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Mix the layers of x (B, N, D)."""
        y = self.attention(self.gate(x)).y
        return y if self.norm is None else self.norm(y.mT).mT


def grid_of(features: int) -> tuple[int, int]:
    """Rows and columns of the map, rows the largest divisor up to the root."""
    rows = next(n for n in range(math.isqrt(features), 0, -1) if features % n == 0)
    return rows, features // rows


def layer_features(hidden_states: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """Means over time of each layer's hidden states, stacked: (B, N, D).

    Args:
        hidden_states: (B, T, D) each, as transformers' models return them; leave out the first,
            which is the embedding.
        real: (B, T), 1 or True for real tokens; None is all.

    Raises:
        InputError: there are none.
    """
    if not hidden_states:
        raise InputError("layer_features: expected the hidden states of one layer or more.")
    x = torch.stack(list(hidden_states), 1)
    if real is None:
        return x.mean(2)
    keep = real.bool()[:, None, :, None]
    return x.masked_fill(~keep, 0).sum(2) / keep.sum(2).clamp(min=1).to(x.dtype)


@torch.no_grad()
def importance_of(gate: GaussianGate, batches: Iterable[Tensor]) -> Importance:
    """The Importance Factor of a trained gate over a validation set's features (B, N, D)."""
    seen = Importance()
    for x in batches:
        seen.add(gate.weights(x))
    return seen


def draw_importance(factor: Tensor, path: str | Path, title: str = "Importance Factor") -> Path:
    """Plot an Importance Factor (layers, features): a heat map, and each layer's mean beside it.

    Args:
        factor: in [0, 1].
        path: of the picture; its suffix says which kind.
        title: above it.

    Raises:
        InputError: not two axes.
        MissingPackageError: matplotlib isn't there.
    """
    if factor.dim() != 2:
        raise InputError(
            f"draw_importance: expected (layers, features), got {tuple(factor.shape)}; average "
            "over other axes first."
        )
    plot = pyplot()
    path = Path(path)
    values = factor.detach().cpu().float()
    figure, (map_, bars) = plot.subplots(
        1, 2, figsize=(9, 1.2 + 0.25 * len(values)), width_ratios=(4, 1), sharey=True,
        layout="constrained",
    )  # fmt: skip
    shown = map_.imshow(
        values.tolist(), aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
    )
    map_.set(xlabel="feature", ylabel="layer", title=title)
    map_.set_yticks(range(len(values)), [str(n + 1) for n in range(len(values))])
    bars.barh(range(len(values)), values.mean(1).tolist(), color="#3d5a98")
    bars.set(xlabel="mean of the layer", xlim=(0, 1))
    figure.colorbar(shown, ax=bars)
    return save(plot, figure, path)
