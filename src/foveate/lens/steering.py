"""Steering: a head's attention moved along the list by what one component tells it.

The coefficients of a few directions that an early head writes are set, at the last token, to chosen
numbers, and a later head's attention from there to each of the listed words is watched. With two or
three components that inhibit, this is a plane or a space that can be walked through so that the
attention points at one place of the list after the other. Merullo et al. 2024, arXiv 2406.09519.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.lens.interventions import END, Edit, Path, coefficients, edited, signed
from foveate.lens.prompts import Prompts, last_logits
from foveate.lens.watching import watched
from foveate.ops.errors import InputError


class Swept(NamedTuple):
    """What became of a head's attention.

    coordinates: (P, n), what the coefficients were set to, in units of `scale`; scale: (n,), root
    mean square of the coefficients that the model writes itself at the last token; attention:
    (P, m), mean over the prompts, to the first, second ... listed word.
    """

    coordinates: Tensor
    scale: Tensor
    attention: Tensor


@torch.no_grad()
def sweep(
    model: nn.Module,
    prompts: Sequence[Prompts],
    writer: tuple[int, int],
    directions: Tensor,
    reader: tuple[int, int],
    coordinates: Tensor,
    *,
    alone: bool = True,
    size: int = 32,
) -> Swept:
    """Walk through the space of some directions.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: batches with as many listed words each.
        writer: (layer, head) that writes.
        directions: (D, n) orthonormal columns; turned so that what the model writes itself is
            positive in the mean, which settles their arbitrary signs.
        reader: (layer, head) that is watched.
        coordinates: (P, n), in units of what the model writes.
        alone: only the reader's query sees it, else everything behind does.
        size: prompts at a time.

    Raises:
        InputError: shapes don't fit.
    """
    if coordinates.dim() != 2 or coordinates.shape[1] != directions.shape[1]:
        raise InputError(
            f"sweep(coordinates): expected (P, {directions.shape[1]}), got "
            f"{tuple(coordinates.shape)}."
        )
    device = next(model.parameters()).device
    parts = [part for batch in prompts for part in batch.parts(size)]
    written = torch.cat([
        coefficients(model, *writer, directions, lambda ids=part.ids: last_logits(
            model, ids.to(device)))[:, END].cpu() for part in parts
    ])  # fmt: skip
    turned = signed(directions, written)
    scale = written.double().square().mean(0).sqrt()
    found = []
    for point in coordinates:
        step = (point.double() * scale).tolist()
        edit = Edit(*writer, turned, factor=0.0, step=step, positions=[END])
        summed, count = torch.zeros(()), 0
        for part in parts:
            end = torch.tensor([part.ids.shape[1] - 1], device=device)
            with (
                watched(model) as watch,
                edited(model, Path(edit, *reader, "q") if alone else edit),
            ):
                last_logits(model, part.ids.to(device))
                seen = watch.weights(reader[0], end)[:, reader[1], 0].cpu()
            summed = summed + seen.gather(1, part.listed_at).sum(0)
            count += len(seen)
        found.append(summed / count)
    return Swept(coordinates, scale, torch.stack(found))
