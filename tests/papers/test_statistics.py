"""The rule by which figures become a verdict."""

import math

import pytest
import torch

from foveate.papers.harness import statistics
from foveate.papers.harness.paper import Check, at_least, at_most
from foveate.papers.harness.statistics import Verdict, judge, overall, spread


def student_cdf(t: float, df: int) -> float:
    """The distribution function of Student's t, by integrating its density."""
    x = torch.linspace(0, t, 200_001, dtype=torch.float64)
    log = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = torch.exp(log - (df + 1) / 2 * torch.log1p(x * x / df))
    return 0.5 + torch.trapezoid(density, x).item()


@pytest.mark.parametrize("df", [1, 2, 3, 5, 10, 29, 30])
def test_quantiles_are_students(df):
    assert student_cdf(statistics._T[df - 1], df) == pytest.approx(0.95, abs=1e-5)


def test_the_interval_of_three_seeds():
    found = spread([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.sd == pytest.approx(math.sqrt(7))
    assert found.high - found.mean == pytest.approx(2.9200 * math.sqrt(7) / math.sqrt(3))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


CASES = [
    ([0.01, 0.02, 0.015], Verdict.HOLDS),
    ([0.06, 0.07, 0.065], Verdict.REFUTED),
    ([0.01, 0.09, 0.02], Verdict.INCONCLUSIVE),  # straddles the threshold
    ([0.029, 0.0295, 0.0305], Verdict.INCONCLUSIVE),
    ([0.0], Verdict.INCONCLUSIVE),  # a single seed
    ([], Verdict.INCONCLUSIVE),
    ([0.0, math.nan, 0.0], Verdict.INCONCLUSIVE),
    ([0.03, 0.03, 0.03], Verdict.HOLDS),  # a figure on the threshold is good
]


@pytest.mark.parametrize(("values", "expected"), CASES)
def test_below_a_threshold_and_its_mirror_above(values, expected):
    assert judge(values, 0.03, 0.03, at_least=False, exact=False) == expected
    mirrored = [-value for value in values]
    assert judge(mirrored, -0.03, -0.03, at_least=True, exact=False) == expected


def test_between_the_threshold_and_the_point_of_refutation_nothing_is_said():
    values = [0.039, 0.040, 0.041]
    assert judge(values, 0.03, 0.05, at_least=False, exact=False) == Verdict.INCONCLUSIVE
    assert judge(values, 0.03, 0.03, at_least=False, exact=False) == Verdict.REFUTED
    assert judge(values, 0.03, math.inf, at_least=False, exact=False) == Verdict.INCONCLUSIVE


def test_what_is_counted_is_compared_as_it_stands():
    assert judge([4.0], 4.0, 4.0, at_least=False, exact=True) == Verdict.HOLDS
    assert judge([5.0], 4.0, 4.0, at_least=False, exact=True) == Verdict.REFUTED
    assert judge([3.0, 5.0], 4.0, 4.0, at_least=False, exact=True) == Verdict.INCONCLUSIVE


def test_a_verdict_of_several_checks():
    holds, refuted, neither = Verdict.HOLDS, Verdict.REFUTED, Verdict.INCONCLUSIVE
    assert overall([holds, holds]) == holds
    assert overall([holds, neither]) == neither
    assert overall([holds, neither, refuted]) == refuted
    assert overall([]) == neither


def test_pairing_sees_what_the_arms_alone_hide():
    seeds = [{"a": {"loss": base}, "b": {"loss": base + 0.01}} for base in (1.0, 2.0, 4.0)]
    paired = at_most("a - b", lambda at: at["a"]["loss"] - at["b"]["loss"], 0.0)
    assert paired.verdict(seeds) == Verdict.HOLDS
    alone = at_most("a", lambda at: at["a"]["loss"], 3.0)
    assert alone.verdict(seeds) == Verdict.INCONCLUSIVE


def test_a_check_says_its_thresholds():
    def figure(at):
        return 0.0

    assert at_most("a - b", figure, 0.03).text == "a - b <= 0.03"
    assert at_least("x", figure, 1.6, refuted=1.2).text == "x >= 1.6 (refuted: < 1.2)"
    said = at_most("a - b", figure, 0.03, refuted=math.inf).text
    assert said == "a - b <= 0.03 (alone it refutes nothing)"
    with pytest.raises(ValueError, match="good side"):
        at_most("a", figure, 0.03, refuted=0.02)
    with pytest.raises(ValueError, match="good side"):
        Check("a", figure, 0.03, refuted=0.04, at_least=True)
