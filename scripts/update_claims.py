"""Write docs/claims.md and the README's counts from the miniatures and the kept verdicts.

`--check` only tells.

A verdict is kept by copying `verdict.json` of `foveate reproduce KEY` to
`benchmarks/results/claims/KEY.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from foveate import papers
from foveate.cli.claims import papers_of_the_list
from foveate.papers.harness.overview import rows, summary
from foveate.papers.harness.table import kept_verdicts, markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "claims.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
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


def readme(text: str) -> str:
    """The README's text with today's counts between its markers."""
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise SystemExit(f"{README.name} lacks the markers {BEGIN} and {END}.")
    found = rows(papers_of_the_list(), papers.available(), papers.load, kept_verdicts(KEPT))
    return f"{before}{BEGIN}\n{summary(found)}\n{END}{after}"


def main() -> int:
    """Write or check the page and the README."""
    PAGE.parent.mkdir(exist_ok=True)
    stale = False
    for path, wanted in ((PAGE, lambda _: page()), (README, readme)):
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = wanted(old)
        if old == new:
            continue
        name = path.relative_to(ROOT)
        if "--check" in sys.argv[1:]:
            print(f"{name} is out of date; run python scripts/update_claims.py")
            stale = True
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{name}: claims updated")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
