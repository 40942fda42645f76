"""A layer's attention weights on other values: the call is kept and run again, never its weights.

    again = Again()
    layer(x, ctx=Context(again=again))           the layer fills it
    again(values)                                (B, Hq, Lq, C): P @ values, head by head

P is the layer's own matrix of weights: the same queries, keys, mask, pattern and scale, without
dropout. It is never held: the core op runs over the same layout with the values in the place of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.ops import attention
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention, Pattern
from foveate.parts.context import Context
from foveate.parts.precision import uncast


def repeatable(method: Attention) -> bool:
    """Whether an attention's weights are told whole by its layout, and so can be applied again."""
    return isinstance(method, Pattern) and type(method).__call__ is Pattern.__call__


@dataclass
class _Call:
    """What a layer ran: its attention, q, k and v, and its heads' outputs with their map to y."""

    method: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    ctx: Context
    heads: Tensor
    output: Callable[[Tensor], Tensor]


class Again:
    """An empty holder for a layer to fill; see the module's text."""

    def __init__(self) -> None:
        self._call: _Call | None = None

    def fill(
        self,
        method: Attention,
        qkv: tuple[Tensor, Tensor, Tensor],
        ctx: Context,
        heads: Tensor,
        output: Callable[[Tensor], Tensor],
    ) -> None:
        """Keep a call.

        Args:
            method: an attention that is `repeatable`.
            qkv: as it was called with.
            ctx: likewise.
            heads: (B, Hq, Lq, Dv), what it returned.
            output: from head outputs to the layer's y (B, Lq, dim), an affine map.

        Raises:
            InputError: the attention isn't repeatable.
        """
        if not repeatable(method):
            raise InputError(
                f"The weights of {type(method).__name__} can't be applied to other values: its "
                "layout doesn't tell them whole. Expected a pattern, such as 'full' or "
                "'sink-window'."
            )
        assert isinstance(method, Pattern)
        # Without a way back from the context to this object, all of it goes when the block is done.
        self._call = _Call(method, *qkv, replace(ctx, again=None), heads, output)

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
        if values.shape[:2] != (len(call.k), call.k.shape[2]):
            raise InputError(
                f"Again: expected values for {len(call.k)} rows of {call.k.shape[2]} keys, got "
                f"{tuple(values.shape)}."
            )
        ctx, work = call.ctx, torch.promote_types(values.dtype, torch.float32)
        with torch.no_grad():
            layout = call.method.layout(call.q, call.k, call.v, ctx)
        options = {name: x for name, x in ctx.options.items() if name != "dropout"}
        shared = values.to(work)[:, None].expand(-1, call.k.shape[1], -1, -1)
        q, k = call.q.to(work), call.k.to(work)
        with uncast(q):
            return attention(q, k, shared, layout=layout, **options).out

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
