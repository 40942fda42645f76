"""The reference: every public name under its module, and every command, as they are today."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import typer
from method_pages import prose
from typer.cli import get_docs_for_click

from foveate.cli.app import build

MASKS = (
    "causal", "window", "sinks", "prefix", "documents", "padding", "blocks", "neighborhood",
    "strided", "region", "parse_mask", "Mask",
)  # fmt: skip

# Page: its title, and the modules whose public names it shows.
MODULES = {
    "core": ("The core op", ("foveate",)),
    "masks": ("Masks", ("foveate",)),
    "layers": ("Layers", ("foveate.nn",)),
    "adopt": ("Models of transformers", ("foveate.hf",)),
    "models": ("Models", ("foveate.models",)),
    "contracts": ("Contracts", ("foveate.parts", "foveate.methods")),
    "parallel": (
        "Many ranks",
        (
            "foveate.parallel.context",
            "foveate.parallel.disaggregate",
            "foveate.parallel.latent",
            "foveate.parallel.experts",
            "foveate.parallel.spawn",
        ),
    ),
    "lens": (
        "Looking into models",
        (
            "foveate.lens.circuits_job",
            "foveate.lens.reading",
            "foveate.lens.interventions",
            "foveate.lens.ocr",
        ),
    ),
    "search": ("Searching", ("foveate.retrieve.index",)),
    "catalog": ("The catalog", ("foveate.catalog",)),
    "claims": ("Miniatures", ("foveate.papers.harness",)),
    "errors": ("Errors", ("foveate.ops.errors",)),
}
COMMANDS = "Commands"


def titles() -> dict[str, str]:
    """The pages' titles by name, in their order."""
    return {name: title for name, (title, _) in MODULES.items()} | {"commands": COMMANDS}


def pages() -> dict[str, str]:
    """The pages' Markdown by name; each name stands on the page of the module it belongs to."""
    made = {}
    seen: set[str] = set()
    for name in sorted(MODULES, key=lambda name: MODULES[name][1] == ("foveate",)):
        title, modules = MODULES[name]
        parts = [f"# {title}"]
        for path in modules:
            module = importlib.import_module(path)
            if len(modules) > 1:
                parts.append(f"## {path}")
            if path != "foveate":
                parts.append(prose(inspect.getdoc(module) or ""))
            fresh = [where for where in documented(module, name) if where not in seen]
            parts += [f"::: {where}" for where in fresh]
            seen.update(fresh)
        made[name] = "\n\n".join(parts) + "\n"
    made["commands"] = commands()
    return made


def documented(module: ModuleType, page: str) -> list[str]:
    """Full paths of a module's public classes and functions, where they are defined."""
    names = getattr(module, "__all__", None)
    if names is None:
        mine = module.__name__
        names = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == mine]
    if module.__name__ == "foveate":
        names = [name for name in names if (name in MASKS) == (page == "masks")]
    found = []
    for name in names:
        value: Any = getattr(module, name)
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            found.append(f"{value.__module__}.{value.__qualname__}")
    return found


def commands() -> str:
    """What `foveate --help` and its kind say."""
    app = typer.main.get_command(build())
    text = get_docs_for_click(obj=app, ctx=typer.Context(app), name="foveate", title=COMMANDS)
    return re.sub(r"\n{3,}", "\n\n", text)
