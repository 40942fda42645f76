"""Weights and an optimizer's moments as named tensors, and back, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and kept buffer under its name, tied ones once, on the CPU."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    kept = model.state_dict()
    found |= {name: tensor for name, tensor in model.named_buffers() if name in kept}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}


def put_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The way back of `weights`."""
    mine: dict[str, Tensor] = dict(model.named_parameters())
    mine |= dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer of AdamW's kind holds for a model's parameters, as "field/parameter"."""
    return {
        f"{field}/{name}": value.detach().cpu().clone().contiguous()
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def put_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, held: dict[str, Tensor]
) -> None:
    """The way back of `moments`."""
    mine = dict(model.named_parameters())
    for key, value in held.items():
        field, _, name = key.partition("/")
        parameter = mine[name]
        # AdamW keeps its step counter on the CPU, the moments beside the parameter.
        place = value if field == "step" else value.to(parameter.device)
        optimizer.state[parameter][field] = place
