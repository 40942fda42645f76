"""Add cells to a kept verdict, whose miniature has got them since it was run.

    python scripts/extend_claim.py step3 costs [--from OUT/step3/verdict.json]

Training isn't run again: the figures of the arms that are there stay as they are, the named cells
are run for the verdict's own seeds, and all is judged by today's checks. Conditions that were
stated before may not have changed. The result goes to benchmarks/results/claims/KEY.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from foveate import papers
from foveate.ops.errors import InputError
from foveate.papers.harness import Paper, Trial
from foveate.papers.harness.verdict import FIELDS, figures_of, verdict_object

KEPT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "claims"


def extended(paper: Paper, verdict: dict[str, Any], cells: list[str]) -> dict[str, Any]:
    """The verdict with these cells' figures.

    Raises:
        InputError: the verdict is of another paper or quick, its conditions aren't all in today's
            miniature, a cell isn't there or returns an arm that the verdict has.
    """
    if set(verdict) != set(FIELDS) or verdict["key"] != paper.key:
        raise InputError(f"This is no verdict of {paper.key}.")
    if verdict["environment"].get("quick"):
        raise InputError("A quick run decides nothing; run it whole.")
    gone = set(verdict["holds_if"].split("; ")) - set(paper.holds_if.split("; "))
    if gone:
        raise InputError(f"Conditions have changed since: {'; '.join(sorted(gone))}.")
    old = figures_of(verdict)
    begun = time.perf_counter()
    seeds: dict[int, dict[str, Any]] = {}
    for seed, found in zip(verdict["seeds"], old):
        arms = dict(found)
        for cell in cells:
            if cell not in paper.cells:
                raise InputError(
                    f"{paper.key} has no cell {cell}; it has {', '.join(paper.cells)}."
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                more = paper.run(Trial(cell, seed))
            twice = set(more) & set(arms)
            if twice:
                raise InputError(f"{cell} returns {', '.join(sorted(twice))}, which are there.")
            arms |= more
        seeds[seed] = arms
    missing = [arm for arm in (*paper.baseline, *paper.ours) if arm not in arms]
    if missing:
        raise InputError(f"Still missing are {', '.join(missing)}; name their cells, too.")
    seconds = verdict["seconds"] + time.perf_counter() - begun
    return verdict_object(paper, seeds, seconds, verdict["environment"])


def main() -> int:
    """Extend one verdict."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("key")
    options.add_argument("cells", nargs="+")
    options.add_argument("--from", dest="source", type=Path)
    given = options.parse_args()
    kept = KEPT / f"{given.key}.json"
    source = given.source or kept
    try:
        verdict = json.loads(source.read_text(encoding="utf-8"))
        new = extended(papers.load(given.key), verdict, given.cells)
    except (InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kept.write_text(json.dumps(new, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{kept.name}: {new['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
