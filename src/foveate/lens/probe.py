"""Listeners inside a running model: what each layer's attention is given, and the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hf.places import Site, self_stacks, sites
from foveate.hf.using import use
from foveate.lens.trials import Trial, tried
from foveate.methods import make
from foveate.ops import AttentionOutput, column_sums, probs
from foveate.parts import Attention, Context
from foveate.parts.attention import EVERYTHING
from foveate.runs.activations import Activations, activations
from foveate.runs.heads import HeadFigures, Wanted, head_figures, sampled_rows

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass
class Seen:
    """What one forward showed of a layer; figures and trials are None where they weren't asked."""

    figures: HeadFigures | None
    trials: dict[str, Trial] | None
    sampled: Tensor  # (n, Lkv), mean over heads and sequences


@dataclass
class Watch(Attention):
    """Full attention that measures the layers that are wanted.

    Attributes:
        wanted: what is measured.
        layers: that are measured; of the others only sampled rows are taken.
        names: candidates that are tried.
        weights: of each layer, the map out of its heads.
        streams: of each layer that has run, squared norms of its input, (B, L).
        done: called with each layer.
    """

    wanted: Wanted
    layers: frozenset[int]
    names: tuple[str, ...]
    weights: dict[int, Tensor | None]
    streams: dict[int, Tensor] = field(default_factory=dict)
    done: Callable[[int, Seen], None] = lambda layer, seen: None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Dense attention; shapes as in `Attention`."""
        ctx = Context() if ctx is None else ctx
        if ctx.layer not in self.layers:
            result = make("full")(q, k, v, ctx)
            options: dict[str, Any] = {"scale": ctx.scale, "softcap": ctx.softcap, "bias": ctx.bias}
            rows = sampled_rows(q, self.wanted)
            some = probs(q, k, result.lse, rows, ctx.mask or EVERYTHING, **options)
            self.done(ctx.layer, Seen(None, None, some.mean((0, 1))))
            return result
        figures = head_figures(q, k, v, ctx, self.wanted)
        dense = AttentionOutput(figures.out, figures.lse)
        trials = tried(
            self.names, q, k, v, ctx, dense, self.weights.get(ctx.layer),
            self.streams.get(ctx.layer),
        )  # fmt: skip
        self.done(ctx.layer, Seen(figures, trials, figures.sampled.mean(0)))
        return dense


@dataclass
class Importance(Attention):
    """Full attention that keeps each head's importance of the first keys, by layer: (B, Hq, keys).

    Attributes:
        keys: how many.
        found: by layer, one entry for each forward.
    """

    keys: int = 2
    found: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Dense attention; shapes as in `Attention`, causal, without padding."""
        ctx = Context() if ctx is None else ctx
        result = make("full")(q, k, v, ctx)
        options: dict[str, Any] = {"scale": ctx.scale, "softcap": ctx.softcap, "bias": ctx.bias}
        sums = column_sums(q, k, result.lse, ctx.mask or EVERYTHING, **options)
        table = (ctx.mask or EVERYTHING).dense(q.shape[2], k.shape[2], device=q.device)
        alpha = sums / table.sum(2).clamp_min(1)
        self.found.setdefault(ctx.layer, []).append(alpha[..., : self.keys].cpu())
        return result


class Model:
    """A transformers model that can be watched.

    Attributes:
        layers: numbers of the layers that attend to themselves.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        found = sites(model)
        stack = self_stacks(found)[0]
        self._places: dict[int, tuple[nn.Module, Site]] = {
            site.layer: (module, site)
            for module, site in found.items()
            if not site.cross and site.stack == stack
        }
        self.layers = tuple(sorted(self._places))

    def weights(self) -> dict[int, Tensor | None]:
        """Each layer's map out of its heads, (dim, Hq Dv), where it has one by a usual name."""
        made: dict[int, Tensor | None] = {}
        for layer, (module, _) in self._places.items():
            made[layer] = None
            for name in OUTPUTS:
                inner = getattr(module, name, None)
                if isinstance(inner, nn.Linear):
                    made[layer] = inner.weight
                    break
        return made

    @torch.inference_mode()
    def watched(
        self,
        ids: Tensor,
        watch: Watch,
        tell: Callable[[int, Activations], None] = lambda layer, found: None,
    ) -> None:
        """One forward over ids (B, L), without a head.

        Args:
            ids: tokens.
            watch: what listens in attention.
            tell: takes each measured layer's hidden states: its input.
        """
        handles = []
        for layer, (_, site) in self._places.items():
            block = self.model.get_submodule(f"{site.stack}.{layer}") if site.stack else None
            if block is None:
                continue

            def before(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                x = args[0] if args else kwargs.get("hidden_states")
                if isinstance(x, Tensor) and x.dim() == 3:
                    watch.streams[layer] = x.float().square().sum(-1)
                    if layer in watch.layers:
                        tell(layer, activations(x))

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        try:
            self._run(ids, watch)
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def importance(self, ids: Tensor, batch: int = 20) -> dict[int, Tensor]:
        """By layer, alpha of the first two keys of each sequence: ids (N, T) to (N, Hq, 2)."""
        listener = Importance()
        for some in ids.split(batch):
            self._run(some, listener)
        return {layer: torch.cat(parts) for layer, parts in sorted(listener.found.items())}

    def _run(self, ids: Tensor, attention: Attention) -> None:
        with use(self.model, attention):
            self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)
