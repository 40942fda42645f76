"""Q-Boundary and 2D-Boundary: patterns that depend on what kind of token asks, and what is asked.

Prompts of a vision-language model mix text and vision tokens, and a head's pattern changes where
they meet (MMInference, arXiv 2504.16083, section 3.3, algorithms 2 and 3). Queries (and keys) are
permuted so that those of a modality stand together, each kind runs its own pattern on its own
estimate, and parts of one query over several kinds of keys are merged by their log-sum-exp.
No-Boundary and K-Boundary are the patterns themselves, on the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.mminference.lines import layout_of_parts
from foveate.methods.mminference.prefill import PrefillPattern, ProblemPattern
from foveate.methods.mminference.problem import Part, Problem, problems_by_pair, problems_by_query
from foveate.methods.naming import make
from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.parts.attention import TILE, Pattern
from foveate.parts.context import Context

TEXT, VISION = 0, 1


def _pattern(owner: str, text: object) -> Pattern:
    """The pattern that a text names."""
    made: Any = make(text) if isinstance(text, str) else text
    if not (isinstance(made, ProblemPattern) or getattr(made, "exact", False)):
        raise InputError(
            f"{owner}(patterns=...): {text!r} can't run on one kind of tokens; expected full, "
            "a-shape, tri-shape, vertical-slash, block-sparse or grid, with hyper-parameters."
        )
    assert isinstance(made, Pattern)
    return made


def _parts(pattern: Pattern, problem: Problem) -> list[list[Part]]:
    if isinstance(pattern, ProblemPattern):
        return pattern.parts(problem)
    rows, keys = (torch.arange(len(x), device=x.device) for x in (problem.rows, problem.keys))
    return [[Part(rows, keys)]] * problem.heads


def _nth(patterns: tuple[Any, ...], kind: int) -> Any:
    """The pattern of a modality; the last one is for all further ones."""
    return patterns[min(kind, len(patterns) - 1)]


@dataclass(frozen=True)
class QBoundary(PrefillPattern):
    """Each query runs the pattern of its own modality, on all keys.

    Queries are permuted by modality, stably; keys stay. Each modality's index comes from its own
    last queries, and lines of a grid are counted in its own tokens. Causality rests on original
    positions. Modalities come from `Context(modality=...)`, 0, 1, ... for each key (0 text,
    1 vision in `foveate.use`); without any, all tokens are of the first. Within `ctx.mask`, which
    must be causal. Decoding is dense.

    Attributes:
        patterns: of queries of modality 0, 1, ...; the last one is for all further ones.

    Raises:
        InputError: a pattern that can't run on one kind of tokens, or a mask that isn't causal.
    """

    patterns: tuple[str, ...] = ("vertical-slash", "grid")
    _made: tuple[Pattern, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        given = _texts("QBoundary", self.patterns)
        object.__setattr__(self, "patterns", given)
        object.__setattr__(self, "_made", tuple(_pattern("QBoundary", text) for text in given))

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        made = [
            [(problem, _parts(_nth(self._made, kind), problem)) for kind, problem in sequence]
            for sequence in problems_by_query(q, k, ctx, TILE, "q-boundary")
        ]
        return layout_of_parts(made, (q.shape[2], k.shape[2]), TILE, q.device)


@dataclass(frozen=True)
class TwoDBoundary(PrefillPattern):
    """Each pair of modalities, of query and key, runs a pattern of its own.

    Queries and keys are permuted by modality; a pair's index is estimated within the pair, lines
    of a grid are counted in each modality's own tokens, and a query's parts over all kinds of keys
    are merged by their log-sum-exp. Modalities and masks as in `QBoundary`.

    Attributes:
        patterns: patterns[a][b] for queries of modality a on keys of modality b; the last one is
            for all further ones.

    Raises:
        InputError: as in `QBoundary`.
    """

    patterns: tuple[tuple[str, ...], ...] = (("vertical-slash",), ("vertical-slash", "grid"))
    _made: tuple[tuple[Pattern, ...], ...] = field(
        init=False, repr=False, compare=False, default=()
    )

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, tuple | list) or not self.patterns:
            raise InputError("TwoDBoundary(patterns=...): expected a row of patterns per modality.")
        given = tuple(_texts("TwoDBoundary", row) for row in self.patterns)
        made = tuple(tuple(_pattern("TwoDBoundary", text) for text in row) for row in given)
        object.__setattr__(self, "patterns", given)
        object.__setattr__(self, "_made", made)

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        made = [
            [(problem, _parts(_nth(_nth(self._made, a), b), problem)) for a, b, problem in sequence]
            for sequence in problems_by_pair(q, k, ctx, TILE, "2d-boundary")
        ]
        return layout_of_parts(made, (q.shape[2], k.shape[2]), TILE, q.device)


def _texts(owner: str, patterns: object) -> tuple[str, ...]:
    if not isinstance(patterns, tuple | list) or not patterns:
        raise InputError(
            f"{owner}(patterns={patterns!r}): expected a list of patterns, one per modality, such "
            'as ("vertical-slash", "grid").'
        )
    if not all(isinstance(text, str) for text in patterns):
        raise InputError(f"{owner}(patterns={patterns!r}): expected texts such as 'grid'.")
    return tuple(patterns)
