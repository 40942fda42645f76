"""What a router does, in figures: entropy, fluctuation between two moments, evenness of the load.

entropy      H(rbar(i)) = - sum_e rbar_e(i) ln rbar_e(i), in nats
fluctuation  the share of tokens whose choice differs between two moments of a training, on the
             same tokens, in evaluation: of the best expert, or of the set of the best K
unevenness   coefficient of variation of the experts' counts, 0 for equal ones

Metrics of Nguyen et al. 2025, arXiv 2505.00792; fluctuation as in StableMoE (Dai et al. 2022, arXiv
2204.08396).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from foveate.ops.errors import InputError


class Fluctuation(NamedTuple):
    """Shares of tokens, 0 to 1: whose best expert changed, and whose set of experts."""

    best: float
    chosen: float


def entropy(probs: Tensor) -> Tensor:
    """H of each row in nats: probs (..., E), rows summing to 1 -> (...)."""
    return -(probs * probs.clamp_min(1e-37).log()).sum(-1)  # 0 ln 0 is 0


def fluctuation(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Fluctuation:
    """How many tokens changed between two moments.

    Args:
        before: best (N,), the best expert of each token, and chosen (N, E) bool.
        after: likewise, of the same tokens in the same order.

    Raises:
        InputError: they aren't of as many tokens and experts.
    """
    (best, chosen), (later, sets) = before, after
    if best.shape != later.shape or chosen.shape != sets.shape or len(best) != len(chosen):
        raise InputError(
            f"fluctuation: {tuple(chosen.shape)} and {tuple(sets.shape)} (tokens, experts) can't "
            "be compared; give the same tokens at both moments."
        )
    if not len(best):
        raise InputError("fluctuation: there are no tokens.")
    return Fluctuation(
        (best != later).double().mean().item(), (chosen != sets).any(-1).double().mean().item()
    )


def unevenness(chosen: Tensor) -> float:
    """Standard deviation of the experts' counts over their mean: chosen (N, E) bool.

    Raises:
        InputError: nobody was chosen.
    """
    counts = chosen.double().sum(0)
    if not counts.any():
        raise InputError("unevenness: no expert was chosen.")
    return (counts.std(unbiased=False) / counts.mean()).item()
