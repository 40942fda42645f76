"""Counting what a model of images costs: multiply-adds of a forward, parameters.

A multiply-add counts once, as papers on such models count "FLOPs". Convolutions and linear maps are
counted where they run; modules that multiply activations with each other tell by `mixing_macs`.
Norms, activations, pooling and softmax aren't counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Macs(NamedTuple):
    """Multiply-adds of one forward: in convolutions, in linear maps, among activations."""

    convolutions: int
    linear: int
    mixing: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def macs(model: nn.Module, shape: Sequence[int]) -> Macs:
    """Multiply-adds of a forward of an input of zeros of this shape; run once, in eval mode.

    Args:
        model: a module of one input.
        shape: such as (1, 3, 224, 224).
    """
    found = {"convolutions": 0, "linear": 0, "mixing": 0}

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            weights = module.weight[0].numel()
            found["convolutions"] += output.numel() * weights
        elif isinstance(module, nn.Linear):
            found["linear"] += output.numel() * module.in_features
        else:
            found["mixing"] += module.mixing_macs(*inputs)  # type: ignore[operator]

    counted = [
        m
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear) or hasattr(m, "mixing_macs")
    ]
    training = model.training
    with ExitStack() as stack:
        for module in counted:
            stack.callback(module.register_forward_hook(hook).remove)
        stack.callback(model.train, training)
        model.eval()
        first = next(model.parameters())
        x: Tensor = torch.zeros(tuple(shape), device=first.device, dtype=first.dtype)
        model(x)
    return Macs(**found)
