"""The baseline: transformers' own sdpa attention, with a stop-watch around it.

The stop-watch is registered with transformers under a name of ours, both as attention and as mask,
only while a baseline runs; the attention that it calls is transformers' function, untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

NAME = "foveate_timed_sdpa"


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
    """The model on transformers' sdpa; `watch` hears of each attention's time.

    Without a watch the model runs as transformers makes it, nothing registered.
    """
    before = model.config._attn_implementation
    if watch is None:
        _choose(model, "sdpa")
        try:
            yield
        finally:
            _choose(model, before)
        return

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = watch.now()
        result = sdpa_attention_forward(*args, **kwargs)
        watch.seconds += watch.now() - start
        watch.calls += 1
        return result

    AttentionInterface.register(NAME, timed)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        _choose(model, NAME)
        yield
    finally:
        _choose(model, before)
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)


def _choose(model: Any, name: str) -> None:
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
