"""Methods whose hyper-parameters grow with the length, and how their cost should grow then."""

from __future__ import annotations

import math
from typing import NamedTuple

from foveate.ops.errors import InputError


class Setting(NamedTuple):
    """How a method is run at length n, and how its cost should grow.

    text: with {n}, {root} (the power of two nearest to sqrt n) and {rest} (n / root) in it;
    exponent: what theory says for these hyper-parameters, None where nobody says.
    """

    text: str
    exponent: float | None = None


SETTINGS = {
    "full": Setting("full", 2.0),
    "sink-window": Setting("sink-window(window=256)", 1.0),
    "dma": Setting("dma(window=256)", 1.0),
    "superlinear": Setting("superlinear", 1.5),
    "sea": Setting("sea(max_length={n})", 1.0),
    "routing-transformer": Setting(
        "routing-transformer(clusters={root}, window={rest}, local=0)", 1.5
    ),
    "combiner": Setting("combiner(size={root})", 1.5),
    "flowformer": Setting("flowformer", 1.0),
    "lucid": Setting("lucid", 2.0),
    "tensor-attention": Setting("tensor-attention(form='exact')", 3.0),
    # At one degree, however near it comes: which degree keeps a tolerance depends on the logits.
    "tensor-attention(form='features')": Setting(
        "tensor-attention(form='features', degree=4, tolerance=1e999)", 1.0
    ),
    "hsa": Setting("hsa", 1.0),  # b^2 pairs for each of N / b groups, and of N / b^2 above, ...
    "gaam": Setting("gaam", 1.0),
    "gaam(axis='tokens', heads=1)": Setting("gaam(axis='tokens', heads=1)", 1.0),
    "gaam(form='density', axis='tokens', heads=1)": Setting(
        "gaam(form='density', axis='tokens', heads=1)", 1.0
    ),
    "grassmann": Setting("grassmann", 1.0),
    "deconstructed-mlp": Setting("deconstructed-mlp", 1.0),
    "deconstructed-approximate": Setting("deconstructed-approximate", 1.0),
    "deconstructed-nonapproximate": Setting("deconstructed-nonapproximate", 1.0),
}
TRAINED = ("dma", "superlinear", "sea", "routing-transformer", "combiner")


def setting_of(method: str) -> Setting:
    """The setting of a key; or a text as it stands, with an exponent that nobody says."""
    return SETTINGS.get(method, Setting(method))


def at_length(text: str, length: int) -> str:
    """A method's text at a length: {n}, {root} and {rest} filled in.

    Raises:
        InputError: another name in braces.
    """
    root = 1 << round(math.log2(max(1, length)) / 2)
    names = {"n": length, "root": root, "rest": -(-length // root)}
    try:
        return text.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{text!r}: in braces may stand {{n}}, {{root}} (about its square root) and {{rest}} "
            "(n / root)."
        ) from error
