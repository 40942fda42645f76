"""A layer's attention weights on other values: the call is kept and run again, never its weights.

    again = Again()
    layer(x, ctx=Context(again=again))           the layer fills it
    again(values)                                (B, Hq, Lq, C): P @ values, head by head

P is the layer's own matrix of weights: the same queries, keys, mask, pattern and scale, without
dropout. It is never held: the core op runs over the same layout with the values in the place of v.
The layout isn't made anew: a pattern may choose otherwise when it is asked twice, or keep state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.ops import AttentionOutput, Layout, Mask, attention
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention, Pattern
from foveate.parts.context import Context
from foveate.parts.precision import uncast

Beside = Callable[[Tensor, AttentionOutput], AttentionOutput]
"""From queries and the result of their keys to the result with one more key that all see."""


def repeatable(method: Attention) -> bool:
    """Whether an attention's weights are told whole by its layout, and so can be applied again."""
    return isinstance(method, Pattern) and type(method).__call__ is Pattern.__call__


@dataclass
class _Call:
    """What a layer ran: over what, q and k, and its heads' outputs with their map to y."""

    mask: Mask | None
    layout: Layout | None
    q: Tensor
    k: Tensor
    options: dict[str, Any]
    heads: Tensor
    output: Callable[[Tensor], Tensor]
    beside: Beside | None


class Again:
    """An empty holder for a layer to fill; see the module's text."""

    def __init__(self) -> None:
        self._over: tuple[Mask | None, Layout | None] | None = None
        self._call: _Call | None = None

    def ran(self, mask: Mask | None, layout: Layout | None) -> None:
        """Hear from a pattern what its call runs over: a layout, or else a mask."""
        self._over = mask, layout

    def fill(
        self,
        method: Attention,
        qkv: tuple[Tensor, Tensor, Tensor],
        ctx: Context,
        heads: Tensor,
        output: Callable[[Tensor], Tensor],
        beside: Beside | None = None,
    ) -> None:
        """Keep a call.

        Args:
            method: an attention that is `repeatable`, and was called with this as `ctx.again`.
            qkv: as it was called with.
            ctx: likewise.
            heads: (B, Hq, Lq, Dv), what it returned; with what the layer then put beside it.
            output: from head outputs to the layer's y (B, Lq, dim), an affine map.
            beside: what the layer puts beside the keys of every call, without a value here.

        Raises:
            InputError: the attention isn't repeatable, or wasn't called.
        """
        if not repeatable(method):
            raise InputError(
                f"The weights of {type(method).__name__} can't be applied to other values: its "
                "layout doesn't tell them whole. Expected a pattern, such as 'full' or "
                "'sink-window'."
            )
        if self._over is None:
            raise InputError(
                f"Again: {type(method).__name__} wasn't called with it; expected a call with "
                "Context(again=...) before."
            )
        options = {name: x for name, x in ctx.options.items() if name != "dropout"}
        # No context is kept, which holds this object: all of it goes when the block is done.
        self._call = _Call(*self._over, *qkv[:2], options, heads, output, beside)

    def __call__(self, values: Tensor) -> Tensor:
        """P @ values for each head.

        Args:
            values: (B, Lkv, C), of all keys of the call.

        Returns:
            (B, Hq, Lq, C) in fp32 or wider; rows that see no key are 0.

        Raises:
            InputError: nothing was kept, or there are more or fewer values than keys.
        """
        call = self._kept()
        work = torch.promote_types(values.dtype, torch.float32)
        if values.shape[:2] != (len(call.k), call.k.shape[2]):
            raise InputError(
                f"Again: expected values for {len(call.k)} rows of {call.k.shape[2]} keys, got "
                f"{tuple(values.shape)}."
            )
        shared = values.to(work)[:, None].expand(-1, call.k.shape[1], -1, -1)
        q, k = call.q.to(work), call.k.to(work)
        with uncast(q):
            result = attention(q, k, shared, call.mask, layout=call.layout, **call.options)
            return (result if call.beside is None else call.beside(q, result)).out

    def projected(self) -> Iterator[Tensor]:
        """Each head's own part of the layer's y, (B, Lq, dim); with biases 0 they sum to it."""
        call = self._kept()
        nothing = call.output(torch.zeros_like(call.heads))  # what biases give
        for head in range(call.heads.shape[1]):
            alone = torch.zeros_like(call.heads)
            alone[:, head] = call.heads[:, head]
            yield call.output(alone) - nothing

    def _kept(self) -> _Call:
        if self._call is None:
            raise InputError(
                "Again: no attention layer has filled it; give it as Context(again=...) to one."
            )
        return self._call
