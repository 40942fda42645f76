"""The one rule by which figures of several seeds become a verdict.

Each seed gives one figure of a check: a paired difference mostly, since all arms of a seed share
its data and its order. Of these figures we take the mean and its 90% confidence interval (Student's
t, so that each end is wrong once in twenty), and compare the whole interval with the threshold:

- **holds**: the whole interval lies on the good side of the threshold;
- **refuted**: the whole interval lies beyond the point of refutation (the threshold itself, unless
  the miniature states another);
- **inconclusive**: anything else, so whenever the interval straddles, and with a single seed.

"Holds" asks for all checks of a paper at once, so errors don't add up there. They do where one
refuted check refutes the paper: each that may, with a true figure on its very threshold, is wrong
once in twenty. That is why a miniature says of most checks that alone they refute nothing.

A figure that is counted, not sampled, is exact: it is compared as it stands, and must be the same
for every seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# 95% quantiles of Student's t for 1 ... 30 degrees of freedom.
_T = (
    6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125,
    1.7959, 1.7823, 1.7709, 1.7613, 1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247,
    1.7207, 1.7171, 1.7139, 1.7109, 1.7081, 1.7056, 1.7033, 1.7011, 1.6991, 1.6973,
)  # fmt: skip


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Spread:
    """Figures of several seeds.

    Attributes:
        values: one for each seed.
        mean: of these.
        sd: standard deviation over the seeds (n - 1); 0 for a single one.
        low, high: 90% confidence interval of the mean; infinite for a single seed.
    """

    values: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Mean, deviation and interval of one figure for each seed (at least one)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Spread(tuple(values), mean, 0.0, -math.inf, math.inf)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = _T[min(count - 1, len(_T)) - 1] * sd / math.sqrt(count)
    return Spread(tuple(values), mean, sd, mean - half, mean + half)


def judge(
    values: Sequence[float], holds: float, refuted: float, *, at_least: bool, exact: bool
) -> Verdict:
    """The verdict on one check, by the rule of this module.

    Args:
        values: one figure for each seed.
        holds: the threshold that is stated; figures on it are good.
        refuted: beyond this the claim is refuted; on the bad side of `holds`, or equal to it.
        at_least: good is above, not below.
        exact: the figures are counted, not sampled.
    """
    if not values or not all(math.isfinite(v) for v in values):
        return Verdict.INCONCLUSIVE
    found = spread(values)
    low, high = (min(values), max(values)) if exact else (found.low, found.high)
    if at_least:
        low, high, holds, refuted = -high, -low, -holds, -refuted
    if high <= holds:
        return Verdict.HOLDS
    return Verdict.REFUTED if low > refuted else Verdict.INCONCLUSIVE


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Of all checks: one refutation refutes, all must hold to hold."""
    if Verdict.REFUTED in verdicts:
        return Verdict.REFUTED
    if verdicts and all(verdict == Verdict.HOLDS for verdict in verdicts):
        return Verdict.HOLDS
    return Verdict.INCONCLUSIVE
