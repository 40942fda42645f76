"""Claims that can be checked: each module here is the miniature of one paper.

A miniature is one small file: configuration, data, baseline, metric and the threshold, stated
before the run (`foveate.papers.harness.Paper` says what each part means). What they share lies in
the folders beside them: `tasks`, `training`, and the `harness` that runs and judges them.
`foveate reproduce KEY` is the command.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from foveate.ops.errors import MissingPackageError, UnknownMethodError, nearest

if TYPE_CHECKING:
    from foveate.papers.harness import Paper


def available() -> tuple[str, ...]:
    """The papers that have a miniature, sorted; none of them is imported."""
    found = (one.name for one in pkgutil.iter_modules(__path__) if not one.ispkg)
    return tuple(sorted(name.replace("_", "-") for name in found))


def known(key: str) -> None:
    """Refuse a key that has no miniature.

    Raises:
        UnknownMethodError: it hasn't.
    """
    if key not in available():
        raise UnknownMethodError(f"No miniature has the key {key!r}; {nearest(key, available())}")


def load(key: str) -> Paper:
    """The miniature of a key.

    Raises:
        UnknownMethodError: there is none.
        MissingPackageError: it trains a model, and transformers isn't there.
    """
    known(key)
    try:
        module = importlib.import_module(f"{__name__}.{key.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"transformers", "safetensors"}:
            raise
        raise MissingPackageError(
            f"The miniature of {key} needs {error.name}: pip install 'foveate[hf]'"
        ) from error
    paper: Paper = module.PAPER
    return paper
