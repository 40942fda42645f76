"""Write the table of methods into the README, from the catalog; `--check` only tells."""

from __future__ import annotations

import sys
from pathlib import Path

from foveate import catalog

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"


def updated(text: str) -> str:
    """The README's text with the table of today's catalog between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README.name} lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{catalog.markdown_table()}\n{END}{after}"


def main() -> int:
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if old == new:
        return 0
    if "--check" in sys.argv[1:]:
        print("README.md: the method table is out of date; run python scripts/update_readme.py")
        return 1
    README.write_text(new, encoding="utf-8")
    print("README.md: method table updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
