"""Layer-wise alignment: a TPLA trained to give what its MLA gave, input by input.

The TPLA paper's "align", arXiv 2508.15881, section 5: mean squared error between the two layers'
outputs on the MLA's own inputs (256 samples of 2,048 tokens, 10 epochs, Muon at 1e-6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError


def align(
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    inputs: Iterable[Tensor],
    epochs: int = 10,
    lr: float = 1e-6,
) -> list[float]:
    """Train `student` layer-wise against `teacher`.

    Matrices are trained with Muon and the rest with AdamW, at one rate.

    Args:
        student: a layer's x (B, L, dim) -> y (B, L, dim), in its TPLA form.
        teacher: the same of the MLA; it isn't trained.
        parameters: what is trained.
        inputs: the MLA layer's inputs, (B, L, dim) each; gone through once an epoch.
        epochs: how often.
        lr: learning rate.

    Returns:
        The mean loss of each epoch.

    Raises:
        InputError: no inputs, or nothing to train.
    """
    batches = list(inputs)
    trained = list(parameters)
    if not batches or not trained:
        raise InputError("align: expected at least one batch of inputs and one parameter.")
    optimizers: list[torch.optim.Optimizer] = []
    matrices = [p for p in trained if p.dim() == 2]
    others = [p for p in trained if p.dim() != 2]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr, weight_decay=0.0))
    losses = []
    for _ in range(epochs):
        total = 0.0
        for x in batches:
            with torch.no_grad():
                wanted = teacher(x)
            loss = (student(x) - wanted).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += float(loss.detach())
        losses.append(total / len(batches))
    return losses
