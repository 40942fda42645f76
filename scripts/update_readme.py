"""Write the README's tables: methods from the catalog, results from benchmarks/results/compare.

`--check` only tells.
"""

from __future__ import annotations

import sys
from pathlib import Path

from foveate import catalog

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ("smollm2-135m.md", "smollm2-135m-8192.md")
SHOWN = ("tokens", "method", "prefill ×", "decode ×", "tiles", "KL", "perplexity", "keys")


def updated(text: str) -> str:
    """The README's text with today's tables between its markers."""
    text = _between(text, "results", results_table())
    return _between(text, "methods", catalog.markdown_table())


def results_table() -> str:
    """The columns `SHOWN` of the committed tables of `foveate compare`, one after the other."""
    lines: list[str] = []
    for name in RESULTS:
        table = (ROOT / "benchmarks" / "results" / "compare" / name).read_text(encoding="utf-8")
        rows = [_cells(line) for line in table.splitlines() if line.startswith("|")]
        at = [rows[0].index(heading) for heading in SHOWN]
        for row in rows[2 if lines else 0 :]:
            lines.append("| " + " | ".join(row[i] for i in at) + " |")
    return "\n".join(lines)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _between(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{README.name} lacks the markers {begin} and {end}.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> int:
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if old == new:
        return 0
    if "--check" in sys.argv[1:]:
        print("README.md: its tables are out of date; run python scripts/update_readme.py")
        return 1
    README.write_text(new, encoding="utf-8")
    print("README.md: tables updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
