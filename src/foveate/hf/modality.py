"""Which tokens of a multimodal prompt are text and which are vision, read off its input ids.

A vision-language model's config names the placeholder ids that stand where image and video features
go; patterns that differ by modality (`q-boundary`, `2d-boundary`) are told of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.hf.attend import Running

_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def placeholders(config: Any) -> list[int]:
    """The ids that stand for vision tokens; empty for a model of text alone."""
    found = (getattr(config, name, None) for name in _IDS)
    return sorted({i for i in found if isinstance(i, int)})


def watch_modality(model: nn.Module, running: Running) -> list[RemovableHandle]:
    """Keep `running.modality` (B, L) up to date: 0 text, 1 vision; nothing without vision."""
    ids = placeholders(getattr(model, "config", None))
    if not ids:
        return []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(given, Tensor) or given.is_floating_point():
            running.modality = None
            return
        kinds = torch.isin(given, torch.tensor(ids, device=given.device)).long()
        cache = kwargs.get("past_key_values")
        length = 0 if cache is None else cache.get_seq_length()
        before = running.modality
        if length and before is not None and before.shape == (len(kinds), length):
            kinds = torch.cat((before.to(kinds.device), kinds), 1)
        running.modality = kinds

    return [model.register_forward_pre_hook(look, with_kwargs=True)]
