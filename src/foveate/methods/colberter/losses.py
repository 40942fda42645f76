"""ColBERTer's training: Margin-MSE from a teacher on three scores, and a price on open gates.

    L    = a_b MarginMSE(s) + a_CLS MarginMSE(s_CLS) + a_CS L_CS
    MarginMSE(s) = mean ((s+ - s-) - (T+ - T-))^2
    L_CS = mean of r+ + mean of r-      gates of real words; they are >= 0, so this is their L1 norm

Only differences of scores count: a teacher may shift both scores of a triple as it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.ops.errors import InputError


@dataclass(frozen=True)
class Weights:
    """Of the three losses; the defaults are those with stopwords (without: cls 0.5, stopwords 0).

    Attributes:
        both: a_b, of the mixed score.
        cls: a_CLS, of the single vectors' score.
        stopwords: a_CS, of the gates.
    """

    both: float = 1.0
    cls: float = 0.1
    stopwords: float = 0.75

    def __post_init__(self) -> None:
        for name in ("both", "cls", "stopwords"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1e9:
                raise InputError(f"Weights({name}={value!r}): expected a number of 0 or more.")


def margin_mse(better: Tensor, worse: Tensor, teacher_margin: Tensor) -> Tensor:
    """Mean of ((s+ - s-) - (T+ - T-))^2 over triples: a scalar."""
    return (better - worse - teacher_margin.to(better.dtype)).square().mean()


def open_gates(gates: Tensor, real: Tensor) -> Tensor:
    """The mean gate of the words that are there, over a batch: (B, n) both."""
    return (gates * real).sum() / real.sum().clamp(min=1)
