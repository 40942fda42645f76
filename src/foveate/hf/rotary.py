"""A causal model's rotary positions, as `parts.Rope`, so that cached keys can be moved along.

Keys reach a cache rotated. The frequencies are read from the model's rotary module; which
dimensions pair up isn't written anywhere, so both conventions are tried on the model itself: its
keys for a few tokens at one place of the sequence, moved, must be its keys at another place.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from foveate.hf.errors import ModelError
from foveate.hf.places import sites
from foveate.parts.rope import Rope

# These choose their frequencies by the longest position seen, so that keys of one sequence would be
# turned by different ones.
_CHANGING = {"dynamic", "longrope"}
_PROBE, _STEP = 6, 37
_INSTEAD = "use streaming_cache(..., reindex=False)."

_KNOWN: WeakKeyDictionary[nn.Module, dict[int, Rope | None]] = WeakKeyDictionary()


def ropes(model: PreTrainedModel) -> dict[int, Rope | None]:
    """The rotary positions of each layer of a causal model; None where keys don't turn.

    Runs the model twice on six tokens, once.

    Raises:
        ModelError: the model's positions aren't rotations, or not ones that can be moved.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _ropes(model)
    return _KNOWN[model]


def _ropes(model: PreTrainedModel) -> dict[int, Rope | None]:
    rotary = _rotary(model)
    near, far = _keys(model, 0), _keys(model, _STEP)
    found: dict[int, Rope | None] = {}
    for module, site in sites(model).items():
        index = getattr(module, "layer_idx", None)
        layer = index if isinstance(index, int) else site.layer
        if site.cross or layer not in near:
            continue
        if _close(near[layer], far[layer]):
            found[layer] = None
            continue
        for rope in _candidates(rotary, module):
            by = torch.full(near[layer].shape[2:3], _STEP, device=near[layer].device)
            if _close(rope.move(near[layer], by), far[layer]):
                found[layer] = rope
                break
        else:
            raise ModelError(
                f"The keys of {site.name} don't just turn with their position, so they can't be "
                f"given new ones in the cache; {_INSTEAD}"
            )
    return found


def _rotary(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "rotary_emb":
            continue
        kinds = getattr(module, "rope_type", "default")
        changing = _CHANGING & set(kinds.values() if isinstance(kinds, dict) else [kinds])
        if changing:
            raise ModelError(
                f"{name} changes its frequencies with the sequence's length (rope_type "
                f"{', '.join(sorted(changing))}), so cached keys can't be moved; {_INSTEAD}"
            )
        return module
    raise ModelError(
        f"{type(model).__name__} has no rotary embedding, so its cached keys can't be given new "
        f"positions; {_INSTEAD}"
    )


def _candidates(rotary: nn.Module, module: nn.Module) -> list[Rope]:
    """What a layer's rotation may be; models with several keep one for each type of layer."""
    kind = getattr(module, "layer_type", None)
    frequencies = getattr(rotary, f"{kind}_inv_freq", None)
    if frequencies is None:
        frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor):
        return []
    frequencies = frequencies.detach().float()
    return [Rope(frequencies, interleaved=interleaved) for interleaved in (False, True)]


@torch.no_grad()
def _keys(model: PreTrainedModel, start: int) -> dict[int, Tensor]:
    """The keys that each layer caches for a few tokens that begin at position `start`."""
    config = model.config.get_text_config(decoder=True)
    ids = (torch.arange(_PROBE, device=model.device) * 7 + 3) % config.vocab_size
    positions = torch.arange(start, start + _PROBE, device=model.device)
    cache = DynamicCache(config=config)
    training = model.training
    model.eval()
    try:
        model(
            input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True
        )
    finally:
        model.train(training)
    held = {i: getattr(layer, "keys", None) for i, layer in enumerate(cache.layers)}
    return {i: keys.float() for i, keys in held.items() if keys is not None}


def _close(one: Tensor, two: Tensor) -> bool:
    """Equal but for rounding (bf16 and fp16 models carry theirs through all layers)."""
    return bool((one - two).norm() <= 0.02 * two.norm())
