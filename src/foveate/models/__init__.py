"""Small whole models, made of foveate's layers.

Language models are transformers' PreTrainedModel, those of images and videos plain modules.

Importing this imports no transformers; the language models' names do.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from foveate.ops.errors import MissingPackageError

if TYPE_CHECKING:
    from foveate.models.biformer import (
        BiFormer,
        biformer_base,
        biformer_small,
        biformer_stl,
        biformer_tiny,
    )
    from foveate.models.cache import ModelCache
    from foveate.models.causal_lm import CausalLMOutput, FoveateForCausalLM, FoveateModel
    from foveate.models.colberter import ColberterModel
    from foveate.models.config import FoveateConfig, FoveateEncoderConfig
    from foveate.models.dit import DiT
    from foveate.models.echo import echo_student
    from foveate.models.encoder import FoveateEncoder, FoveateForSequenceClassification
    from foveate.models.gat import GAT
    from foveate.models.latent import to_tpla
    from foveate.models.layouts import config_from, load_layout, weights_from
    from foveate.models.look import attention_maps
    from foveate.models.mobilenet import MobileNetV1, MobileNetV2
    from foveate.models.nat import NAT
    from foveate.models.pictures import word_picture
    from foveate.models.recommender import BPRMF, FM, KGATRecommender
    from foveate.models.sequential import SequentialRecommender
    from foveate.models.skip import without_layers
    from foveate.models.step3 import step3_config

_HOMES = {
    "CausalLMOutput": "causal_lm",
    "FoveateConfig": "config",
    "FoveateEncoder": "encoder",
    "FoveateEncoderConfig": "config",
    "FoveateForCausalLM": "causal_lm",
    "FoveateForSequenceClassification": "encoder",
    "FoveateModel": "causal_lm",
    "ModelCache": "cache",
    "attention_maps": "look",
    "config_from": "layouts",
    "echo_student": "echo",
    "load_layout": "layouts",
    "step3_config": "step3",
    "to_tpla": "latent",
    "weights_from": "layouts",
    "without_layers": "skip",
}

_PLAIN = {
    "BPRMF": "recommender",
    "BiFormer": "biformer",
    "ColberterModel": "colberter",
    "DiT": "dit",
    "FM": "recommender",
    "GAT": "gat",
    "KGATRecommender": "recommender",
    "MobileNetV1": "mobilenet",
    "MobileNetV2": "mobilenet",
    "NAT": "nat",
    "SequentialRecommender": "sequential",
    "biformer_base": "biformer",
    "biformer_small": "biformer",
    "biformer_stl": "biformer",
    "biformer_tiny": "biformer",
    "word_picture": "pictures",
}

__all__ = [
    "BPRMF",
    "FM",
    "GAT",
    "NAT",
    "BiFormer",
    "CausalLMOutput",
    "ColberterModel",
    "DiT",
    "FoveateConfig",
    "FoveateEncoder",
    "FoveateEncoderConfig",
    "FoveateForCausalLM",
    "FoveateForSequenceClassification",
    "FoveateModel",
    "KGATRecommender",
    "MobileNetV1",
    "MobileNetV2",
    "ModelCache",
    "SequentialRecommender",
    "attention_maps",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_tiny",
    "config_from",
    "echo_student",
    "load_layout",
    "step3_config",
    "to_tpla",
    "weights_from",
    "without_layers",
    "word_picture",
]


def __getattr__(name: str) -> Any:
    homes = _HOMES | _PLAIN
    if name not in homes:
        raise AttributeError(f"module 'foveate.models' has no attribute {name!r}")
    if name in _HOMES and importlib.util.find_spec("transformers") is None:
        raise MissingPackageError(
            f"foveate.models.{name} needs transformers 5 or later; install it with: "
            "pip install 'foveate[hf]'"
        )
    value = getattr(importlib.import_module(f"foveate.models.{homes[name]}"), name)
    globals()[name] = value
    return value
