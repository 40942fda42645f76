"""Flux attention: each layer runs full or sparse attention, decided once for each prompt.

    r = 1 (full) iff logits[1] > logits[0], else 0 (sparse), one for all heads of a layer

Qiu et al. 2026, arXiv 2604.07394. The decision comes from the pooled queries of the prompt (see
`router`), is kept with the sequence, and decoding reuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.flux.router import FULL, SPARSE, Routers, pooled
from foveate.ops import Layout, Mask, blocks, causal, region, sinks, window
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Pattern, mask_layout
from foveate.parts.context import Context
from foveate.parts.fitting import Artefact, missing
from foveate.parts.tokens import tokens_of
from foveate.parts.trail import Trail

Route = Literal["learned", "full", "sparse"]
Mode = Literal["streaming", "triangle", "window"]


@dataclass(frozen=True)
class Flux(Pattern):
    """Full attention where the layer's router says so, else sinks and a local part.

    Streaming is by blocks: a query in block i sees the first ceil(sinks / block) key blocks and
    the blocks i - ceil(local / block) + 1 ... i, within `ctx.mask`, which must be causal. The end
    of the prompt decides for all of its rows, so routing isn't causal, though the outputs are once
    it is held fixed. A prompt that comes in chunks is decided by its first one; a sequence whose
    prompt was never seen is attended to in full.

    Attributes:
        sinks: tokens at the start that the sparse branch sees (128).
        local: tokens before a query that it sees, up to whole blocks (2048).
        block: tokens of a block (128); 1 is the form by tokens.
        mode: "streaming"; "triangle", in which a prompt's last `last` queries see everything; or
            "window", without sinks.
        last: of "triangle" (128).
        pool: p, tokens at the prompt's start and end whose queries are pooled (150). Where no
            more than a short question tells prompts apart, take about its length: it is a small
            part of a mean over 150 tokens.
        route: "learned", or the same for all layers: "full" or "sparse".

    Raises:
        InputError: a field that doesn't fit, a mask that isn't causal, or no routers.
    """

    sinks: int = 128
    local: int = 2048
    block: int = 128
    mode: Mode = "streaming"
    last: int = 128
    pool: int = 150
    route: Route = "learned"
    routers: Routers | None = field(default=None, init=False, compare=False, repr=False)
    _kept: dict[int, tuple[Trail, Tensor]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    wants_query_rope: ClassVar[bool] = True
    fitter: ClassVar[str] = "foveate.methods.flux.fit.fit"

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("local", 1), ("block", 1), ("last", 1), ("pool", 1)):
            whole("Flux", name, getattr(self, name), least=least)
        for name, kinds in (("mode", get_args(Mode)), ("route", get_args(Route))):
            if getattr(self, name) not in kinds:
                raise InputError(
                    f"Flux({name}={getattr(self, name)!r}): expected {', '.join(kinds)}."
                )

    # -- its routers -----------------------------------------------------------------------------
    @property
    def needs_fit(self) -> bool:
        """Whether routers are still to be given."""
        return self.route == "learned" and self.routers is None

    def with_artefact(self, artefact: Artefact) -> Flux:
        """The same with the routers that a fit made."""
        if "routers" not in artefact.built:
            facts = artefact.facts
            routers = Routers(tuple(facts["layers"]), facts["head_dim"])
            routers.load_state_dict(artefact.tensors)
            artefact.built["routers"] = routers
        return replace(self, pool=artefact.facts["pool"]).with_routers(artefact.built["routers"])

    def with_routers(self, routers: Routers) -> Flux:
        """The same with routers."""
        made = replace(self)
        object.__setattr__(made, "routers", routers.eval().requires_grad_(False))
        return made

    # -- the decision ----------------------------------------------------------------------------
    @torch.no_grad()
    def decide(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        """Decide r (B,), bool on the CPU, True is full attention; shapes as in a call."""
        batch = q.shape[0]
        if self.route != "learned":
            return torch.full((batch,), self.route == "full", device="cpu")
        if self.routers is None:
            raise InputError(missing("flux", "layer routers", "flux(route='sparse')"))
        key = (Flux, "decided", ctx.layer, q.shape[2], k.shape[2])
        if key not in ctx.store:
            ctx.store[key] = self._decide(q, k, ctx)
        found: Tensor = ctx.store[key]
        return found

    def _decide(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        if q.shape[2] < k.shape[2] or ctx.phase == "decode":
            trail, r = self._kept.get(ctx.layer, (None, None))
            rows = None if trail is None else trail.rows(k)
            if rows is None or r is None:
                return torch.ones(q.shape[0], dtype=torch.bool, device="cpu")
            return r[rows]
        assert self.routers is not None
        if next(self.routers.parameters()).device != q.device:
            self.routers.to(q.device)
        tokens = tokens_of(q, k, ctx)
        rows_of = [
            tokens.q_real[b if len(tokens.q_real) > 1 else 0].nonzero()[:, 0]
            for b in range(q.shape[0])
        ]
        logits = self.routers.logits(ctx.layer, pooled(q, ctx, rows_of, self.pool))
        r = (logits[:, FULL] > logits[:, SPARSE]).cpu()
        if ctx.phase != "train":
            self._kept[ctx.layer] = (Trail(k), r)
        return r

    # -- what is seen ----------------------------------------------------------------------------
    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        if self.route == "full":
            return True
        if self.route == "sparse":
            return False
        return bool(self.decide(q, k, ctx).all())

    @override
    def rule(self, ctx: Context) -> Mask | None:
        # While torch.compile traces, only what positions alone decide can be told.
        by_positions = self.route == "sparse" and self.mode != "triangle"
        return self.sparse(ctx.mask) if by_positions and ctx.mask is not None else None

    def sparse(self, mask: Mask | None, triangle: tuple[int, int] | None = None) -> Mask:
        """The sparse branch within a mask; `triangle` are the positions that see everything."""
        near = window(-(-self.local // self.block) - 1, -1, block=self.block)
        first = -(-self.sinks // self.block) * self.block
        seen: Mask = near if self.mode == "window" or not first else near | sinks(first)
        if triangle is not None:
            seen = seen | region(causal(), triangle, (0, triangle[1]))
        return seen if mask is None else mask & seen

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        tokens = tokens_of(q, k, ctx)
        if not tokens.causal:
            raise InputError(
                "flux is defined for causal attention, but the mask lets queries see later keys "
                "(no mask is everything); give Context(mask=causal()), or use sink-window."
            )
        triangle = None
        new = ctx.phase == "decode" or q.shape[2] == 1 < k.shape[2]
        if self.mode == "triangle" and not new:
            ends = tokens.q_pos.masked_fill(~tokens.q_real.expand_as(tokens.q_pos), -1).amax(1)
            if bool((ends != ends[0]).any()):
                raise InputError(
                    "flux(mode='triangle') needs sequences of one length in a batch; run them "
                    "apart, or use mode='streaming'."
                )
            end = int(ends[0]) + 1
            triangle = (max(0, end - self.last), end)
        sparse = self.sparse(ctx.mask, triangle)
        r = self.decide(q, k, ctx)
        if not bool(r.any()):
            return mask_layout(sparse, q, k, ctx)
        # Sequences that are full see all of the mask: a table of one entry for each.
        everything = blocks(r.to(q.device)[:, None, None, None], k.shape[2])
        seen = sparse | (everything if ctx.mask is None else ctx.mask & everything)
        return mask_layout(seen, q, k, ctx)
