"""Attention weights of a model while it runs dense: who looks where, at chosen tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from foveate.methods.full import Full
from foveate.nn import Attention as Layer
from foveate.ops import AttentionOutput, attention, probs
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention, mask_layout
from foveate.parts.context import Context


class Watch(Attention):
    """Dense attention that keeps queries, keys and lse of the last forward, by layer."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Context]] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`."""
        ctx = Context() if ctx is None else ctx
        return self.run(q, k, v, ctx, ctx.layer)

    def run(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, layer: int) -> AttentionOutput:
        """Attend, and keep what is needed under this layer's number."""
        if ctx.q_positions is not None and ctx.q_positions.dim() == 2:
            raise InputError("Attention is watched on sequences of one length, without padding.")
        result = attention(q, k, v, layout=mask_layout(ctx.mask, q, k, ctx), **ctx.options)
        self.seen[layer] = (q.detach(), k.detach(), result.lse.detach(), ctx)
        return result

    @torch.no_grad()
    def weights(self, layer: int, rows: Tensor | None = None) -> Tensor:
        """Attention weights of a layer in the last forward: (B, Hq, n, Lkv) in fp32.

        Args:
            layer: its index.
            rows: (n,) indices of queries; None is all.
        """
        q, k, lse, ctx = self.seen[layer]
        return probs(q, k, lse, rows, ctx.mask, scale=ctx.scale, softcap=ctx.softcap, bias=ctx.bias)


class _Numbered(Attention):
    """A watch at one of foveate's layers, which needn't know its own number."""

    def __init__(self, watch: Watch, layer: int) -> None:
        self.watch, self.at = watch, layer

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`."""
        return self.watch.run(q, k, v, Context() if ctx is None else ctx, self.at)


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Watch a model's attention: foveate's layers, or a model of transformers.

    Layers of foveate are numbered in the order in which they stand in the model, as in `places`.

        with watched(model) as watch:
            model(ids)
            watch.weights(9, torch.tensor([-1]))

    Raises:
        InputError: a layer of foveate whose attention isn't dense.
    """
    watch = Watch()
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    if not layers:
        from foveate.hf.using import use

        with use(model, watch):
            yield watch
        return
    for number, layer in enumerate(layers):
        if not isinstance(layer.attention, Full):
            raise InputError(
                f"Layer {number} runs {type(layer.attention).__name__}; weights are watched of "
                "dense attention (full)."
            )
    before = [layer.attention for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.attention = _Numbered(watch, number)
        yield watch
    finally:
        for layer, one in zip(layers, before):
            layer.attention = one
