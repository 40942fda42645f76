"""Let transformers' Auto classes find foveate's models, without importing transformers for it.

A folder that was saved by a foveate model says so in its config.json ("model_type": "foveate" or
"foveate-encoder").
For plain `AutoModelForCausalLM.from_pretrained(folder)` after `import foveate`, transformers has to
know that name when it reads the folder, and not before: so `announce` waits for transformers' own
table of configs to be imported and then adds two rows to it, by transformers' public `register`.
The model's class is added when the first config is made. If nobody imports transformers, nothing
happens.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.models.auto.configuration_auto"


def announce() -> None:
    """Register the config with transformers, now if its table is there, else once it is."""
    if TABLE in sys.modules:
        register_config(sys.modules[TABLE])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def register_config(table: ModuleType) -> None:
    """Add foveate's configs to transformers' table of configs."""
    if not hasattr(table, "AutoConfig"):  # it is being imported right now
        return
    try:
        from foveate.models.config import FoveateConfig, FoveateEncoderConfig
    except ImportError:  # a transformers too old for foveate's models must still work by itself
        return
    for config in (FoveateConfig, FoveateEncoderConfig):
        table.AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models() -> None:
    """Add foveate's models to transformers' tables of models; done when a config is made."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from foveate.models.causal_lm import FoveateForCausalLM, FoveateModel
    from foveate.models.config import FoveateConfig, FoveateEncoderConfig
    from foveate.models.encoder import FoveateEncoder, FoveateForSequenceClassification

    AutoModel.register(FoveateConfig, FoveateModel, exist_ok=True)
    AutoModelForCausalLM.register(FoveateConfig, FoveateForCausalLM, exist_ok=True)
    AutoModel.register(FoveateEncoderConfig, FoveateEncoder, exist_ok=True)
    AutoModelForSequenceClassification.register(
        FoveateEncoderConfig, FoveateForSequenceClassification, exist_ok=True
    )


class _Watch(MetaPathFinder):
    """Sees the table's import once, and leaves all others alone."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The table's own spec, with its loader followed by the registration."""
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads as the loader it stands for, steps aside, and registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        register_config(module)
