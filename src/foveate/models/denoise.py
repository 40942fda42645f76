"""Learning to take noise out of images and videos, and drawing new ones from noise.

    x_t = (1 - t) x_0 + t e,  e ~ N(0, I),  0 <= t <= 1

The model is asked for x_0, given x_t and t. A sample goes from t = 1 to 0 along the straight line
that each prediction points to (rectified flow's Euler steps; Liu et al. 2022, arXiv 2209.03003):

    x_t' = x_t + (t' - t) (x_t - x_0hat) / t
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models.dit import DiT
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.weights import put_weights, weights

STEP = 1000.0  # the model is told t in thousandths


def noised(clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t of clean (B, ...) and noise of its shape, t (B,)."""
    at = t.view(-1, *[1] * (clean.dim() - 1))
    return (1 - at) * clean + at * noise


def denoising_loss(model: nn.Module, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted x_0: a scalar."""
    predicted: Tensor = model(noised(clean, t, noise), t * STEP)
    return (predicted - clean).square().mean()


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    steps: int = 20,
    tell: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw images or videos.

    Attentions with a `dense_until` hear of the share of the steps that is done.

    Args:
        model: such as `DiT`.
        noise: (B, channels, *sizes) of N(0, I), where to begin.
        steps: predictions that are made.
        tell: takes (number of the step, the x_0 predicted in it).

    Raises:
        InputError: steps below 1.
    """
    whole("sample", "steps", steps, least=1)
    if noise.dim() < 4:
        raise InputError(f"sample: expected noise (B, channels, *sizes), got {tuple(noise.shape)}.")
    was_training = model.training
    model.eval()
    x = noise
    try:
        for number in range(steps):
            t, after = 1 - number / steps, 1 - (number + 1) / steps
            at = torch.full((len(x),), t * STEP, device=x.device)
            predicted = model(x, at, done=number / steps)
            x = x + (after - t) / t * (x - predicted)
            if tell is not None:
                tell(number, predicted)
    finally:
        model.train(was_training)
    return x


def save(model: DiT, about: dict[str, Any], folder: Path) -> None:
    """Write the weights and what `load` makes the model from."""
    from safetensors.torch import save_file

    save_file(weights(model), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load(folder: str | Path, **changed: Any) -> DiT:
    """The model of a folder that `foveate denoise` has made.

    Args:
        folder: with model.json and model.safetensors.
        changed: arguments of `DiT` that are to differ, such as `sizes` (positions are computed,
            so the weights fit any) or `attention`.

    Raises:
        InputError: the folder holds no such model.
    """
    from safetensors.torch import load_file

    place = Path(folder).expanduser()
    try:
        about = json.loads((place / "model.json").read_text(encoding="utf-8"))
        held = load_file(place / "model.safetensors")
    except (OSError, ValueError) as problem:
        raise InputError(
            f"{place} holds no model of foveate denoise ({problem}); make one with: "
            f"foveate denoise --out {place}"
        ) from problem
    for name in ("sizes", "patch"):
        about[name] = tuple(about[name])
    model = DiT(**(about | changed))
    put_weights(model, held)
    return model.eval()
