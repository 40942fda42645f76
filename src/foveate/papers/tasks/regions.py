"""Matching regions: what a token must say lies in one far region, which only content tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.papers.tasks.base import Batch, Generated, distinct

KEYS, PAYLOADS = 16, 8


@dataclass(frozen=True)
class MatchingRegions(Generated):
    """8 x 8 tokens in 4 x 4 regions; each of 8 keys marks two regions, at random places.

    A token is key * 8 + a random payload; its target is the payload at the same place in the other
    region of its key.

    Attributes:
        held: images in each of validation and test.
    """

    held: int = 256

    @property
    def vocab(self) -> int:
        """Keys times payloads."""
        return KEYS * PAYLOADS

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Images of any split, (count, 64), row by row."""
        keys = distinct(count, KEYS, 8, random)
        places = distinct(count, 16, 16, random)  # regions 2 i and 2 i + 1 of this list match
        partner = torch.empty_like(places)
        partner.scatter_(1, places, places.unflatten(1, (8, 2)).flip(2).flatten(1))
        key = torch.empty_like(places).scatter_(1, places, keys.repeat_interleave(2, 1))
        payload = torch.randint(PAYLOADS, (count, 16, 4), generator=random)
        other = payload.gather(1, partner[:, :, None].expand(-1, -1, 4))
        return Batch(_image(key[:, :, None] * PAYLOADS + payload), _image(other))


def partners(inputs: Tensor) -> Tensor:
    """(B, 16): the other region of each region's key; inputs (B, 64)."""
    first = inputs.view(-1, 4, 2, 4, 2)[:, :, 0, :, 0].flatten(1) // PAYLOADS
    same = first[:, :, None] == first[:, None]
    return (same & ~torch.eye(16, dtype=torch.bool)).int().argmax(2)


def _image(regions: Tensor) -> Tensor:
    """(B, 16 regions, 4 places) to (B, 64), tokens row by row."""
    return regions.view(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 64)
