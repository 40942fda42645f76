"""A model's config.json as its fields, whatever names its family gives them.

Where transformers is there and knows the model type, its config class fills in what the file leaves
out; nothing is downloaded and no code of the folder runs. Unknown types are read as they stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foveate.ops.errors import InputError

ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "kv_n_heads", "n_kv_heads", "multi_query_group_num",
                            "num_attention_groups"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk",
              "top_k_experts"),
    "expert_width": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_width": ("shared_expert_intermediate_size", "share_expert_dim",
                     "shared_intermediate_size"),
    "shared_count": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
}  # fmt: skip

OUTER = ("model_type", "tie_word_embeddings")  # that the part for text may leave to the whole


class Given:
    """Fields of a decoder's config.

    Args:
        values: the config as a dict; of a model with several parts its text's is taken.
        name: for messages.

    Raises:
        InputError: it is no decoder.
    """

    def __init__(self, values: dict[str, Any], name: str = "config") -> None:
        for part in ("text_config", "language_config", "llm_config"):
            if isinstance(values.get(part), dict):
                inner = values[part]
                missing = [k for k in OUTER if inner.get(k) is None and values.get(k) is not None]
                values = inner | {k: values[k] for k in missing}
        for part in ("attn_config", "ffn_config"):  # of DBRX and MPT
            if isinstance(values.get(part), dict):
                nested = {k: v for k, v in values[part].items() if k not in ("model_type",)}
                nested.pop("hidden_size", None)
                values = nested | values
        if values.get("is_encoder_decoder"):
            raise InputError(f"{name} is an encoder and a decoder; expected a decoder alone.")
        self.name, self.plain, self._values = name, dict(values), _filled(values)
        self.kind = str(self._values.get("model_type", ""))

    def get(self, name: str, default: Any = None, layer: int | None = None) -> Any:
        """A field by our name for it or its aliases; `default` where it is missing or null."""
        own = self._values.get("per_layer_config") or {}
        if layer is not None and own:
            mine = own.get(layer, own.get(str(layer), own.get(f"{layer:02d}"))) or {}
            if mine.get(name) is not None:
                return mine[name]
        for key in (name, *ALIASES.get(name, ())):
            value = self._values.get(key)
            if value is not None:
                return value
        return default

    def number(self, name: str, default: int | None = None, layer: int | None = None) -> int:
        """A field that is an integer, of a layer where there is one for each.

        Raises:
            InputError: it is missing, or something else.
        """
        value = self.get(name, default, layer)
        if isinstance(value, list | tuple) and layer is not None and layer < len(value):
            value = value[layer]
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            known = " or ".join((name, *ALIASES.get(name, ())))
            raise InputError(
                f"{self.name} (model type {self.kind or 'unknown'}): {known} is {value!r}; "
                "expected an integer."
            )
        if value < 0:
            raise InputError(f"{self.name}: {name} is {value}; expected 0 or more.")
        return int(value)


def given(folder: str | Path) -> Given:
    """The fields of a folder's config.json, or of that file itself.

    Raises:
        InputError: it isn't there, or is no JSON object.
    """
    path = Path(folder).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}); expected a transformers model's folder, "
            "with its config.json."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object.")
    return Given(values, path.resolve().parent.name or str(path))


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of transformers' class for this type, where there is one that takes it."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return values
    kind = values.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        return values
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(values))
        return values | {k: v for k, v in config.to_dict().items() if v is not None}
    except Exception:  # whatever a family's own checks raise: the file may be older than the class
        return values
