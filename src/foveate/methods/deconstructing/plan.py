"""Which layers are a variant and which are standard attention: uniform, hybrid, and the ratios.

Layers are counted from 1, as in the paper: in a hybrid layer 1 is the variant, 2 is standard, ...

Source: arXiv 2510.11602, sections 3 and 5.
"""

from __future__ import annotations

from typing import Any

from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole

# Paper's name -> the field of a model's config that takes it, and its text.
VARIANTS: dict[str, tuple[str, str]] = {
    "standard": ("attention", "full"),
    "mlp": ("mixer", "deconstructed-mlp"),
    "approximate": ("attention", "deconstructed-approximate"),
    "non-approximate": ("attention", "deconstructed-nonapproximate"),
    "rnd-emb-qk": ("mixer", "rnd-emb-qk"),
    "fixed-seq-qk": ("mixer", "fixed-seq-qk"),
    "static-emb-qk": ("mixer", "static-emb-qk"),
}

RATIOS = (
    "uniform", "even", "odd", "top", "middle", "bottom", "quarter", "first", "last", "bilateral",
)  # fmt: skip


def standard_layers(ratio: str, layers: int) -> tuple[int, ...]:
    """The layers, from 1, that stay standard attention; for 24 layers they are the paper's.

    Args:
        ratio: "uniform" (none), "even" (the hybrid of the main experiments), "odd", "top" (the
            first half), "middle" (the first and the last quarter: those in the middle are the
            variant), "bottom" (the last half), "quarter" (every fourth), "first", "last" or
            "bilateral" (both).
        layers: of the model.

    Raises:
        InputError: an unknown ratio.
    """
    whole("standard_layers", "layers", layers, least=1)
    if ratio not in RATIOS:
        raise InputError(f"standard_layers({ratio!r}): {nearest(str(ratio), RATIOS)}")
    every = range(1, layers + 1)
    chosen = {
        "uniform": lambda i: False,
        "even": lambda i: i % 2 == 0,
        "odd": lambda i: i % 2 == 1,
        "top": lambda i: i <= layers // 2,
        "middle": lambda i: i <= layers // 4 or i > layers - layers // 4,
        "bottom": lambda i: i > layers // 2,
        "quarter": lambda i: i % 4 == 0,
        "first": lambda i: i == 1,
        "last": lambda i: i == layers,
        "bilateral": lambda i: i in (1, layers),
    }[ratio]
    return tuple(i for i in every if chosen(i))


def composed(
    variant: str, layers: int, ratio: str = "uniform", options: str = "", standard: str = "full"
) -> dict[str, Any]:
    """The fields of a model's config that make it such a composition.

        FoveateConfig(num_hidden_layers=4, **composed("mlp", 4, "even"))

    Args:
        variant: "standard", "mlp", "approximate", "non-approximate", "rnd-emb-qk", "fixed-seq-qk"
            or "static-emb-qk".
        layers: of the model.
        ratio: which layers stay standard, see `standard_layers`.
        options: hyper-parameters of the variant, such as "length=64, sigma=1.0".
        standard: the attention of the layers that stay.

    Returns:
        `attention` and `mixer`, each a list by layer.

    Raises:
        InputError: an unknown variant or ratio.
    """
    if variant not in VARIANTS:
        raise InputError(f"composed({variant!r}): {nearest(str(variant), VARIANTS)}")
    kept = {i - 1 for i in standard_layers(ratio, layers)}
    field, text = VARIANTS[variant]
    given = f"{text}({options})" if options else text
    attention: list[str] = [standard] * layers
    mixer: list[str | None] = [None] * layers
    for i in set(range(layers)) - kept:
        if field == "attention":
            attention[i] = given
        else:
            mixer[i] = given
    return {"attention": attention, "mixer": mixer}
