"""The verdict: one plain object for each paper, made from the figures of its seeds.

It can be made again from an object that was kept, so that a table never shows a verdict that
today's thresholds wouldn't give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.ops.errors import InputError
from foveate.papers.harness.paper import Check, Found, Paper
from foveate.papers.harness.statistics import Spread, Verdict, overall, spread

FIELDS = (
    "key", "claim", "metric", "baseline", "ours", "holds_if", "verdict", "seeds", "seconds",
    "environment",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one check.

    Attributes:
        check: as the miniature states it.
        found: its figure over the seeds.
        verdict: on it alone.
        need: it's a condition for saying anything.
    """

    check: Check
    found: Spread
    verdict: Verdict
    need: bool


def outcomes(paper: Paper, seeds: list[Found], *, quick: bool = False) -> list[Outcome]:
    """Every check on its own, the needs last.

    Args:
        paper: the miniature.
        seeds: figures of each seed, by arm and metric.
        quick: they come from a quick run: only what is exact can be told from it.
    """
    found = []
    for need, checks in ((False, paper.checks), (True, paper.needs)):
        for check in checks:
            verdict = check.verdict(seeds)
            if quick and not check.exact:
                verdict = Verdict.INCONCLUSIVE
            found.append(Outcome(check, spread(check.values(seeds)), verdict, need))
    return found


def conclude(found: list[Outcome]) -> Verdict:
    """The verdict on the claim: where a need isn't met, nothing can be said."""
    if any(one.need and one.verdict != Verdict.HOLDS for one in found):
        return Verdict.INCONCLUSIVE
    return overall([one.verdict for one in found if not one.need])


def verdict_object(
    paper: Paper,
    seeds: dict[int, Found],
    seconds: float,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The object that `--json` prints.

    Args:
        paper: the miniature.
        seeds: by seed, its figures by arm and metric.
        seconds: that all cells took together, those of earlier runs included.
        environment: versions, machine, data; "quick" tells a quick run.

    Returns:
        The fields of FIELDS; baseline and ours hold mean, sd and values by arm and metric, the
        values in the order of "seeds". Arms that the miniature doesn't name stand behind ours: a
        check may read them, and what was measured is kept.
    """
    figures = list(seeds.values())
    named = {*paper.baseline, *paper.ours}
    more = tuple(arm for arm in figures[0] if arm not in named and all(arm in x for x in figures))
    found = outcomes(paper, figures, quick=bool(environment.get("quick")))
    values = (
        paper.key,
        paper.claim,
        paper.metric,
        _arms(paper.baseline, figures),
        _arms((*paper.ours, *more), figures),
        paper.holds_if,
        str(conclude(found)),
        list(seeds),
        round(seconds, 1),
        environment,
    )
    return dict(zip(FIELDS, values, strict=True))


def figures_of(verdict: dict[str, Any]) -> list[Found]:
    """The figures of each seed back from a verdict object.

    Raises:
        InputError: it isn't one.
    """
    try:
        arms = verdict["baseline"] | verdict["ours"]
        return [
            {
                arm: {metric: kept["values"][at] for metric, kept in metrics.items()}
                for arm, metrics in arms.items()
            }
            for at in range(len(verdict["seeds"]))
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"This is no verdict ({type(error).__name__}: {error}); expected an object with "
            f"{', '.join(FIELDS)}, as foveate reproduce --json prints."
        ) from error


def _arms(names: tuple[str, ...], figures: list[Found]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for arm in names:
        metrics = [name for name, value in figures[0][arm].items() if not isinstance(value, list)]
        kept[arm] = {}
        for metric in metrics:
            found = spread([float(seed[arm][metric]) for seed in figures])
            kept[arm][metric] = {"mean": found.mean, "sd": found.sd, "values": list(found.values)}
    return kept
