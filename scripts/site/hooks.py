"""What MkDocs calls while it builds the site: pages that are made, and texts that are shared.

Made at build time: a page and a picture for each row of the catalog, the reference of the public
names and of the commands, and the pages that show files of the checkout. A line
`--8<-- README.md: Adopt it` in a page stands for that section of that file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import method_pages
import reference
import shared
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pictures import draw

from foveate import catalog
from foveate.papers.harness.table import kept_verdicts

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results" / "claims"


def on_config(config: Any) -> Any:
    """Put the pages that are made into the navigation."""
    methods: list[Any] = ["methods/index.md"]
    for title, rows in method_pages.by_kind():
        methods.append({title: [{row.title: f"methods/{row.key}.md"} for row in rows]})
    names = [{title: f"reference/{name}.md"} for name, title in reference.titles().items()]
    made = {"Methods": methods, "Reference": names}
    config.nav = [
        {title: made.get(title, entry)} for part in config.nav for title, entry in part.items()
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is made."""
    kept = kept_verdicts(KEPT)
    texts = {"methods/index.md": method_pages.index(kept)}
    for row in catalog.rows():
        picture = draw(row)
        if picture is not None:
            name = f"methods/{row.key}.png"
            files.append(File.generated(config, name, content=picture.png))
        texts[f"methods/{row.key}.md"] = method_pages.page(
            row, kept, None if picture is None else picture.caption
        )
    texts |= {f"reference/{name}.md": text for name, text in reference.pages().items()}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    for name, path in (shared.PICTURES | shared.attached()).items():
        if path.suffix == ".md":
            source = path.relative_to(ROOT).as_posix()
            text = shared.linked(path.read_text(encoding="utf-8"), source, name)
            files.append(File.generated(config, name, content=text))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Put shared texts in, their links made to fit this page."""
    return shared.filled(markdown, page.file.src_uri)
