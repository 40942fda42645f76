"""Moving a model's cached keys along: keys come out of a layer rotated, and R(a + b) = R(b) R(a).

A rotary embedding turns a key at position p by angles p * f. To let it stand e positions later, it
is turned by e * f more; nothing has to be known of p. The turning is done by the model's own code
(its rotary module and its `apply_rotary_pos_emb`), so that halves or interleaved pairs, partial
rotation and scaled frequencies are as the model has them, and the outcome is checked on the model
itself before it is relied on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from foveate.hf.errors import ModelError
from foveate.hf.sites import sites

# These choose their frequencies by the longest position seen, so that keys of one sequence would be
# turned by different ones.
_CHANGING = ("dynamic", "longrope")
_PROBE, _STEP = 6, 37


class Turn:
    """Turns the keys of one layer to later positions."""

    def __init__(self, rotary: nn.Module, apply: Callable[..., Any], kind: str | None) -> None:
        self.rotary, self.apply, self.kind = rotary, apply, kind
        self._last: tuple[Any, Tensor, Tensor] | None = None

    def __call__(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys (B, H, L, D), each row b turned by `by[b]` positions; by is (B,) or (1,) int64."""
        cos, sin = self._angles(by, keys.device)
        wide = keys.float()
        try:
            turned = self.apply(wide, wide, cos, sin)[1]
        except RuntimeError:
            # Partial rotation that the layer, not the function, cuts out.
            size = cos.shape[-1]
            head = wide[..., :size]
            turned = torch.cat([self.apply(head, head, cos, sin)[1], wide[..., size:]], dim=-1)
        return turned.to(keys.dtype)

    def _angles(self, by: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        stamp = tuple(by.tolist())
        if self._last is not None and self._last[0] == stamp:
            return self._last[1], self._last[2]
        positions = by.to(device)[:, None]
        like = torch.empty(0, device=device)
        kind = () if self.kind is None else (self.kind,)
        cos, sin = self.rotary(like, positions, *kind)
        name = "attention_scaling" if self.kind is None else f"{self.kind}_attention_scaling"
        scaling = float(getattr(self.rotary, name, 1.0))
        self._last = (stamp, cos / scaling, sin / scaling)
        return self._last[1], self._last[2]


_TURNS: WeakKeyDictionary[nn.Module, dict[int, Turn | None]] = WeakKeyDictionary()


def turns(model: PreTrainedModel) -> dict[int, Turn | None]:
    """For each layer of a causal model, what moves its keys along; None where nothing turns them.

    Runs the model twice on a few tokens, at two places of the sequence, and compares.

    Raises:
        ModelError: the model's positions aren't rotations, or not ones that can be moved.
    """
    if model in _TURNS:
        return _TURNS[model]
    found = {m: s for m, s in sites(model).items() if not s.cross}
    rotary = _rotary(model)
    near, far = _keys(model, 0), _keys(model, _STEP)
    result: dict[int, Turn | None] = {}
    made: dict[str | None, Turn] = {}
    for module, site in found.items():
        index = getattr(module, "layer_idx", None)
        number = index if isinstance(index, int) else site.layer
        if number not in near:
            continue
        here, there = near[number], far[number]
        kind = _kind(rotary, module)
        if kind not in made:
            apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
            if apply is None:
                raise ModelError(
                    f"{type(model).__name__} has no apply_rotary_pos_emb to move cached keys with; "
                    "use streaming_cache(..., reindex=False)."
                )
            made[kind] = Turn(rotary, apply, kind)
        moved = made[kind](here, torch.tensor([_STEP], device=here.device))
        if _close(here, there):
            result[number] = None
        elif _close(moved, there):
            result[number] = made[kind]
        else:
            raise ModelError(
                f"The keys of {site.name} don't just turn with their position, so they can't be "
                "given new ones in the cache; use streaming_cache(..., reindex=False)."
            )
    _TURNS[model] = result
    return result


def _rotary(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "rotary_emb":
            continue
        kinds = getattr(module, "rope_type", "default")
        used = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if used & set(_CHANGING):
            raise ModelError(
                f"{name} changes its frequencies with the sequence's length "
                f"(rope_type {', '.join(sorted(used & set(_CHANGING)))}), so cached keys can't be "
                "moved; use streaming_cache(..., reindex=False)."
            )
        return module
    raise ModelError(
        f"{type(model).__name__} has no rotary embedding, so its cached keys can't be given new "
        "positions; use streaming_cache(..., reindex=False)."
    )


def _kind(rotary: nn.Module, module: nn.Module) -> str | None:
    """The layer type that the rotary module is asked for, where it differs by type."""
    if not isinstance(getattr(rotary, "rope_type", None), dict):
        return None
    return getattr(module, "layer_type", None)


@torch.no_grad()
def _keys(model: PreTrainedModel, start: int) -> dict[int, Tensor]:
    """The keys that each layer caches for a few tokens that begin at position `start`."""
    config = model.config.get_text_config()
    ids = (torch.arange(_PROBE, device=model.device) * 7 + 3) % config.vocab_size
    positions = torch.arange(start, start + _PROBE, device=model.device)
    cache = DynamicCache()
    training = model.training
    model.eval()
    try:
        model(
            input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True
        )
    finally:
        model.train(training)
    return {i: layer.keys.float() for i, layer in enumerate(cache.layers) if layer.keys is not None}


def _close(one: Tensor, two: Tensor) -> bool:
    """Equal but for rounding (bf16 and fp16 models carry theirs through all layers)."""
    return bool((one - two).norm() <= 0.02 * two.norm())
