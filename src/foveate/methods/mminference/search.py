"""The offline search: which pattern and budget each head gets.

Every candidate is first stretched or shrunk, in steps of 50 tokens, until what its layout really
visits costs as much as an A-shape of the target (the kernel's work, not the mask's pairs); then the
one whose output is nearest to dense attention's wins (MInference, arXiv 2407.02490, section 3.2).
With modalities (MMInference, arXiv 2504.16083, algorithm 4): first the best pattern for the queries
of each modality, then for each pair of modalities with all other pairs dense, and then, per head,
No-, Q- or 2D-Boundary, whichever output is nearest to dense.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.methods.mminference.a_shape import AShape
from foveate.methods.mminference.boundary import QBoundary, TwoDBoundary
from foveate.methods.naming import make, spec
from foveate.ops import AttentionOutput, Layout, attention
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention
from foveate.parts.context import Context
from foveate.parts.tokens import tokens_of

STEP = 50
MINFERENCE = (
    "a-shape(sinks=1024, local=4096)",
    *(
        f"vertical-slash(verticals={nv}, slashes={ns}, forced_slashes=30)"
        for nv, ns in ((30, 2048), (100, 1800), (500, 1500), (3000, 200))
    ),
    "block-sparse(blocks=100)",
)
_LINES = ("TFF", "FTF", "FFT", "TTF", "FTT", "TTT")
MMINFERENCE = (
    *(f"a-shape(sinks=128, local={local})" for local in (1024, 2048, 4096)),
    *(
        f"vertical-slash(verticals={nv}, slashes={ns}, forced_slashes=30)"
        for nv, ns in (
            (1000, 1024), (1000, 2048), (2000, 2048), (1000, 3096), (2000, 3096), (1000, 4096),
            (2000, 4096), (3500, 200), (1000, 2500),
        )
    ),
    *(
        f"grid(horizontal={h == 'T'}, vertical={v == 'T'}, slash={s == 'T'})"
        for h, v, s in map(tuple, _LINES)
    ),
)  # fmt: skip


SPACES = {"minference": MINFERENCE, "mminference": MMINFERENCE}


def space(frame: int | None = None, *, vision: bool = False) -> tuple[str, ...]:
    """The candidates of a paper.

    Args:
        frame: tokens of a video frame, for grids of that stride beside those that are found.
        vision: MMInference's candidates, not MInference's.
    """
    if not vision:
        return MINFERENCE
    if frame is None:
        return MMINFERENCE
    grids = [text for text in MMINFERENCE if text.startswith("grid")]
    return MMINFERENCE + tuple(text.replace("grid(", f"grid(stride={frame}, ") for text in grids)


@dataclass(frozen=True)
class Trial:
    """One candidate, as it was run for a head.

    Attributes:
        pattern: its text, at the budget that it was given.
        error: mean |output - dense output|.
        area: elements of the tiles that it visits.
    """

    pattern: str
    error: float
    area: float


@dataclass
class HeadSearch:
    """What is known of one head so far: its trials, over all prompts in turn.

    Attributes:
        target: area that candidates are brought to.
        trials: by the candidate's text as it was given.
    """

    target: float = 0.0
    trials: dict[str, list[Trial]] = field(default_factory=dict)

    def add(self, candidate: str, trial: Trial) -> None:
        """One more prompt's trial of a candidate."""
        self.trials.setdefault(candidate, []).append(trial)

    @property
    def best(self) -> Trial:
        """The candidate of least mean error, the cheaper one of equals; at its first budget."""

        def key(trials: list[Trial]) -> tuple[float, float]:
            return sum(t.error for t in trials) / len(trials), trials[0].area

        trials = min(self.trials.values(), key=key)
        return replace(trials[0], error=key(trials)[0])


def default_target(length: int) -> tuple[int, int]:
    """(sinks, local) of the A-shape that sets the budget: 1024 and 4096, less for short prompts."""
    return (1024, 4096) if length >= 20_480 else (max(1, length // 20), max(1, length // 5))


def area_of(layout: Layout) -> float:
    """Elements of the tiles that a layout visits, for its only head."""
    return layout.tile_area


def fitted(candidate: str, area: Callable[[Any], float], target: float, length: int) -> Any | None:
    """A candidate at the budget whose area comes nearest to the target from below.

    Args:
        candidate: its text; the larger of its budgets grows and shrinks by steps of 50 tokens,
            block-sparse by blocks; a grid is as large as its stride makes it.
        area: what a pattern really visits.
        target: the area.
        length: tokens of the prompt, beyond which no budget grows.

    Returns:
        The pattern; None if even its smallest visits more than the target (and a step's slack).
    """
    given = make(candidate)
    grows = _GROWS.get(candidate.partition("(")[0])
    if grows is None:
        return given if area(given) <= 1.02 * target else None
    fields, step = grows
    most = len(fields) * (-(-length // step) + 1)
    low, high = -most, most
    if area(stretched(given, low, fields, step, length)) > 1.02 * target:
        return None
    while low < high:
        middle = -((-low - high) // 2)
        if area(stretched(given, middle, fields, step, length)) <= target:
            low = middle
        else:
            high = middle - 1
    return stretched(given, low, fields, step, length)


# What a candidate's budgets are, and the tokens (or blocks) of a step.
_GROWS: dict[str, tuple[tuple[str, ...], int]] = {
    "a-shape": (("sinks", "local"), STEP),
    "vertical-slash": (("verticals", "slashes"), STEP),
    "block-sparse": (("blocks",), 1),
}


def grows(key: str) -> tuple[str, ...]:
    """The fields that say how much a pattern keeps; none for one whose stride says it."""
    return _GROWS[key][0] if key in _GROWS else ()


def stretched(given: Any, steps: int, fields: tuple[str, ...], step: int, length: int) -> Any:
    """So many steps more (or less) of the larger budget, each time the one that is larger then.

    What a pattern keeps in any case is not taken off.
    """
    values = {name: min(getattr(given, name), length) for name in fields}
    floors = {"verticals": getattr(given, "forced_verticals", 0), "slashes": STEP, "sinks": 0}
    for _ in range(abs(steps)):
        if steps > 0:
            name = max(values, key=lambda one: values[one])
            values[name] = min(length, values[name] + step)
            continue
        left = [one for one in values if values[one] > floors.get(one, 1)]
        if not left:
            break
        name = max(left, key=lambda one: values[one])
        values[name] = max(floors.get(name, 1), values[name] - step)
    return replace(given, **values)


def search_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    candidates: Sequence[str],
    target: tuple[int, int],
    found: HeadSearch | None = None,
) -> HeadSearch:
    """Try the candidates on one head of one prompt.

    Args:
        q: (1, 1, L, D).
        k: (1, 1, L, D).
        v: (1, 1, L, Dv).
        ctx: with a causal mask, and `modality` where boundaries are to be tried.
        candidates: texts of patterns.
        target: (sinks, local) of the A-shape whose cost all must match.
        found: earlier prompts' trials, whose budgets are kept.

    Raises:
        InputError: more than one head, or no candidate can be brought to the budget.
    """
    if q.shape[:2] != (1, 1) or k.shape[1] != 1:
        raise InputError(f"search_head takes one head of one prompt, got {tuple(q.shape)}.")
    head = _Head(q, k, v, replace(ctx, store={}), target)
    found = HeadSearch(head.target) if found is None else found
    if found.trials:
        for trials in found.trials.values():
            trials.append(head.trial(make(trials[0].pattern)))
        return found
    for candidate in candidates:
        own = fitted(candidate, head.area, head.target, q.shape[2])
        if own is not None:
            found.add(candidate, head.trial(own))
    modalities = [] if ctx.modality is None else ctx.modality.unique().tolist()
    if len(modalities) > 1:
        for pattern in _boundaries(head, candidates, int(max(modalities)) + 1):
            found.add(spec(pattern), head.trial(pattern))
    if not found.trials:
        raise InputError("No candidate can be brought to the budget; give a larger target.")
    return found


class _Head:
    """One head of one prompt: dense attention's output, and what a pattern makes of it."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, target: tuple[int, int]
    ) -> None:
        self.given, self.ctx = (q, k, v), ctx
        self.dense = attention(q, k, v, ctx.mask, **ctx.options).out
        self.shape = AShape(*target)
        self.target = self.area(self.shape)

    def layout(self, pattern: Any) -> Layout:
        if pattern.is_dense(*self.given[:2], self.ctx):
            return make("full").layout(*self.given, self.ctx)
        return pattern.layout(*self.given, self.ctx)

    def area(self, pattern: Any) -> float:
        return area_of(self.layout(pattern))

    def trial(self, pattern: Any, rows: Tensor | None = None) -> Trial:
        layout = self.layout(pattern)
        out = attention(*self.given, layout=layout, **self.ctx.options).out
        off = (out.float() - self.dense.float()).abs()
        off = off if rows is None else off[:, :, rows]
        return Trial(spec(pattern), float(off.mean()), area_of(layout))


def _boundaries(head: _Head, candidates: Sequence[str], kinds: int) -> list[Any]:
    """The best Q-Boundary and the best 2D-Boundary of a head, within its target."""
    length = head.given[0].shape[2]
    modality = head.ctx.modality
    assert modality is not None
    of_row = modality.reshape(-1)[-length:]
    dense = head.area(make("full"))
    # A part of the sequence may visit the share of its own area that the target is of all.
    share = head.target / dense

    def best(pattern_of: Callable[[str], Any], rows: Tensor) -> str:
        """The candidate with the least error, in a boundary that is dense elsewhere."""
        nothing = head.area(pattern_of("a-shape(sinks=0, local=1)"))
        rest = (head.area(pattern_of("full")) - nothing) * share + nothing
        tried = []
        for candidate in candidates:
            own = fitted(candidate, lambda p: head.area(pattern_of(spec(p))), rest, length)
            if own is not None:
                tried.append((head.trial(pattern_of(spec(own)), rows).error, spec(own)))
        return min(tried)[1] if tried else "a-shape(sinks=0, local=1)"

    def one_query(a: int) -> Callable[[str], Any]:
        return lambda text: QBoundary(tuple(text if c == a else "full" for c in range(kinds)))

    def one_pair(a: int, b: int) -> Callable[[str], Any]:
        return lambda text: TwoDBoundary(
            tuple(
                tuple(text if (c, d) == (a, b) else "full" for d in range(kinds))
                for c in range(kinds)
            )
        )

    by_query = tuple(best(one_query(a), of_row == a) for a in range(kinds))
    pairs = {
        (a, b): best(one_pair(a, b), of_row == a)
        for a, b in itertools.product(range(kinds), repeat=2)
    }
    by_pair = tuple(tuple(pairs[a, b] for b in range(kinds)) for a in range(kinds))
    made = [QBoundary(by_query), TwoDBoundary(by_pair)]
    return [pattern for pattern in made if head.area(pattern) <= 1.02 * head.target]


@dataclass
class Searcher(Attention):
    """Full attention that tries candidates on every head that it is given, and keeps what it found.

    Attributes:
        candidates: texts of patterns.
        target: (sinks, local); None is `default_target`.
        tell: called with each finished (layer, head).
        layer_done: called with each finished layer.
        skip: layers that aren't searched.
        found: by (layer, head).
    """

    candidates: tuple[str, ...] = MINFERENCE
    target: tuple[int, int] | None = None
    tell: Callable[[int, int], None] = lambda layer, head: None
    layer_done: Callable[[int], None] = lambda layer: None
    skip: frozenset[int] = frozenset()
    found: dict[tuple[int, int], HeadSearch] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Dense attention; shapes as in `Attention`, of one prompt.

        Attention that isn't causal, as of a model's vision part, is left alone.
        """
        ctx = Context() if ctx is None else ctx
        mine = ctx.layer not in self.skip
        if mine and q.shape[2] > 1 and tokens_of(q, k, ctx).causal:
            if q.shape[0] != 1:
                raise InputError(
                    f"The search takes one prompt at a time, got a batch of {q.shape[0]}."
                )
            target = self.target or default_target(q.shape[2])
            group = q.shape[1] // k.shape[1]
            for h in range(q.shape[1]):
                kv = slice(h // group, h // group + 1)
                own = (q[:, h : h + 1], k[:, kv], v[:, kv])
                sinks = None if ctx.sink_logits is None else ctx.sink_logits[h : h + 1]
                alone = replace(ctx, sink_logits=sinks, stats=None)
                before = self.found.get((ctx.layer, h))
                with torch.no_grad():
                    self.found[ctx.layer, h] = search_head(
                        *own, alone, self.candidates, target, before
                    )
                self.tell(ctx.layer, h)
            self.layer_done(ctx.layer)
        return make("full")(q, k, v, ctx)


def chosen(found: dict[tuple[int, int], HeadSearch]) -> dict[int, dict[str, list[int]]]:
    """The heads of each layer by the pattern that is best for them."""
    plan: dict[int, dict[str, list[int]]] = {}
    for (layer, head), one in sorted(found.items()):
        plan.setdefault(layer, {}).setdefault(one.best.pattern, []).append(head)
    return plan
