"""Every paper in one row: its claim, what was measured, the verdict, and where it was run.

A paper has a row as soon as a row of the catalog or a miniature names it, so that what hasn't been
run yet, or can't be yet, shows as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from foveate.papers.harness.paper import Paper
from foveate.papers.harness.statistics import Verdict
from foveate.papers.harness.table import duration, judged_again, place
from foveate.papers.harness.verdict import Outcome

NOT_RUN = "not run yet"
NO_MINIATURE = "no miniature yet"


def rows(
    keys: Iterable[str],
    available: Iterable[str],
    load: Callable[[str], Paper],
    kept: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """One plain object for each paper, sorted by key.

    Args:
        keys: of all papers; those that have a miniature needn't be among them.
        available: keys that have a miniature.
        load: the miniature of such a key.
        kept: verdict objects by key.

    Returns:
        key, claim, metric, verdict (one of the three, NOT_RUN or NO_MINIATURE), ours (the first
        condition that is measured, not counted, and its mean over the seeds), checks (text, mean,
        low, high, exact, need, verdict of each condition), seeds, seconds, environment; None or
        empty where unknown.

    Raises:
        InputError: a kept verdict doesn't fit its miniature.
    """
    runnable = frozenset(available)
    return [
        _row(key, load(key) if key in runnable else None, kept.get(key))
        for key in sorted(runnable | set(keys))
    ]


def _row(key: str, paper: Paper | None, verdict: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": key,
        "claim": None if paper is None else paper.claim,
        "metric": None if paper is None else paper.metric,
        "verdict": NO_MINIATURE if paper is None else NOT_RUN,
        "ours": None,
        "checks": [],
        "seeds": [],
        "seconds": None,
        "environment": None,
    }
    if paper is None or verdict is None:
        return row
    found = judged_again(paper, verdict)
    first = next((one for one in found if not one.check.exact), found[0])
    return row | {
        "verdict": verdict["verdict"],
        "ours": f"{first.check.name}: {first.found.mean:.4g}",
        "checks": [_check(one) for one in found],
        "seeds": verdict["seeds"],
        "seconds": verdict["seconds"],
        "environment": verdict["environment"],
    }


def _check(one: Outcome) -> dict[str, Any]:
    return {
        "text": one.check.text,
        "mean": one.found.mean,
        "low": one.found.low,
        "high": one.found.high,
        "exact": one.check.exact,
        "need": one.need,
        "verdict": str(one.verdict),
    }


def met(row: dict[str, Any]) -> str:
    """How many of a row's conditions hold, such as "12 of 14"; empty if it wasn't run."""
    checks = row["checks"]
    held = sum(check["verdict"] == Verdict.HOLDS for check in checks)
    return f"{held} of {len(checks)}" if checks else ""


def took(row: dict[str, Any]) -> str:
    """How long a row's run took and where, in a few words; empty if it wasn't run."""
    where = row["environment"]
    return "" if where is None else f"{duration(row['seconds'])} on {place(where)}"


def summary(found: list[dict[str, Any]]) -> str:
    """The counts of all verdicts in one sentence."""
    counts = Counter(row["verdict"] for row in found)
    said = [f"{counts[Verdict.HOLDS]} hold"]
    said += [f"{counts[w]} {w}" for w in (Verdict.REFUTED, Verdict.INCONCLUSIVE, NOT_RUN)]
    if counts[NO_MINIATURE]:
        said.append(f"{counts[NO_MINIATURE]} without a miniature yet")
    return f"Of {len(found)} papers: " + ", ".join(said) + "."
