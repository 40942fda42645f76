"""Cache layers that drop keys, put into transformers' own cache while a model is in use.

A policy such as `snapkv` or `h2o` needs its layer's cache, which transformers hands to the
attention module and not to the attention function. So each module of a policy is asked before it
runs: the layer's plain `DynamicLayer` becomes an `EvictingLayer`, and the policy finds its cache in
its context.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from foveate.hf.assignment import HeadGroup
from foveate.hf.errors import AssignmentError, ModelError
from foveate.hf.masks import InCacheOffset
from foveate.hf.places import Site
from foveate.ops.errors import InputError
from foveate.parts.eviction import EvictingCache

_ARGUMENT = "past_key_values"


class EvictingLayer(CacheLayerMixin):
    """One layer's `parts.EvictingCache` as transformers wants it.

    Without the use that made it (after `undo`) it keeps what it has, takes in all that comes, and
    drops nothing more.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.cache = EvictingCache()

    @classmethod
    def in_place_of(cls, layer: DynamicLayer) -> EvictingLayer:
        """A layer that goes on from what another one holds."""
        made = cls()
        if layer.get_seq_length():
            made.update(layer.keys, layer.values)
        return made

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do before the first tokens."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new keys (B, Hkv, L, D) and values, and return those to attend to now."""
        self.is_initialized = True
        return self.cache.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next `query_length` queries attend to, and the first's index.

        By index they are the last so many of the sequence: what is kept lies before all new queries
        anyway, and padding still held is where the 2-D mask has it.
        """
        return len(self.cache) + query_length, InCacheOffset(self.cache.evicted)

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far, kept or not: where the next one's position is."""
        return self.cache.seen

    def get_max_length(self) -> int:
        """-1: a sequence may go on for ever."""
        return -1

    def bytes(self) -> int:
        """Bytes of what is held."""
        return self.cache.bytes()

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, as transformers' own layers do.

        Raises:
            ValueError: a positive number, which once meant a length to cut to.
            InputError: tokens were dropped, that would have to return, or there are too few.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): a positive value isn't supported, here as in "
                "transformers' own layers; give minus the number of tokens to take back."
            )
        if tokens_to_remove:
            if -tokens_to_remove > self.cache.seen:
                raise InputError(
                    f"crop({tokens_to_remove}): only {self.cache.seen} tokens were seen."
                )
            self.cache.truncate(self.cache.seen + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on from what row beam_idx[b] holds."""
        self.cache.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch."""
        if self.cache.seen:
            rows = torch.arange(len(self.cache.positions), device=indices.device)
            self.cache.reorder(rows[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold each row `repeats` times."""
        if self.cache.seen:
            self.cache.reorder(torch.arange(len(self.cache.positions)).repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: what is kept is small, and stays where it is."""

    def prefetch(self) -> None:
        """Nothing: what is kept is small, and stays where it is."""


def policies(
    model: nn.Module, plan: dict[nn.Module, list[HeadGroup]], found: dict[nn.Module, Site]
) -> list[nn.Module]:
    """The modules of a plan whose cache a policy cuts.

    Raises:
        AssignmentError: a policy for some heads of a layer only.
        ModelError: the model's cache can't be reached.
    """
    modules = []
    for module, groups in plan.items():
        if not any(group.method.evicts for group in groups):
            continue
        name = found[module].name
        if len(groups) > 1:
            raise AssignmentError(
                f"{name}: a policy that drops keys is for the cache of a whole layer, so all heads "
                "of the layer must run it. It chooses for each key head by itself."
            )
        if found[module].cross or getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{type(model).__name__} has an encoder and a decoder; policies that drop keys are "
                "for causal models."
            )
        if _ARGUMENT not in inspect.signature(module.forward).parameters:
            raise ModelError(
                f"{name} takes no {_ARGUMENT}, so its cache can't be reached; use a mask such as "
                "sink-window."
            )
        modules.append(module)
    return modules


class _Look:
    """A hook; in copies and pickles of a model it is one that does nothing."""

    def __init__(self, caches: MutableMapping[nn.Module, EvictingCache]) -> None:
        self.caches = caches

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.caches.pop(module, None)
        cache = kwargs.get(_ARGUMENT)
        if cache is None:
            cache = _positional(module.forward, args)
        if cache is not None:
            layer = _layer(cache, module)
            if layer is not None:
                self.caches[module] = layer.cache

    def __reduce__(self) -> tuple[Any, ...]:
        return (_idle, ())


def _idle() -> Callable[..., None]:
    return _nothing


def _nothing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def watch_cache(
    modules: list[nn.Module], caches: MutableMapping[nn.Module, EvictingCache]
) -> list[RemovableHandle]:
    """Before each module runs, put its layer's cache into `caches`, made to drop keys."""
    look = _Look(caches)
    return [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]


def _positional(forward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    names = list(inspect.signature(forward).parameters)
    at = names.index(_ARGUMENT)
    return args[at] if at < len(args) else None


def _layer(cache: Any, module: nn.Module) -> EvictingLayer | None:
    """The layer of a cache, evicting; None where the model itself bounds it (a sliding window)."""
    index = getattr(module, "layer_idx", None)
    if not isinstance(cache, Cache) or not isinstance(index, int):
        raise ModelError(
            f"A {type(cache).__name__} isn't a cache of transformers whose layers can be made to "
            "drop keys; leave past_key_values out, or give a DynamicCache."
        )
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, EvictingLayer):
        return layer
    if getattr(layer, "is_sliding", False):
        return None
    if type(layer) is not DynamicLayer or cache.offloading:
        kind = "an offloaded cache" if cache.offloading else type(layer).__name__
        raise ModelError(
            f"Keys can be dropped from transformers' dynamic cache only, and this is {kind}; leave "
            "cache_implementation and past_key_values out, or give a DynamicCache."
        )
    cache.layers[index] = EvictingLayer.in_place_of(layer)
    return cache.layers[index]
