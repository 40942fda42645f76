"""Pictures of what a method attended to on this very text, small enough for a record."""

from __future__ import annotations

import base64
from typing import Any

import torch

from foveate.compare.measure import Sample
from foveate.compare.verify import group_of

SIZE = 96


def choose(samples: list[Sample]) -> dict[str, Any] | None:
    """The picture of one head of the middle layer: that whose density is the median one.

    Returns:
        layer, head, heads that share it, density (pairs of all pairs), rows, cols, and the shares
        of attended pairs per cell as base64 of one byte each; None for a method without layouts.
    """
    with_layout = [s for s in samples if s.layout is not None]
    if not with_layout:
        return None
    sample = sorted(with_layout, key=lambda s: s.layer)[len(with_layout) // 2]
    layout = sample.layout
    assert layout is not None
    pairs = layout.pairs_by_group()[0]
    head = int(torch.argsort(pairs)[(len(pairs) - 1) // 2])
    grid = group_of(layout, 0, head).picture(SIZE).clamp(0, 1)
    shares = (grid * 255).round().to(torch.uint8).cpu()
    heads = sample.q.shape[1]
    return {
        "layer": sample.layer,
        "head": head * heads // len(pairs),
        "shared": len(pairs) == 1,
        "density": float(pairs[head]) / (layout.q_len * layout.kv_len),
        "rows": shares.shape[0],
        "cols": shares.shape[1],
        "shares": base64.b64encode(bytes(shares.flatten().tolist())).decode(),
    }
