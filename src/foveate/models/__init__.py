"""Small whole models, made of foveate's layers, as transformers' PreTrainedModel.

Importing this imports no transformers; its names do.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from foveate.ops.errors import MissingPackageError

if TYPE_CHECKING:
    from foveate.models.cache import ModelCache
    from foveate.models.causal_lm import CausalLMOutput, FoveateForCausalLM, FoveateModel
    from foveate.models.config import FoveateConfig
    from foveate.models.latent import to_tpla
    from foveate.models.layouts import config_from, load_layout, weights_from

_HOMES = {
    "CausalLMOutput": "causal_lm",
    "FoveateConfig": "config",
    "FoveateForCausalLM": "causal_lm",
    "FoveateModel": "causal_lm",
    "ModelCache": "cache",
    "config_from": "layouts",
    "load_layout": "layouts",
    "to_tpla": "latent",
    "weights_from": "layouts",
}

__all__ = [
    "CausalLMOutput",
    "FoveateConfig",
    "FoveateForCausalLM",
    "FoveateModel",
    "ModelCache",
    "config_from",
    "load_layout",
    "to_tpla",
    "weights_from",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foveate.models' has no attribute {name!r}")
    if importlib.util.find_spec("transformers") is None:
        raise MissingPackageError(
            "foveate.models needs transformers 5 or later; install it with: "
            "pip install 'foveate[hf]'"
        )
    value = getattr(importlib.import_module(f"foveate.models.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
