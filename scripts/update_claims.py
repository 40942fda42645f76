"""Write docs/claims.md from the miniatures and the kept verdicts; `--check` only tells.

A verdict is kept by copying `verdict.json` of `foveate reproduce KEY` to
`benchmarks/results/claims/KEY.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from foveate import papers
from foveate.papers.harness.table import kept_verdicts, markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "claims.md"
KEPT = ROOT / "benchmarks" / "results" / "claims"
HEAD = """# Claims

What papers say of their methods, and what became of it here. Each has a miniature: one small file
in `src/foveate/papers/` that states data, baselines, metric and threshold before the run. `foveate
reproduce KEY` runs it again. A claim holds if all of its conditions hold; a condition holds if the
90% interval of its mean over the seeds lies wholly on the good side of the threshold, and is
refuted if it lies wholly beyond. "Inconclusive" is everything between.

This page is written by `python scripts/update_claims.py`.

"""


def page() -> str:
    """The page, from today's miniatures and what is kept."""
    return (
        HEAD + markdown(map(papers.load, papers.available()), kept_verdicts(KEPT)).rstrip() + "\n"
    )


def main() -> int:
    """Write or check the page."""
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    new = page()
    if old == new:
        return 0
    if "--check" in sys.argv[1:]:
        print("docs/claims.md is out of date; run python scripts/update_claims.py")
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(new, encoding="utf-8")
    print("docs/claims.md: table of claims updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
