"""foveate: efficient attention for PyTorch, exact, measured and adopted in one line.

Importing this imports torch and nothing else heavy, and changes nothing in other libraries; it only
lets transformers' Auto classes find foveate's own models, if transformers is imported at all.
`Attention`, `use`, `Context` and `catalog` load what they need when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from foveate.models import auto as _auto
from foveate.ops import (
    AttentionOutput,
    Layout,
    Mask,
    RelativeBias,
    alibi,
    alibi_slopes,
    attention,
    blocks,
    causal,
    documents,
    explain,
    merge,
    mix,
    neighborhood,
    padding,
    parse_mask,
    prefix,
    region,
    sinks,
    strided,
    window,
)

if TYPE_CHECKING:
    from foveate import catalog
    from foveate.hf import use
    from foveate.nn import Attention
    from foveate.parts import Context

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionOutput",
    "Context",
    "Layout",
    "Mask",
    "RelativeBias",
    "__version__",
    "alibi",
    "alibi_slopes",
    "attention",
    "blocks",
    "catalog",
    "causal",
    "documents",
    "explain",
    "merge",
    "mix",
    "neighborhood",
    "padding",
    "parse_mask",
    "prefix",
    "region",
    "sinks",
    "strided",
    "use",
    "window",
]

_LAZY = {
    "Attention": "foveate.nn",
    "Context": "foveate.parts",
    "catalog": "foveate.catalog",
    "use": "foveate.hf",
}

_auto.announce()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module(_LAZY[name])
    value = found if name == "catalog" else getattr(found, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
