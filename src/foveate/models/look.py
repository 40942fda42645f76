"""The attention matrices of a language model, to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.methods.deconstructing import matrix_of
from foveate.models.causal_lm import FoveateForCausalLM
from foveate.ops import AttentionOutput
from foveate.parts.attention import Attention
from foveate.parts.context import Context


class _Recorder(Attention):
    """Runs another attention and keeps the weights of its last call."""

    def __init__(self, inner: Attention) -> None:
        self.inner = inner
        self.seen: Tensor | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """As the other one."""
        ctx = Context() if ctx is None else ctx
        self.seen = matrix_of(self.inner, q, k, replace(ctx, aux={}))
        return self.inner(q, k, v, ctx)


@torch.no_grad()
def attention_maps(model: FoveateForCausalLM, input_ids: Tensor) -> list[Tensor | None]:
    """The weights A of every layer on input_ids (B, L), as `indicators` takes them.

    They hold (L x L) numbers for each head: for lengths that one can look at.

    Args:
        model: as it stands, in training or not.
        input_ids: (B, L), without padding.

    Returns:
        For each layer (B, Hq, L, L), or (1, Hq, L, L) where the whole batch shares them; None for a
        mixer without any.
    """
    with _recorded(model) as recorders:
        model.model(input_ids, use_cache=False)
        return [None if one is None else one.seen for one in recorders]


@contextmanager
def _recorded(model: FoveateForCausalLM) -> Iterator[list[_Recorder | None]]:
    recorders: list[_Recorder | None] = []
    places: list[tuple[Any, Attention]] = []
    try:
        for block in model.model.blocks:
            place: Any = getattr(block.attention, "mixer", block.attention)
            inner = getattr(place, "attention", None)
            if not isinstance(inner, Attention):
                recorders.append(None)
                continue
            recorder = _Recorder(inner)
            places.append((place, inner))
            place._modules.pop("attention", None)  # where it is a module itself
            place.attention = recorder
            recorders.append(recorder)
        yield recorders
    finally:
        for place, inner in places:
            del place.attention
            place.attention = inner
