"""Each head runs the pattern and the budget that the offline search gave it, on this very model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from foveate.methods.mminference.search import SPACES, grows
from foveate.methods.naming import make, spec
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.by_heads import attend_by_heads
from foveate.parts.context import Context
from foveate.parts.fitting import Artefact, missing


@dataclass(frozen=True)
class MMInference(Attention):
    """MInference as its papers run it: patterns found offline, indices estimated online.

    `foveate fit MODEL --method mminference` runs the search of arXiv 2407.02490, section 3.2, at
    the cost of an A-shape of `sinks` + `local`; its artefact is JSON. Within `ctx.mask`, which must
    be causal. What patterns keep, estimate and refuse their own pages say; decoding is dense.

    Attributes:
        sinks, local: of the A-shape whose cost the search gives every head; None is 1024 and 4096,
            and less on prompts of fewer than 20,480 tokens. Of the search alone.
        space: "minference" or "mminference", the candidates of the search. Of the search alone.
        prompts: that the search averages errors over (1). Of the search alone.
        budget: factor on the budgets that were found (our addition, for sweeps).

    Raises:
        InputError: a field that doesn't fit, or no artefact.
    """

    sinks: int | None = None
    local: int | None = None
    space: str = "minference"
    prompts: int = 1
    budget: float = 1.0
    found: Artefact | None = field(default=None, init=False, compare=False, repr=False)

    fitter: ClassVar[str] = "foveate.methods.mminference.fit.fit"
    suffix: ClassVar[str] = ".json"

    def __post_init__(self) -> None:
        whole("MMInference", "prompts", self.prompts, least=1)
        for name, least in (("sinks", 0), ("local", 1)):
            if getattr(self, name) is not None:
                whole("MMInference", name, getattr(self, name), least=least)
        if (self.sinks is None) != (self.local is None):
            raise InputError("MMInference: give both sinks and local, or neither.")
        if self.space not in SPACES:
            raise InputError(f"MMInference(space={self.space!r}): expected {' or '.join(SPACES)}.")
        number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if not number or not 0 < self.budget < float("inf"):
            raise InputError(f"MMInference(budget={self.budget!r}): expected a factor above 0.")

    @property
    def reserved(self) -> str:
        """What is kept whatever is estimated, in words."""
        return "what each head's pattern keeps"

    @property
    def target(self) -> tuple[int, int] | None:
        """The A-shape of the search."""
        return None if self.sinks is None or self.local is None else (self.sinks, self.local)

    @property
    def needs_fit(self) -> bool:
        """Whether the patterns are still to be given."""
        return self.found is None

    def with_artefact(self, artefact: Artefact) -> MMInference:
        """The same with the patterns that a search found."""
        made = replace(self)
        object.__setattr__(made, "found", artefact)
        return made

    def split(self, layer: int) -> list[tuple[tuple[int, ...] | None, Attention]]:
        """(heads, pattern) of a layer; a layer that the search didn't see is full."""
        if self.found is None:
            raise InputError(missing("mminference", "patterns", "vertical-slash"))
        patterns: dict[str, Sequence[int]] = self.found.facts["layers"].get(str(layer), {})
        if not patterns:
            return [(None, make("full"))]
        return [(tuple(heads), scaled(make(text), self.budget)) for text, heads in patterns.items()]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Each group of heads by its own pattern; shapes as in `Attention`."""
        ctx = Context() if ctx is None else ctx
        if ctx.mask is not None and ctx.mask.groups()[1] > 1:
            raise InputError("mminference takes masks that are the same for all heads.")
        parts = self.split(ctx.layer)
        if parts[0][0] is None:
            return parts[0][1](q, k, v, ctx)
        named = {heads: method for heads, method in parts if heads is not None}
        numbers = sorted(h for heads in named for h in heads)
        if numbers != list(range(q.shape[1])):
            raise InputError(
                f"The patterns name the heads {numbers}, but layer {ctx.layer} has heads 0 to "
                f"{q.shape[1] - 1}; fit on this model."
            )
        return attend_by_heads(list(named.items()), q, k, v, ctx)


def scaled(pattern: Any, factor: float) -> Any:
    """A pattern with its budgets times a factor; a grid has none, a boundary's are its parts'."""
    if factor == 1.0:
        return pattern
    key = spec(pattern).partition("(")[0]
    names = {f.name for f in fields(pattern)}
    if "patterns" in names:

        def deep(one: Any) -> Any:
            return (
                spec(scaled(make(one), factor)) if isinstance(one, str) else tuple(map(deep, one))
            )

        return replace(pattern, patterns=deep(pattern.patterns))
    values = {name: max(1, round(getattr(pattern, name) * factor)) for name in grows(key)}
    return replace(pattern, **values)
