"""The baseline: transformers' own best attention for the model, with a stop-watch around it.

That is sdpa, or eager for the few models whose attention sdpa can't express (a softcap, sinks).

The stop-watch is registered with transformers under a name of ours, both as attention and as mask,
only while a baseline runs; the attention that it calls is transformers' function, untouched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

# transformers takes any name with "sdpa" in it for its own, so ours has none.
NAME = "foveate_timed"


class Watch:
    """Seconds spent in attention since it was made, and in how many calls."""

    def __init__(self, synchronise: bool = False) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._synchronise = synchronise

    def now(self) -> float:
        """A time in seconds, at which all earlier work is done."""
        if self._synchronise:
            torch.cuda.synchronize()
        return perf_counter()


@contextmanager
def dense(model: Any, watch: Watch | None = None) -> Iterator[None]:
    """The model on transformers' best attention; `watch` hears of each attention's time.

    Without a watch the model runs as transformers makes it, nothing registered.
    """
    before = [(config, config._attn_implementation) for config in _configs(model)]
    best = baseline(model)
    if watch is None:
        try:
            _choose(model, best)
            yield
        finally:
            _restore(before)
        return

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    def timed(module: Any, *args: Any, **kwargs: Any) -> Any:
        attend = sdpa_attention_forward
        if best == "eager":
            attend = sys.modules[type(module).__module__].eager_attention_forward
        start = watch.now()
        result = attend(module, *args, **kwargs)
        watch.seconds += watch.now() - start
        watch.calls += 1
        return result

    AttentionInterface.register(NAME, timed)
    AttentionMaskInterface.register(NAME, sdpa_mask if best == "sdpa" else eager_mask)
    try:
        _choose(model, NAME)
        yield
    finally:
        _restore(before)
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)


def baseline(model: Any) -> str:
    """Name of the attention that is dense's: sdpa, or eager where transformers has no sdpa."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _choose(model: Any, name: str) -> None:
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def _configs(model: Any) -> list[Any]:
    """Every config of a model and of its parts, each once."""
    waiting = [module.config for module in model.modules() if hasattr(module, "config")]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _restore(before: list[tuple[Any, str | None]]) -> None:
    # Not by set_attn_implementation: that refuses names which the model itself began with.
    for config, name in before:
        config._attn_implementation_internal = name
