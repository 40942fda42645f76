"""A claim that may show on one task or on another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from foveate.papers.harness.paper import Check, Found
from foveate.papers.harness.statistics import Verdict


@dataclass(frozen=True)
class Either(Check):
    """One of several conditions is enough: the claim may show on this task or on that.

    It is refuted if all of them are, and holds if one holds: with k of them, each on its threshold,
    that is wrong up to k times in twenty. Each is judged over all seeds, so noisy figures don't
    become a good one by taking the best of them seed by seed. What is shown are the figures of the
    condition that decides (the better mean of several), as shares of its threshold: 1 is on it.

    Attributes:
        checks: each asks for at least a number above zero; see `either`.
    """

    checks: tuple[Check, ...] = ()

    @property
    def text(self) -> str:
        """All conditions in words."""
        said = " or ".join(check.text for check in self.checks)
        return f"{self.name}: {said} (a share of the threshold, of the one that decides)"

    def values(self, seeds: list[Found]) -> list[float]:
        """Of the deciding check, each figure as a share of its threshold."""
        decided = self.verdict(seeds)
        shares = [
            [x / check.holds for x in check.values(seeds)]
            for check in self.checks
            if check.verdict(seeds) == decided
        ]
        return max(shares, key=sum)

    def verdict(self, seeds: list[Found]) -> Verdict:
        """Holds by one, refuted by all."""
        found = [check.verdict(seeds) for check in self.checks]
        if Verdict.HOLDS in found:
            return Verdict.HOLDS
        return Verdict.REFUTED if set(found) == {Verdict.REFUTED} else Verdict.INCONCLUSIVE


def either(name: str, *checks: Check) -> Either:
    """That one of several conditions holds, each at least so much, above zero.

    Raises:
        ValueError: fewer than two, or one asks for at most, or for nothing above zero.
    """
    if len(checks) < 2:
        raise ValueError(f"{name}: expected two conditions or more, got {len(checks)}")
    for check in checks:
        if not check.at_least or check.holds <= 0 or check.exact:
            raise ValueError(f"{check.text}: expected a sampled figure, at least a number above 0")
    return Either(name, _over_all_seeds, 1.0, None, True, checks=checks)


def _over_all_seeds(found: Found) -> NoReturn:
    raise TypeError("which of several conditions decides is told by all seeds together; see values")
