"""Bi-level routing attention as a layer on images, and what BiFormer has in its place elsewhere.

    q, k, v = x W_qkv + b;  y = (BRA(q, k, v) + LePE(v)) W_o,  LePE a depthwise 5 x 5 convolution

Parameters are named as in the released code, so that its weights load. Where H or W is no multiple
of the regions, three rules exist (`pad`):

    masked       no token is added; the last regions are smaller (ours, and the default)
    reference    x is filled up with zeros before the projection; what is added may be chosen,
                 attended to, and is seen by LePE (the release)
    refactored   regions of floor(H / S) x floor(W / S) and as many as it takes; q, k and v are
                 filled up with zeros, which count in the softmax but not in means (the later code)

Source: Zhu et al. 2023, arXiv 2303.08810, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.biformer import (
    Regions,
    affinity,
    grid_regions,
    region_layout,
    route,
    soft_attention,
    soft_weights,
)
from foveate.ops import attention
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.precision import uncast

Pad = Literal["masked", "reference", "refactored"]
PADS: tuple[Pad, ...] = ("masked", "reference", "refactored")
POOLS = ("average", "max")


class BiLevelRoutingAttention(nn.Module):
    """x (B, H, W, dim) to y of the same shape; see the module's text.

    Args:
        dim: width of x and y; a multiple of num_heads.
        num_heads: heads; all share one routing table.
        regions: S, on each side.
        topk: regions that each region sees.
        qk_dim: width of all queries together; None is dim.
        scale: of the scores: "reference" is qk_dim ** -0.5, as released weights were trained with,
            "head" that of a head's width, as the paper writes; or a number.
        lepe: side of LePE's kernel, odd; 0 is none.
        pad: see the module's text.
        kv_per_region: keys and values of a region are pooled to that many on each side before they
            are gathered; None pools nothing. Not in released models.
        kv_pool: "average" or "max".
        soft: keys and values of a chosen region count times the softmax of its affinity.
        differentiable: with `soft`, gradients reach the queries and keys by routing, too.
        learned: a linear map of the means before they are compared; needs `differentiable`.
        out: whether y goes through W_o.
        backend: of the core op.

    Raises:
        InputError: sizes don't fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        regions: int = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        scale: float | str = "reference",
        lepe: int = 5,
        pad: Pad = "masked",
        kv_per_region: int | None = None,
        kv_pool: str = "average",
        soft: bool = False,
        differentiable: bool = False,
        learned: bool = False,
        out: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.regions = whole(name, "regions", regions, least=1)
        self.topk = whole(name, "topk", topk, least=1)
        qk_dim = dim if qk_dim is None else qk_dim
        _heads(name, dim, num_heads)
        _heads(name, qk_dim, num_heads)
        _choice(name, "pad", pad, PADS)
        _choice(name, "kv_pool", kv_pool, POOLS)
        if kv_per_region is not None:
            whole(name, "kv_per_region", kv_per_region, least=1)
        if differentiable and not soft or learned and not differentiable:
            raise InputError(
                f"{name}: a hard choice has no gradient, so learned=True needs "
                "differentiable=True and that soft=True."
            )
        self.dim, self.num_heads, self.qk_dim, self.pad = dim, num_heads, qk_dim, pad
        self.kv_per_region, self.kv_pool = kv_per_region, kv_pool
        self.soft, self.differentiable, self.backend = soft, differentiable, backend
        self.scale = _scale(name, scale, qk_dim, num_heads)
        self.qkv = _QKV(dim, qk_dim)
        self.router = _Router(qk_dim) if learned else None
        self.lepe = lepe_convolution(name, dim, lepe)
        self.wo = nn.Linear(dim, dim) if out else nn.Identity()

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Map x (B, H, W, dim) to y of the same shape.

        Args:
            x: an image of tokens.
            real: bool (B, H, W), False on padding, where images of a batch differ in size; only
                with pad="masked". LePE reads the zeros that v is set to there, as at a border; y is
                W_o's bias there.

        Raises:
            InputError: shapes don't fit.
        """
        height, width = image_of(self, x, self.dim)
        if real is not None and (
            self.pad != "masked" or real.shape != x.shape[:3] or real.dtype != torch.bool
        ):
            raise InputError(
                f"BiLevelRoutingAttention: real is bool {tuple(x.shape[:3])} and goes with "
                f"pad='masked'; got {real.dtype} {tuple(real.shape)} with pad={self.pad!r}."
            )
        if self.pad == "reference":
            x = functional.pad(x, (0, 0, 0, -width % self.regions, 0, -height % self.regions))
        q, k, v = self.qkv(x)
        if real is not None:
            v = v.masked_fill(~real[..., None], 0.0)  # not times 0: padding may be NaN
        y = self._attend(q, k, v, real)[:, : v.shape[1], : v.shape[2]]
        if self.lepe is not None:
            y = y + convolved(self.lepe, v)
        if real is not None:
            y = y.masked_fill(~real[..., None], 0.0)
        return self.wo(y)[:, :height, :width]

    @torch.compiler.disable  # how many keys are listed is known only when it runs
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """(B, H', W', dim): at least as large as the image."""
        if not len(v):  # nothing to choose for
            return v
        counted = self.partition(q.shape[1], q.shape[2], q.device)
        queries = counted
        if real is not None:
            counted = queries = counted.only(real.flatten(1))
        if self.pad == "refactored":
            q, k, v, queries, counted = self._refactored(q, k, v)
        shape = q.shape[1:3]
        with (
            uncast(q),  # the choice stays in fp32
            torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable),
        ):
            scores = self._affinity(*(counted.means(self._split(part)) for part in (q, k)))
            chosen = route(scores.detach(), self.topk, (queries.per_region > 0)[:, None])
            weights = soft_weights(scores, chosen, self.scale) if self.soft else None
        keys, k, v = self._pooled(queries, k, v)
        query, key, value = (self._split(part) for part in (q, k, v))
        options: dict[str, Any] = {"scale": self.scale, "backend": self.backend}
        if weights is not None:
            y = soft_attention(query, key, value, chosen, weights, (queries, keys), options)
        else:
            layout = region_layout(chosen, queries, keys)
            y = attention(query, key, value, layout=layout, **options)
        return y.out.transpose(1, 2).flatten(2).unflatten(1, shape)

    def partition(self, height: int, width: int, device: torch.device | str = "cpu") -> Regions:
        """The regions of an image of tokens of this size."""
        return grid_regions((height, width), self.regions, device=device)

    def _split(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to heads (B, h, H W, C / h)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _affinity(self, qr: Tensor, kr: Tensor) -> Tensor:
        """A (B, p, p)."""
        if self.router is None:
            return affinity(qr, kr)
        dtype = self.router.emb.weight.dtype
        parts = (x.transpose(1, 2).flatten(2).to(dtype) for x in (qr, kr))
        one, two = (self.router.emb(x).to(qr.dtype) for x in parts)
        return one @ two.mT

    def _refactored(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Regions, Regions]:
        """q, k, v filled up, the regions of all tokens, and those of real ones."""
        height, width = q.shape[1:3]
        size = (height // self.regions, width // self.regions)
        if min(size) < 1:
            raise InputError(
                f"BiLevelRoutingAttention(pad='refactored'): {height} x {width} tokens are fewer "
                f"than {self.regions} regions on a side; take fewer regions."
            )
        counts = (-(-height // size[0]), -(-width // size[1]))
        full = (counts[0] * size[0], counts[1] * size[1])
        more = (0, 0, 0, full[1] - width, 0, full[0] - height)
        q, k, v = (functional.pad(part, more) for part in (q, k, v))
        every = grid_regions(full, counts, size, q.device)
        real = torch.zeros(1, *full, dtype=torch.bool, device=q.device)
        real[:, :height, :width] = True
        return q, k, v, every, every.only(real.flatten(1))

    def _pooled(self, regions: Regions, k: Tensor, v: Tensor) -> tuple[Regions, Tensor, Tensor]:
        """Keys and values, pooled within their regions, and the regions of what is left."""
        if self.kv_per_region is None:
            return regions, k, v
        height, width = k.shape[1:3]
        if not regions.whole or height % self.regions or width % self.regions:
            raise InputError(
                f"BiLevelRoutingAttention(kv_per_region={self.kv_per_region}): {height} x {width} "
                f"tokens aren't {self.regions} x {self.regions} equal regions; choose sizes that "
                "are, or pad='reference'."
            )
        s, m = self.regions, self.kv_per_region
        pool: nn.Module = nn.AdaptiveAvgPool2d(m)
        if self.kv_pool == "max":
            pool = nn.AdaptiveMaxPool2d(m)

        def pooled(x: Tensor) -> Tensor:
            x = x.unflatten(2, (s, -1)).unflatten(1, (s, -1))  # (B, S, h, S, w, C)
            x = x.permute(0, 1, 3, 5, 2, 4)
            x = pool(x.flatten(0, 2)).unflatten(0, (-1, s, s))  # (B, S, S, C, m, m)
            return x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)

        return grid_regions((s * m, s * m), s, device=k.device), pooled(k), pooled(v)

    def mixing_macs(self, x: Tensor) -> int:
        """Multiply-adds for x (B, H, W, dim) that no weight takes part in: routing and attention.

        p^2 qk_dim and HW k n (qk_dim + dim) for each image, as if all regions were of one size, of
        tokens with what they are filled up with.
        """
        sides = list(x.shape[1:3])
        counts = [self.regions] * 2
        if self.pad == "refactored":
            sizes = [n // self.regions for n in sides]
            counts = [-(-n // size) for n, size in zip(sides, sizes)]
        else:
            sizes = [-(-n // self.regions) for n in sides]
        if self.pad != "masked":
            sides = [count * size for count, size in zip(counts, sizes)]
        tokens, p = math.prod(sides), math.prod(counts)
        if self.kv_per_region is None:
            seen = min(min(self.topk, p) * math.prod(sizes), tokens)
        else:
            seen = min(self.topk, p) * self.kv_per_region**2
        return x.shape[0] * (p**2 * self.qk_dim + tokens * seen * (self.qk_dim + self.dim))

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return (
            f"{self.dim}, num_heads={self.num_heads}, regions={self.regions}, topk={self.topk}, "
            f"scale={self.scale:.4g}, pad={self.pad!r}"
        )


class GridAttention(nn.Module):
    """Attention of every token of an image to all: x (B, H, W, dim) to y of the same shape.

    BiFormer's last stage; with `lepe`, a depthwise convolution of x or v is added before W_o.

    Args:
        dim: width of x and y.
        num_heads: heads (the release: 8, whatever dim is).
        lepe: side of the kernel, odd; 0 is none.
        lepe_on: "input" (the release) or "value" (the later code).
        qkv_bias: a bias on the map into heads.

    Raises:
        InputError: sizes don't fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        lepe: int = 5,
        lepe_on: Literal["input", "value"] = "input",
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        _heads("GridAttention", dim, num_heads)
        _choice("GridAttention", "lepe_on", lepe_on, ("input", "value"))
        self.dim, self.num_heads, self.lepe_on = dim, num_heads, lepe_on
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.lepe = lepe_convolution("GridAttention", dim, lepe)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, H, W, dim) to y of the same shape."""
        image_of(self, x, self.dim)
        heads = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = attention(q, k, v).out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
        if self.lepe is not None:
            values = v.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
            y = y + convolved(self.lepe, x if self.lepe_on == "input" else values)
        return self.proj(y)

    def mixing_macs(self, x: Tensor) -> int:
        """Multiply-adds of scores and of the values' sums, for x (B, H, W, dim)."""
        return 2 * x.shape[0] * (x.shape[1] * x.shape[2]) ** 2 * self.dim


class _QKV(nn.Module):
    """The map into queries, keys and values, named as in the release."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.sizes = (qk_dim, qk_dim, dim)
        self.qkv = nn.Linear(dim, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).split(self.sizes, -1)


class _Router(nn.Module):
    """The map of means of learned routing, named as in the release."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.Linear(dim, dim)


def convolved(layer: nn.Module, x: Tensor) -> Tensor:
    """A convolution over images with their channels last, (B, H, W, C)."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def lepe_convolution(name: str, dim: int, side: int) -> nn.Conv2d | None:
    """LePE, the local enhancement: a depthwise convolution that keeps sizes; None for side 0."""
    whole(name, "lepe", side, least=0)
    if side and side % 2 == 0:
        raise InputError(f"{name}(lepe={side}): expected an odd side, or 0 for none.")
    return nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) if side else None


def image_of(layer: nn.Module, x: Tensor, dim: int) -> tuple[int, int]:
    """Height and width of x (B, H, W, dim)."""
    if x.dim() != 4 or x.shape[-1] != dim or 0 in x.shape[1:3]:
        raise InputError(
            f"{type(layer).__name__}: expected x (B, H, W, {dim}), got {tuple(x.shape)}."
        )
    return x.shape[1], x.shape[2]


def _heads(name: str, dim: int, heads: int) -> None:
    if heads < 1 or dim < 1 or dim % heads:
        raise InputError(f"{name}: a width of {dim} is no multiple of num_heads={heads}.")


def _choice(name: str, field: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise InputError(f"{name}({field}={given!r}): expected one of {', '.join(known)}.")


def _scale(name: str, scale: float | str, qk_dim: int, heads: int) -> float:
    known = {"reference": qk_dim**-0.5, "head": (qk_dim // heads) ** -0.5}
    if isinstance(scale, str):
        _choice(name, "scale", scale, tuple(known))
        return known[scale]
    return float(scale)
