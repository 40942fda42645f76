"""The table of all claims: what each miniature states, and what a kept verdict says of it.

Verdicts are kept as `<key>.json`, one object each. The table judges their figures again by today's
thresholds, so that a threshold that was changed after a run shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from foveate.ops.errors import InputError
from foveate.papers.harness.paper import Paper
from foveate.papers.harness.verdict import FIELDS, Outcome, conclude, figures_of, outcomes

COLUMNS = 7  # of a table in the documentation


def kept_verdicts(folder: Path) -> dict[str, dict[str, Any]]:
    """The verdicts in a folder, by key.

    Raises:
        InputError: a file is damaged, is named after another key, or holds a quick run.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            verdict = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no JSON ({error}); run its miniature again.") from error
        if not isinstance(verdict, dict) or set(verdict) != set(FIELDS):
            raise InputError(f"{path} is no verdict; expected the fields {', '.join(FIELDS)}.")
        if verdict["key"] != path.stem:
            raise InputError(f"{path} holds the verdict of {verdict['key']}; rename it.")
        if verdict["environment"].get("quick"):
            raise InputError(f"{path} is of a quick run, which decides nothing; run it whole.")
        found[path.stem] = verdict
    return found


def judged_again(paper: Paper, verdict: dict[str, Any]) -> list[Outcome]:
    """The outcomes of a kept verdict's figures under today's checks.

    Raises:
        InputError: today's miniature states something else, or judges these figures otherwise.
    """
    stated = {"claim": paper.claim, "metric": paper.metric, "holds_if": paper.holds_if}
    for name, today in stated.items():
        if verdict[name] != today:
            raise InputError(
                f"{paper.key}: the miniature's {name} is {today!r}, that of the kept verdict "
                f"{verdict[name]!r}; run it again."
            )
    found = outcomes(paper, figures_of(verdict))
    if (again := str(conclude(found))) != verdict["verdict"]:
        raise InputError(
            f"{paper.key}: its figures give {again!r} by today's rule, the kept verdict says "
            f"{verdict['verdict']!r}; run it again."
        )
    return found


def markdown(papers: Iterable[Paper], kept: dict[str, dict[str, Any]]) -> str:
    """The page of all claims.

    Raises:
        InputError: a kept verdict doesn't fit its miniature.
    """
    summary = ["| paper | verdict | claim |", "| --- | --- | --- |"]
    sections = []
    for paper in papers:
        verdict = kept.get(paper.key)
        word = "not run yet" if verdict is None else f"**{verdict['verdict']}**"
        summary.append(f"| [{paper.key}](#{paper.key}) | {word} | {_cell(paper.claim)} |")
        sections.append(f"## {paper.key}\n\n{section(paper, verdict)}")
    return "\n".join([*summary, "", *sections])


def section(paper: Paper, verdict: dict[str, Any] | None) -> str:
    """What one paper claims, its conditions, and the figures of its kept verdict, if there is one.

    Raises:
        InputError: the kept verdict doesn't fit the miniature.
    """
    lines = [paper.claim, "", f"Measured: {paper.metric}.", ""]
    if verdict is None:
        lines += ["Holds if:", ""]
        lines += [f"- {check.text}" for check in paper.checks]
        lines += [f"- it says nothing unless {check.text}" for check in paper.needs]
        lines += ["", f"Not run yet: `foveate reproduce {paper.key}`.", ""]
        return "\n".join(lines)
    lines += ["| holds if | mean | 90% interval | |", "| --- | --- | --- | --- |"]
    for one in judged_again(paper, verdict):
        low, high = one.found.low, one.found.high
        interval = "counted" if one.check.exact else f"{low:.4g} to {high:.4g}"
        text = ("needs " if one.need else "") + one.check.text
        lines.append(f"| {_cell(text)} | {one.found.mean:.4g} | {interval} | {one.verdict} |")
    remark = [paper.remark, ""] if paper.remark else []
    lines += ["", *remark, *_arms(verdict), "", _circumstances(paper, verdict), ""]
    return "\n".join(lines)


def alike(verdict: dict[str, Any]) -> list[dict[str, dict[str, str]]]:
    """The arms of a verdict, together where they have the same metrics.

    Returns:
        For each such group {arm: {metric: figure in words}}, metrics in one order.
    """
    groups: dict[frozenset[str], dict[str, dict[str, str]]] = {}
    for arm, found in (verdict["baseline"] | verdict["ours"]).items():
        group = groups.setdefault(frozenset(found), {})
        metrics = next(iter(group.values()), found)
        group[arm] = {metric: figure(found[metric]) for metric in metrics}
    return list(groups.values())


def figure(found: dict[str, Any]) -> str:
    """A mean, with its standard deviation where there are several seeds."""
    mean, spread = found["mean"], f" ± {found['sd']:.2g}" if len(found["values"]) > 1 else ""
    count = abs(mean) >= 1e4 and mean == int(mean)
    return f"{mean:.0f}{spread}" if count else f"{mean:.4g}{spread}"


def _arms(verdict: dict[str, Any]) -> list[str]:
    lines = []
    for group in alike(verdict):
        every = list(next(iter(group.values())))
        for start in range(0, len(every), COLUMNS):
            metrics = every[start : start + COLUMNS]
            lines += ["| | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
            for arm, figures in group.items():
                lines.append(f"| {_cell(arm)} | {' | '.join(figures[m] for m in metrics)} |")
            lines.append("")
    return lines[:-1]


def _circumstances(paper: Paper, verdict: dict[str, Any]) -> str:
    where = verdict["environment"]
    said = (
        f"**{verdict['verdict']}**, seeds {', '.join(map(str, verdict['seeds']))}; "
        f"{duration(verdict['seconds'])} on {place(where)}, Python {where['python']}; "
        f"data: {where['data']}."
    )
    for name, points in where.get("tuned", {}).items():
        tuned = ", ".join(f"{arm} {point}" for arm, point in points.items())
        said += f" Tuned {name}: {tuned}."
        tried = where.get("tried", {}).get(name) or (paper.grid.points if paper.grid else ())
        known = all(point in tried for point in points.values())  # an old verdict's grid may differ
        ends = ends_of(tried) if known else ()
        last = [arm for arm, point in points.items() if point in ends]
        if last:
            who = "all" if len(last) == len(points) else ", ".join(last)
            said += f" At an end of what was tried ({ends[0]:g} to {ends[1]:g}): {who}."
    shares = sorted({share for share in where.get("trials", {}).values() if share < 1})
    if shares:
        said += f" Short trials: {' and '.join(f'{share:.0%}' for share in shares)} of a run."
    return said


def ends_of(tried: Sequence[Any]) -> tuple[float, ...]:
    """The lowest and highest point, beyond which none was tried; () if they aren't numbers."""
    if len(tried) < 2 or not all(isinstance(p, int | float) for p in tried):
        return ()
    return min(tried), max(tried)


def place(where: dict[str, Any]) -> str:
    """An environment in a few words: device, processor, threads, torch."""
    threads = where["threads"]
    plural = "thread" if threads == 1 else "threads"
    device = "" if where.get("device", "cpu") == "cpu" else f"{where['device']}, "
    return f"{device}{where['processor']}, {threads} {plural}, torch {where['torch']}"


def duration(seconds: float) -> str:
    """Seconds in words, such as "28 seconds" or "12 minutes"."""
    count, unit = (seconds, "second") if seconds < 90 else (seconds / 60, "minute")
    return f"{count:.0f} {unit}" + ("" if f"{count:.0f}" == "1" else "s")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
