"""What one call of SEA did, for the losses that its estimator learns from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.ops import Layout


@dataclass(frozen=True)
class Trace:
    """What a call did, for losses: B, H query heads, Hkv, L.

    Attributes:
        q, k: of the scores, (B, H, L, D), (B, Hkv, L, D).
        scores: (B, H, L, K), the estimate before its softmax.
        out: (B, H, L, Dv).
        seen: (B, L) keys that each row sees.
        shift: (B,) index of each sequence's first key.
        real: (B, L) bool, False on padding.
        causal: the form.
        scale: factor on the scores q . k.
        layout: which keys each row kept.
        jitter: as in `Stretch`.
    """

    q: Tensor
    k: Tensor
    scores: Tensor
    out: Tensor
    seen: Tensor
    shift: Tensor
    real: Tensor
    causal: bool
    scale: float
    layout: Layout
    jitter: Tensor | None = None
