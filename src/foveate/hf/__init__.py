"""transformers' models through foveate: `use`, assignments of patterns to heads, bounded caches.

Importing this imports no transformers and registers nothing with it; `use` does, and undoes it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from foveate.ops.errors import MissingPackageError

if TYPE_CHECKING:
    from foveate.hf.assignment import Assignment
    from foveate.hf.cache import streaming_cache
    from foveate.hf.doge import dynamic_mask
    from foveate.hf.errors import AssignmentError, InUseError, ModelError
    from foveate.hf.grid import TokenGrid, token_grid, use_on_grid
    from foveate.hf.places import Site, sites
    from foveate.hf.tree import SentenceTree, late_alternating, use_on_tree
    from foveate.hf.using import Use, use

_HOMES = {
    "Assignment": "assignment",
    "AssignmentError": "errors",
    "InUseError": "errors",
    "ModelError": "errors",
    "SentenceTree": "tree",
    "Site": "places",
    "TokenGrid": "grid",
    "Use": "using",
    "dynamic_mask": "doge",
    "late_alternating": "tree",
    "streaming_cache": "cache",
    "sites": "places",
    "token_grid": "grid",
    "use": "using",
    "use_on_grid": "grid",
    "use_on_tree": "tree",
}

__all__ = [
    "Assignment",
    "AssignmentError",
    "InUseError",
    "ModelError",
    "SentenceTree",
    "Site",
    "TokenGrid",
    "Use",
    "dynamic_mask",
    "late_alternating",
    "sites",
    "streaming_cache",
    "token_grid",
    "use",
    "use_on_grid",
    "use_on_tree",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foveate.hf' has no attribute {name!r}")
    if importlib.util.find_spec("transformers") is None:
        raise MissingPackageError(
            "foveate.hf needs transformers 5 or later; install it with: pip install 'foveate[hf]'"
        )
    value = getattr(importlib.import_module(f"foveate.hf.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
