"""What decoding keeps of a sequence: its closed chunks, and how new tokens close more of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.methods.dhsa.boundaries import pick
from foveate.methods.dhsa.chunks import Pooling, pooled
from foveate.methods.dhsa.predictor import BoundaryPredictor, features
from foveate.parts.trail import Trail


@dataclass
class Decoding:
    """One layer's state between two calls.

    Attributes:
        trail: recognises the sequences.
        first: (B,) index of each one's first real key.
        bounds: boundaries of each sequence, the open last chunk included.
        closed: vectors of each sequence's closed chunks, (Nc - 1, d).
    """

    trail: Trail
    first: list[int]
    bounds: list[Tensor]
    closed: list[Tensor]


def grown(
    bounds: Tensor,
    k: Tensor,
    predictor: BoundaryPredictor | None,
    *,
    theta: float,
    nms: int,
    longest: int,
) -> Tensor:
    """Boundaries of n tokens, after more of them came: the open chunk is closed where it ends.

    It ends where the predictor says so, as soon as its w tokens of look-ahead are there, or at
    `longest` tokens.

    Args:
        bounds: of the n tokens before.
        k: (Hkv, m, D), the keys of all m >= n tokens.
        predictor: None closes at `longest` alone.
        theta, nms: as in `pick`.
        longest: tokens of a chunk that decoding closes.
    """
    length, before = k.shape[1], int(bounds[-1])
    inner = bounds[:-1].tolist()
    look = 0
    if predictor is not None:
        look = predictor.look
        # Positions that have just got their look-ahead: before - w ... length - w - 1.
        low = max(look - 1, before - look)
        since = max(0, low - look + 1)
        if low < length - look:
            logits = predictor(features(k[None, :, since:]))[0]
            logits[: low - since] = -torch.inf
            for b in (pick(logits, look=look, theta=theta, nms=nms, most=length)[1:-1]).tolist():
                if since + b - inner[-1] > nms:
                    inner.append(since + b)
    while length - inner[-1] > longest + look:
        inner.append(inner[-1] + longest)
    return torch.tensor([*inner, length], device="cpu")


def vectors(k: Tensor, bounds: Tensor, closed: Tensor | None, pooling: Pooling) -> Tensor:
    """Chunk vectors (Nc, d) of keys (Hkv, L, D), the known ones taken from `closed`."""
    known = 0 if closed is None else min(len(closed), len(bounds) - 2)
    rest = bounds[known:]
    kbar = k[:, int(rest[0]) :].float().mean(0)
    fresh = pooled(kbar, rest - rest[0], pooling)
    return fresh if closed is None or not known else torch.cat((closed[:known], fresh))
