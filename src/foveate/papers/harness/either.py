"""A claim that may show on one task or on another."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.papers.harness.paper import Check, Found
from foveate.papers.harness.statistics import Verdict


@dataclass(frozen=True)
class Either(Check):
    """One of several conditions is enough: the claim may show on this task or on that.

    It holds if one of them holds and is refuted if all are. Each is judged over all seeds, so
    noisy figures don't become a good one by taking the best of them seed by seed. Its figures are
    those of the check with the better mean, as shares of its threshold: 1 is on it.

    Attributes:
        checks: each asks for at least a number above zero; see `either`.
    """

    checks: tuple[Check, ...] = ()

    @property
    def text(self) -> str:
        """All conditions in words."""
        return f"{self.name}: " + " or ".join(check.text for check in self.checks)

    def values(self, seeds: list[Found]) -> list[float]:
        """Of the better check, each figure as a share of its threshold."""
        shares = [[x / check.holds for x in check.values(seeds)] for check in self.checks]
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
        ValueError: one asks for at most, or for nothing above zero.
    """
    for check in checks:
        if not check.at_least or check.holds <= 0 or check.exact:
            raise ValueError(f"{check.text}: expected a sampled figure, at least a number above 0")
    return Either(name, lambda at: max(c.figure(at) / c.holds for c in checks), 1.0, None, True,
                  checks=checks)  # fmt: skip
