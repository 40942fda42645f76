"""A block that may be run again in the backward instead of keeping what it computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from foveate.nn import Block, LayerOutput
from foveate.nn.block import Held
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.reference import Maps


class RecomputedBlock(Block):
    """A `Block` that knows transformers' gradient checkpointing.

    Attributes:
        gradient_checkpointing: whether it runs again in the backward; transformers sets it.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., tuple[Tensor, ...]]

    @override
    def forward(
        self,
        x: Tensor,
        ctx: Context,
        cache: Held | None = None,
        real: Tensor | None = None,
    ) -> LayerOutput:
        """As `Block`; losses keep their gradients in both of torch's kinds of checkpoints.

        Raises:
            InputError: a cache, to which the second run would write again.
        """
        if not (self.gradient_checkpointing and self.training):
            return super().forward(x, ctx, cache, real)
        if cache is not None:
            raise InputError(
                "Gradient checkpointing runs every block twice, which would write to the cache "
                "twice; use use_cache=False, or call model.gradient_checkpointing_disable()."
            )
        names: list[str] = []
        maps = ctx.reference
        pair = (None, None) if maps is None else maps.by_layer.get(ctx.layer, (None, None))

        def run(x: Tensor, e: Tensor | None, *pair: Tensor | None) -> tuple[Tensor, ...]:
            own = replace(ctx, embeddings=e)
            if pair[0] is not None and pair[1] is not None:
                own.reference = Maps(False, {ctx.layer: (pair[0], pair[1])})
            made: Any = super(RecomputedBlock, self).forward(x, own, None, real)
            names[:] = made.aux
            return (made.y, *made.aux.values())  # tensors in a dict would lose their gradients

        # What layers share goes in by hand, too: found in ctx, one kind of checkpoint would run the
        # backward behind it once for each layer.
        y, *values = self._gradient_checkpointing_func(run, x, ctx.embeddings, *pair)
        return LayerOutput(y, None, dict(zip(names, values, strict=True)))
