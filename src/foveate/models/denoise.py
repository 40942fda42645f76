"""Learning to take noise out of images and videos, and drawing new ones from noise.

    x_t = (1 - t) x_0 + t e,  e ~ N(0, I),  0 <= t <= 1

The model is asked for x_0, given x_t and t. A sample goes from t = 1 to 0 along the straight line
that each prediction points to (rectified flow's Euler steps; Liu et al. 2022, arXiv 2209.03003):

    x_t' = x_t + (t' - t) (x_t - x_0hat) / t
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

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
