"""transformers' models through foveate: `use`, assignments of patterns to heads, bounded caches.

Importing this registers nothing with transformers; `use` does, and undoes it.
"""

from __future__ import annotations

import importlib.util

from foveate.ops.errors import MissingPackageError

if importlib.util.find_spec("transformers") is None:
    raise MissingPackageError(
        "foveate.hf needs transformers 5 or later; install it with: pip install 'foveate[hf]'"
    )

from foveate.hf.assignment import Assignment  # noqa: E402
from foveate.hf.cache import streaming_cache  # noqa: E402
from foveate.hf.errors import AssignmentError, InUseError, ModelError  # noqa: E402
from foveate.hf.sites import Site, sites  # noqa: E402
from foveate.hf.use import Use, use  # noqa: E402

__all__ = [
    "Assignment",
    "AssignmentError",
    "InUseError",
    "ModelError",
    "Site",
    "Use",
    "sites",
    "streaming_cache",
    "use",
]
