"""A model's cache in transformers' form: for each layer what its projection keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from foveate.nn.block import Held
from foveate.ops.errors import InputError


class LayerCache(CacheLayerMixin):
    """One layer's cache, as `generate` wants it; the layer itself writes to it."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, held: Held, registers: int = 0) -> None:
        super().__init__()
        self.held, self.registers = held, registers
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: sizes come with the first tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refuse: entries differ by projection, and keys and values are only one kind of them."""
        raise InputError(
            "This cache belongs to a foveate model, whose layers keep their own kinds of entries; "
            "another model needs its own cache, such as transformers' DynamicCache."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next queries see, and the first one's index."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held, register tokens not counted."""
        return max(0, len(self.held) - self.registers)

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.held.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on from row beam_idx[b]."""
        self.held.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; the number is negative or 0."""
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}): expected minus the number of tokens.")
        self.held.truncate(len(self.held) + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.held.batch is not None:
            self.held.reorder(torch.arange(self.held.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: their numbers, or True for each that stays."""
        self.held.reorder(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        """Refuse: entries stay where they are computed with."""
        raise InputError(
            "A foveate model's cache can't be offloaded; use cache_implementation=None."
        )


class ModelCache(Cache):
    """The caches of all layers; made by `model.new_cache()`.

    Args:
        layers: each layer's cache.
        registers: the model's register tokens, which the caches hold in front.
    """

    def __init__(self, layers: Iterable[Held], registers: int = 0) -> None:
        super().__init__(layers=[LayerCache(held, registers) for held in layers])

    def bytes(self) -> int:
        """Bytes held by all layers and rows."""
        return sum(layer.held.bytes() for layer in self.layers)

    @property
    def elements_per_token(self) -> int:
        """Numbers kept for each token by all layers, as declared."""
        return sum(layer.held.elements_per_token for layer in self.layers)
