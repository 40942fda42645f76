"""Claims that can be checked: each module here is the miniature of one paper.

A miniature is one small file: configuration, data, baseline, metric and the threshold, stated
before the run (`foveate.papers.harness.Paper` says what each part means). What they share lies in
the folders beside them: `tasks`, `training`, and the `harness` that runs and judges them.
`foveate reproduce KEY` is the command.
"""

from __future__ import annotations

import importlib
import importlib.util
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
        MissingPackageError: a package that it requires isn't there.
    """
    known(key)
    module = importlib.import_module(f"{__name__}.{key.replace('-', '_')}")
    paper: Paper = module.PAPER
    missing = [name for name in paper.requires if not _there(name)]
    if missing:
        raise MissingPackageError(
            f"The miniature of {key} needs {' and '.join(missing)}: pip install 'foveate[hf]'"
        )
    return paper


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it was ruled out on purpose
        return False
