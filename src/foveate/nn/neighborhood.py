"""Neighborhood attention as modules for grids of one, two and three axes.

Arguments are named as in NATTEN, the peer library, so that its modules can be replaced: their state
loads as it is. Tokens are channel last, heads behind the grid's axes.

Source: Hassani et al., arXiv 2204.07143, 2209.15001, 2403.04690, 2504.16922.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from foveate.methods.fna import unfused
from foveate.methods.gna import GNA
from foveate.ops import AttentionOutput, attention, merge, neighborhood
from foveate.ops.errors import InputError
from foveate.ops.masks.grid import per_axis
from foveate.parts.context import Context

Each = int | Sequence[int]
Flags = bool | Sequence[bool]
Form = Literal["fused", "unfused"]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Each,
    stride: Each = 1,
    dilation: Each = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    *,
    form: Form = "fused",
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Attention of every token of a grid to the window of its nearest tokens.

    Args:
        query: (B, *L, Hq, D) with one to three axes L.
        key: (B, *L, Hkv, D), Hq a multiple of Hkv.
        value: (B, *L, Hkv, Dv).
        kernel_size: window, for each axis or one for all.
        stride: queries on an axis that share a window, 1 to kernel_size.
        dilation: distance of neighbouring keys; kernel_size * dilation fits on the axis.
        is_causal: for each axis, whether no later key is seen.
        scale: factor on the scores; None is D ** -0.5.
        additional_keys: (B, E, Hkv, D), tokens (text, registers) that every query sees too; their
            part is merged by its lse.
        additional_values: (B, E, Hkv, Dv).
        rpb: bias of relative positions, (Hq, 2 k_1 - 1, ...); unfused only.
        form: "fused", or "unfused" with the weights in memory.
        q_tile_shape: queries of a tile on each axis, fused.
        kv_tile_shape: keys of a tile on each axis, fused.
        backend: of the core op.

    Returns:
        out (B, *L, Hq, Dv) and lse (B, *L, Hq).

    Raises:
        InputError: shapes or numbers don't fit.
    """
    shape = tuple(query.shape[1:-2])
    _check(query, key, value, additional_keys, additional_values)
    rank = len(shape)
    q, k, v = (x.flatten(1, rank).transpose(1, 2) for x in (query, key, value))
    causal = tuple(
        bool(c) for c in per_axis("neighborhood_attention", "is_causal", is_causal, rank)
    )
    mask = neighborhood(shape, kernel_size, stride, dilation, causal)
    if form == "unfused":
        if q_tile_shape is not None or kv_tile_shape is not None or backend != "auto":
            raise InputError(
                "neighborhood_attention(form='unfused'): tiles and backend are those of the fused "
                "form; leave q_tile_shape, kv_tile_shape and backend."
            )
        result = unfused(q, k, v, mask, scale, rpb)
    elif form != "fused":
        raise InputError(f"neighborhood_attention(form={form!r}): expected 'fused' or 'unfused'.")
    elif rpb is not None:
        raise InputError(
            "neighborhood_attention(rpb=...): the fused form has no bias; use form='unfused'."
        )
    else:
        method = GNA(
            window=tuple(axis.window for axis in mask.axes),
            stride=tuple(axis.stride for axis in mask.axes),
            dilation=tuple(axis.dilation for axis in mask.axes),
            causal=causal,
            shape=shape,
            q_tile=None if q_tile_shape is None else tuple(q_tile_shape),
            kv_tile=None if kv_tile_shape is None else tuple(kv_tile_shape),
        )
        result = method(q, k, v, Context(scale=scale, backend=backend))
    if additional_keys is not None and additional_values is not None:
        more = (x.transpose(1, 2) for x in (additional_keys, additional_values))
        result = merge([result, attention(q, *more, scale=scale, backend=backend)])
    out, lse = (x.transpose(1, 2).unflatten(1, shape) for x in result)
    return AttentionOutput(out, lse)


def _check(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor | None, more_v: Tensor | None) -> None:
    if not 4 <= q.dim() <= 6:
        raise InputError(
            "neighborhood_attention: expected query (B, *L, H, D) with one to three axes L, got "
            f"{tuple(q.shape)}."
        )
    for name, x in (("key", k), ("value", v)):
        if x.dim() != q.dim() or x.shape[:-2] != q.shape[:-2]:
            raise InputError(
                f"neighborhood_attention: query and {name} must lie on one grid, got "
                f"{tuple(q.shape)} and {tuple(x.shape)}."
            )
    if (more_k is None) != (more_v is None):
        raise InputError(
            "neighborhood_attention: give additional_keys and additional_values, or neither."
        )


class NeighborhoodAttention(nn.Module):
    """What the modules of all ranks share; use the one of your rank.

    Args:
        embed_dim: width of x and y; a multiple of num_heads.
        num_heads: heads.
        kernel_size: window, for each axis or one for all.
        stride: queries that share a window.
        dilation: distance of neighbouring keys.
        is_causal: for each axis, whether no later key is seen.
        qkv_bias: a bias on the map into heads.
        qk_scale: factor on the scores; None is head_dim ** -0.5.
        proj_drop: probability of dropping a number of y in training.
        rel_pos_bias: a learned bias of relative positions, (num_heads, 2 k - 1, ...); it makes the
            layer unfused.
        form: "fused" or "unfused"; None is what rel_pos_bias needs.

    Raises:
        InputError: sizes don't fit.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Each,
        stride: Each = 1,
        dilation: Each = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
        form: Form | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if form not in (None, "fused", "unfused"):
            raise InputError(f"{name}(form={form!r}): expected 'fused', 'unfused' or None.")
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise InputError(
                f"{name}: embed_dim={embed_dim} is no multiple of num_heads={num_heads}."
            )
        if rel_pos_bias and form == "fused":
            raise InputError(f"{name}: rel_pos_bias needs form='unfused'; the fused one has none.")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kernel_size = per_axis(name, "kernel_size", kernel_size, self.rank)
        self.stride = per_axis(name, "stride", stride, self.rank)
        self.dilation = per_axis(name, "dilation", dilation, self.rank)
        self.is_causal = per_axis(name, "is_causal", is_causal, self.rank)
        least = tuple(k * d for k, d in zip(self.kernel_size, self.dilation))
        neighborhood(least, self.kernel_size, self.stride, self.dilation, self.is_causal)
        self.scale = (embed_dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.form: Form = ("unfused" if rel_pos_bias else "fused") if form is None else form
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, *L, embed_dim) to y of the same shape."""
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise InputError(
                f"{type(self).__name__}: expected x of {self.rank + 2} axes, (B, "
                f"{'L, ' * self.rank}{self.embed_dim}), got {tuple(x.shape)}."
            )
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.unbind(-3)
        out = neighborhood_attention(
            q, k, v, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale,
            rpb=self.rpb, form=self.form,
        ).out  # fmt: skip
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}, "
            f"form={self.form}"
        )


class NeighborhoodAttention1D(NeighborhoodAttention):
    """Attention to the nearest tokens of a sequence: x (B, L, embed_dim) to y of that shape."""

    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """Attention to the nearest tokens of an image: x (B, H, W, embed_dim) to y of that shape."""

    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """Attention to the nearest tokens of a video: x (B, T, H, W, embed_dim) to y of that shape."""

    rank = 3
