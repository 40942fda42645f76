"""Classification of images: real handwritten digits, which are shipped, and textures.

A model takes images (B, 1, size, size) and returns logits (B, 1, classes).
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import Batch, Split, generator
from foveate.runs.text import DATA

TRAIN, VALIDATION = 1000, 100
CORNERS, SIDE = 4, 16


class Images(NamedTuple):
    """Images (n, 8, 8), 0 to 1, their digits (n,), and a digest of both."""

    pixels: Tensor
    labels: Tensor
    sha256: str


@lru_cache(maxsize=1)
def digits() -> Images:
    """The 1,797 shipped digits, in an order that mixes the writers and is always the same.

    Raises:
        InputError: the file is damaged.
    """
    path = DATA / "digits" / "digits.csv.xz"
    try:
        text = lzma.decompress(path.read_bytes()).decode()
        rows = torch.tensor([[int(n) for n in line.split(",")] for line in text.splitlines()])
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise InputError(f"{path} can't be read: {error}.") from error
    rows = rows[torch.randperm(len(rows), generator=generator("digits"))]
    pixels = rows[:, :64].view(-1, 8, 8) / 16
    return Images(pixels, rows[:, 64], hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class Digits:
    """Digits scaled up to `size` pixels; 1,000 to train, 100 and 697 held out.

    Training images are shifted by up to `shift` pixels on both axes, at random; a training goes
    through all of them in a random order, then in another.

    Attributes:
        size: pixels of a side, a multiple of 8.
        shift: pixels.
        held: images of each held-out split, at most; None is all.

    Raises:
        InputError: a size that doesn't fit.
    """

    size: int = 16
    shift: int = 2
    held: int | None = None

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8 or not 0 <= self.shift < self.size:
            raise InputError(
                f"Digits(size={self.size}, shift={self.shift}): expected a multiple of 8, and a "
                "shift below it."
            )

    @property
    def vocab(self) -> int:
        """Number of labels."""
        return 10

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed: images (size, 1, side, side), targets (size, 1)."""
        at = torch.arange(number * size, (number + 1) * size)
        orders = {
            epoch: torch.randperm(TRAIN, generator=generator("digits", seed, epoch))
            for epoch in set((at // TRAIN).tolist())
        }
        chosen = torch.stack([orders[i // TRAIN][i % TRAIN] for i in at.tolist()])
        images = self._images(chosen)
        random = generator("shifts", seed, number)
        by = torch.randint(-self.shift, self.shift + 1, (size, 2), generator=random)
        moved = [_shifted(image, *xy) for image, xy in zip(images, by.tolist())]
        return Batch(torch.stack(moved), digits().labels[chosen][:, None])

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """The images of the validation or test split, where they are."""
        start = TRAIN if split == "validation" else TRAIN + VALIDATION
        stop = TRAIN + VALIDATION if split == "validation" else len(digits().labels)
        at = torch.arange(start, stop)[: self.held]
        for part in at.split(size):
            yield Batch(self._images(part), digits().labels[part][:, None])

    def describe(self) -> str:
        """Source, splits and digest."""
        return (
            f"digits (UCI, by scikit-learn), {TRAIN}/{VALIDATION}/"
            f"{len(digits().labels) - TRAIN - VALIDATION} images scaled to {self.size}, shifted by "
            f"{self.shift}, sha256 {digits().sha256[:12]}, {self.held or 'all'} of each split"
        )

    def _images(self, at: Tensor) -> Tensor:
        images = digits().pixels[at][:, None]
        return functional.interpolate(
            images, (self.size, self.size), mode="bilinear", align_corners=False
        )


def _shifted(image: Tensor, down: int, right: int) -> Tensor:
    """An image (1, H, W), moved; what comes in is 0."""
    most = max(abs(down), abs(right))
    wide = functional.pad(image, (most, most, most, most))
    height, width = image.shape[1:]
    return wide[:, most - down : most - down + height, most - right : most - right + width]


@dataclass(frozen=True)
class Textures:
    """Two gratings of 8 x 8 pixels in noise of 16 x 16; where they are makes 8 classes.

    A coarse one (a period of 8 pixels) lies in one of four corners, a fine one (of 3) in the next
    corner clockwise or in the opposite one: class 2 corner + (0 or 1). Directions, phases and
    contrasts are random, so that neither frequency by itself tells more than a part.

    Attributes:
        noise: deviation.
        held: images of each held-out split.
    """

    noise: float = 1.2
    held: int = 512

    @property
    def vocab(self) -> int:
        """Number of classes."""
        return 2 * CORNERS

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed."""
        return self.draw(size, generator("textures", "train", seed, number))

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """Images that no training draws: noise never comes twice."""
        made = self.draw(self.held, generator("textures", split))
        for start in range(0, self.held, size):
            yield Batch(made.inputs[start : start + size], made.targets[start : start + size])

    def describe(self) -> str:
        """The task and its parameters."""
        return repr(self)

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Images (count, 1, 16, 16) and classes (count, 1)."""
        labels = torch.randint(self.vocab, (count,), generator=random)
        coarse = labels // 2
        fine = (coarse + 1 + labels % 2) % CORNERS
        images = self.noise * torch.randn(count, SIDE, SIDE, generator=random)
        half = SIDE // 2
        ways = ((0, 0), (0, half), (half, half), (half, 0))  # clockwise
        every = torch.arange(count)[:, None, None]
        at = torch.arange(half)
        for corner, period in ((coarse, 8), (fine, 3)):
            turn, phase, contrast = torch.rand(3, count, 1, 1, generator=random)
            angle = torch.pi * turn
            wave = angle.cos() * at[:, None] + angle.sin() * at
            grating = (0.7 + 0.6 * contrast) * (2 * torch.pi * (wave / period + phase)).sin()
            first = torch.tensor(ways)[corner]
            rows = (first[:, 0, None] + at)[:, :, None]
            cols = (first[:, 1, None] + at)[:, None, :]
            images[every, rows, cols] += grating
        return Batch(images[:, None], labels[:, None])


class ImageClassifier(nn.Module):
    """A model of images to logits (B, classes), as `train` and `evaluate` want it.

    Args:
        model: takes (B, channels, H, W).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, classes)."""
        return self.model(images)[:, None]
