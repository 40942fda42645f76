"""Rotary positions, forward and back: rotate keys by a position, un-rotate them, or move them.

Pair (a, b) of dimensions turns by the angle position * inv_freq:

    a' = (a cos - b sin) * s,   b' = (b cos + a sin) * s          (s: attention scaling, mostly 1)

Pairs are (i, i + R/2) in the half-split convention (Llama, transformers' rotate_half) and
(2i, 2i + 1) in the interleaved one (RoFormer, GPT-J). The first R of D dimensions turn (partial
rotary), the rest stay. Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.errors import InputError


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first R dimensions of x.

    Args:
        x: (..., L, D).
        cos: cosines of the angles, times the scaling if there is one: (..., L, R / 2),
            broadcastable to x's leading axes.
        sin: likewise.
        interleaved: pairs are neighbours instead of halves.

    Returns:
        A new tensor in x's dtype; the arithmetic runs in the wider of x's and cos's dtype.
    """
    return _turn(x, cos, sin, interleaved)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Undo `rotate` with the same arguments, scaling included."""
    square = cos * cos + sin * sin
    return _turn(x, cos / square, -sin / square, interleaved)


def half_tables(table: Tensor, *, interleaved: bool = False) -> Tensor:
    """(..., R) as transformers hands it to its layers, each value twice, to (..., R / 2)."""
    if table.shape[-1] % 2:
        raise InputError(f"A table of cosines has an even last axis, got {tuple(table.shape)}.")
    return table[..., ::2] if interleaved else table[..., : table.shape[-1] // 2]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise InputError(
            f"{half} angles turn {2 * half} dimensions, but there are only {x.shape[-1]}."
        )
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    work = torch.promote_types(x.dtype, cos.dtype)
    turning, cos, sin = turning.to(work), cos.to(work), sin.to(work)
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary positions of a model, as a function of integer positions.

    Attributes:
        inv_freq: (R / 2,), angle per position of each pair; in fp32 or wider.
        interleaved: pairs are neighbours instead of halves.
        scaling: factor on rotated queries and keys (YaRN's attention scaling).
    """

    inv_freq: Tensor
    interleaved: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.inv_freq.dim() != 1 or not self.inv_freq.is_floating_point():
            raise InputError(
                f"Rope(inv_freq): expected floats of shape (R / 2,), got {self.inv_freq.dtype} of "
                f"shape {tuple(self.inv_freq.shape)}."
            )
        if not self.scaling > 0:
            raise InputError(f"Rope(scaling={self.scaling!r}): expected more than 0.")

    @staticmethod
    def of(dim: int, theta: float = 10_000.0, **options: float) -> Rope:
        """The usual frequencies, theta ** (-2 i / dim), for `dim` turning dimensions."""
        if dim % 2 or dim < 2:
            raise InputError(f"Rope.of(dim={dim}): expected an even number of dimensions.")
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
        return Rope(theta**-steps, **options)  # type: ignore[arg-type]

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled cos and sin for integer positions (L,) or (B, L): (L or B, 1, L, R / 2).

        Angles are formed in float64: at position 10**6 fp32 is off by a tenth of a radian.
        """
        angles = positions.to(torch.float64)[..., None] * self.inv_freq.to(
            positions.device, torch.float64
        )
        work = torch.promote_types(self.inv_freq.dtype, torch.float32)
        cos, sin = angles.cos().to(work), angles.sin().to(work)
        return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (B, H, L, D) to positions (L,) or (B, L)."""
        cos, sin = self.tables(positions)
        return rotate(x, cos * self.scaling, sin * self.scaling, interleaved=self.interleaved)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo `rotate`: x (B, H, L, D) was rotated to positions (L,) or (B, L)."""
        cos, sin = self.tables(positions)
        return unrotate(x, cos * self.scaling, sin * self.scaling, interleaved=self.interleaved)

    def move(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotated x (B, H, L, D) as if its positions were greater by `by`, (L,) or (B, L)."""
        cos, sin = self.tables(by)
        return rotate(x, cos, sin, interleaved=self.interleaved)
