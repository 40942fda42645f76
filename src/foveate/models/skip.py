"""A language model without some of its layers: what the others do alone."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

from torch import nn

from foveate.models.causal_lm import FoveateForCausalLM
from foveate.models.reference import reference_of
from foveate.ops.errors import InputError


def without_layers(model: FoveateForCausalLM, layers: Iterable[int]) -> FoveateForCausalLM:
    """A copy without these layers, the residual passing; it can be saved as any other.

    Args:
        model: stays as it is.
        layers: to leave out, from 0.

    Raises:
        InputError: there is no such layer, or none would be left.
    """
    count = model.config.num_hidden_layers
    out = set(layers)
    if not out <= set(range(count)) or len(out) == count:
        raise InputError(
            f"without_layers: expected some, not all, of 0 to {count - 1}, got {sorted(out)}."
        )
    kept = [i for i in range(count) if i not in out]
    made = deepcopy(model)
    made.model.layers = nn.ModuleList(made.model.layers[i] for i in kept)
    made.config.num_hidden_layers = len(kept)
    for name in ("projection", "attention", "mixer", "router"):
        given = getattr(made.config, name)
        if isinstance(given, list | tuple):
            setattr(made.config, name, [given[i] for i in kept])
    if made.config.moe_layers:
        made.config.moe_layers = [kept.index(i) for i in made.config.moe_layers if i in kept]
    if all(reference_of(block) is None for block in made.model.blocks):
        made.model.reference = None
    return made
