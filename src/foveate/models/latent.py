"""A trained model's MLA layers as TPLA or GLA, calibrated on a text, without training."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods import spec
from foveate.methods.tpla import TPLA, MLAProjection, TPLAProjection
from foveate.methods.tpla import to_tpla as convert
from foveate.methods.tpla.basis import Transform
from foveate.models.causal_lm import FoveateForCausalLM
from foveate.nn import Attention
from foveate.ops.errors import InputError


@torch.no_grad()
def to_tpla(
    model: FoveateForCausalLM,
    recipe: TPLA | None = None,
    transform: Transform = "pca",
    calibration: Tensor | None = None,
    mu: str | None = None,
    generator: torch.Generator | None = None,
) -> FoveateForCausalLM:
    """A copy of a model with every MLA replaced; it can be saved and loaded as any other.

    Args:
        model: with projection "mla" in at least one layer; it stays as it is.
        recipe: groups and variants; None is the paper's choice, two groups and exact prefill.
        transform: "pca", "hadamard" or "identity".
        calibration: (B, L) token ids of a text; PCA and mu="fit" need it.
        mu: as in `foveate.methods.tpla.to_tpla`.
        generator: draws the Hadamard signs.

    Raises:
        InputError: no layer is an MLA, or calibration is missing.
    """
    recipe = TPLA() if recipe is None else recipe
    layers = {
        i: block.attention
        for i, block in enumerate(model.model.blocks)
        if isinstance(block.attention, Attention)
        and isinstance(block.attention.projection, MLAProjection)
        and not isinstance(block.attention.projection, TPLAProjection)
    }
    if not layers:
        raise InputError("to_tpla: no layer of this model is an MLA (projection='mla').")
    hidden = {} if calibration is None else _inputs(model, layers, calibration)
    made = deepcopy(model)
    texts = [model.config.of_layer("projection", i) for i in range(model.config.num_hidden_layers)]
    for i, attention in layers.items():
        assert isinstance(attention.projection, MLAProjection)
        projection = convert(attention.projection, recipe, transform, hidden.get(i), mu, generator)
        made.model.blocks[i].attention.projection = projection.train(attention.training)
        texts[i] = spec(projection.recipe)
    made.config.projection = texts
    return made


def _inputs(
    model: FoveateForCausalLM, layers: dict[int, Attention], calibration: Tensor
) -> dict[int, Tensor]:
    """What comes into each of the attention layers, (B, L, dim), on a calibration text."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[layer] = args[0].detach()

        return hook

    handles = [module.register_forward_pre_hook(keep(i)) for i, module in layers.items()]
    training = model.training
    try:
        model.eval()
        model.model(calibration, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found
