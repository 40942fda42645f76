"""Clips of two soft balls that fly about and bounce off the walls: a small world that has motion.

Each has a colour, a radius and a velocity of its own; they cover nothing, the lights add up. Values
lie in about -3 to 3, their variance is about 0.5, as that of a video model's latents. A clip
depends on (split, seed, number) alone, so the splits are disjoint but for chance.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.errors import InputError

BALLS = 2
BRIGHT = 3.0


@dataclass(frozen=True)
class Clips:
    """Where clips come from.

    Attributes:
        sizes: frames, height, width, in pixels (or latents).
        channels: colours.
        times: t is drawn between these; 1 is noise alone.
    """

    sizes: tuple[int, int, int] = (6, 8, 8)
    channels: int = 3
    times: tuple[float, float] = (0.1, 0.9)

    def __post_init__(self) -> None:
        if len(self.sizes) != 3 or min(self.sizes) < 1 or self.channels < 1:
            raise InputError(
                f"Clips({self.sizes}, channels={self.channels}): expected frames, height and width."
            )

    def draw(self, count: int, *what: object) -> Tensor:
        """(count, channels, *sizes) clips that depend on `what` alone."""
        random = _random("clips", *self.sizes, self.channels, *what)
        frames, height, width = self.sizes
        drawn = torch.rand(count, BALLS, 6 + self.channels, generator=random)
        colour = BRIGHT * (2 * drawn[..., 6:] - 1)
        radius = 0.12 + 0.13 * drawn[..., 0]
        begin, speed = drawn[..., 1:3], 0.25 * (2 * drawn[..., 3:5] - 1)
        at = begin[:, :, None] + speed[:, :, None] * torch.arange(frames)[:, None]
        at = 1 - (at.remainder(2) - 1).abs()  # reflected at 0 and 1
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        away = (at[..., 0, None] - y)[..., None].square() + (at[..., 1, None] - x)[
            ..., None, :
        ].square()
        light = torch.exp(-away / (2 * radius[..., None, None, None].square()))
        return torch.einsum("nbc,nbthw->ncthw", colour, light)

    def training(self, count: int, seed: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch `number` of a seed: (clips, t, noise)."""
        return self._noisy(count, "train", seed, number)

    def held_out(self, count: int, split: str = "test") -> tuple[Tensor, Tensor, Tensor]:
        """The same clips, t and noise for every seed."""
        return self._noisy(count, split)

    def _noisy(self, count: int, *what: object) -> tuple[Tensor, Tensor, Tensor]:
        clean = self.draw(count, *what)
        random = _random("clips' noise", *self.sizes, *what)
        low, high = self.times
        t = low + (high - low) * torch.rand(count, generator=random)
        return clean, t, torch.randn(clean.shape, generator=random)

    def describe(self) -> str:
        """One line that names the data."""
        size = " x ".join(map(str, self.sizes))
        low, high = self.times
        return (
            f"clips of two bouncing balls, {size}, {self.channels} colours, noise {low:g} to "
            f"{high:g}, generated"
        )


def _random(*what: object) -> torch.Generator:
    """A generator that depends on all that is given and on nothing else."""
    made = hashlib.sha256(":".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(made[:8], "little") >> 1)
