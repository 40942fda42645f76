"""What MInference's patterns have in common: they are for prefill, and decoding is dense."""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor
from typing_extensions import override

from foveate.methods.mminference.problem import Part, Problem
from foveate.ops.errors import InputError
from foveate.parts.attention import Pattern
from foveate.parts.context import Context


class PrefillPattern(Pattern):
    """A pattern for prefill; in decode it keeps all that the mask allows (paper, section 4)."""

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return ctx.phase == "decode" or q.shape[2] == 1 < k.shape[2] or self._keeps_all(q, k, ctx)

    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        """Whether the budget covers everything."""
        return False


class ProblemPattern(PrefillPattern):
    """A pattern that can be asked about a part of a sequence, as boundaries between modalities do.

    A problem keeps original positions, so that causality survives any choice of rows and keys.
    """

    @abstractmethod
    def parts(self, problem: Problem) -> list[list[Part]]:
        """What each query head visits of a problem; every query that can must see some key."""


def check_fraction(owner: str, fraction: object) -> None:
    """Refuse what isn't None or a number in (0, 1]."""
    if fraction is None:
        return
    fits = isinstance(fraction, float | int) and not isinstance(fraction, bool)
    if not fits or not 0 < fraction <= 1:  # type: ignore[operator]
        raise InputError(
            f"{owner}(fraction={fraction!r}): expected None, or a share above 0 and up to 1."
        )


def budget(most: int, fraction: float | None, length: int) -> int:
    """`most`, or that share of `length` if it is less."""
    return most if fraction is None else min(most, math.ceil(fraction * length))
