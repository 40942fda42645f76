"""Neighborhood attention in models of images and videos that have been trained already.

Where their tokens lie is read from the config (image, patch, frames, tubelets) and from the tokens
that the model puts in front of the grid's (class, distillation, registers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.hf.errors import ModelError
from foveate.hf.using import Use, use
from foveate.methods.gna import GNA

# Parameters that are tokens of their own, in front of the grid's.
_IN_FRONT = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
Each = int | Sequence[int]


@dataclass(frozen=True)
class TokenGrid:
    """Where a model's tokens lie: `before` tokens, those of the grid row by row, `after` more."""

    shape: tuple[int, ...]
    before: int = 0
    after: int = 0


def token_grid(model: nn.Module) -> TokenGrid:
    """The grid of a transformers model for images or videos of the size that its config names.

    Raises:
        ModelError: the config names no sizes of images and patches, or the model reads text, too.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "text_config", None) is not None:
        raise ModelError(
            f"{type(model).__name__}: it attends over text, too, which has no grid; give the part "
            "that reads images, such as model.vision_model."
        )
    config = getattr(config, "vision_config", config)
    image, patch = (_pair(getattr(config, name, None)) for name in ("image_size", "patch_size"))
    if image is None or patch is None:
        raise ModelError(
            f"{type(model).__name__}: its config has no image_size and patch_size, so its tokens' "
            "grid isn't known; give use_on_grid(..., grid=TokenGrid(shape, before, after))."
        )
    shape = tuple(n // p for n, p in zip(image, patch))
    frames, tubelet = getattr(config, "num_frames", None), getattr(config, "tubelet_size", None)
    if isinstance(frames, int) and tubelet is not None:
        depth = tubelet if isinstance(tubelet, int) else tubelet[0]
        shape = (frames // depth, *shape)
    return TokenGrid(shape, _in_front(model))


def _pair(given: Any) -> tuple[int, int] | None:
    """Height and width of a size that is one number, or a list that ends with both."""
    if isinstance(given, int):
        return given, given
    if isinstance(given, list | tuple) and len(given) >= 2:
        return int(given[-2]), int(given[-1])
    return None


def _in_front(model: nn.Module) -> int:
    count = 0
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in _IN_FRONT:
            count += math.prod(parameter.shape[:-1])
    return count


def use_on_grid(
    model: nn.Module,
    window: Each,
    stride: Each = 1,
    dilation: Each = 1,
    *,
    grid: TokenGrid | None = None,
    backend: str = "auto",
    stats: Callable[..., None] | None = None,
) -> Use:
    """Let a model for images or videos see the window of each token's nearest ones, until undone.

        used = foveate.hf.use_on_grid(vit, window=7)          # as foveate.use, on the model's grid
        used.undo()

    Tokens in front of the grid and behind it see everything and are seen by all. Which windows and
    strides will pay, `foveate cost tiles` tells.

    Args:
        model: a transformers model whose attention modules attend over the grid's tokens.
        window: keys on each axis, or one number for all.
        stride: queries on an axis that share a window.
        dilation: distance of neighbouring keys.
        grid: where the tokens lie; None is what `token_grid` reads.
        backend, stats: as in `foveate.use`.

    Raises:
        InputError: a window that doesn't fit the grid.
        ModelError: the grid isn't known, or the model's attention can't be reached.
    """
    grid = token_grid(model) if grid is None else grid
    window, stride, dilation = (
        given if isinstance(given, int) else tuple(given) for given in (window, stride, dilation)
    )
    method = GNA(
        window=window,
        stride=stride,
        dilation=dilation,
        shape=grid.shape,
        before=grid.before,
        after=grid.after,
    )
    return use(model, method, backend=backend, stats=stats)
