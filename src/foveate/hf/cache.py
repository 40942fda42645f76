"""StreamingLLM's cache for transformers: the first tokens and a window of the last, and no more.

Xiao et al. 2023, arXiv 2309.17453. Of the keys and values of a layer the first `sinks` and the
last `window` are kept. Keys reach a cache rotated, so positions inside the cache (0 ... kept - 1,
the query last) are had by turning: between a query and the recent keys the distances are right as
they are; the sinks are turned forward by as many positions as were dropped between. Distances never
exceed the capacity, however long the sequence gets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from foveate.hf.errors import ModelError
from foveate.hf.masks import InCacheOffset
from foveate.hf.recognise import contiguous
from foveate.hf.rotary import ropes
from foveate.ops.errors import InputError
from foveate.parts.cache import SinkWindowCache
from foveate.parts.rope import Rope


class SinkWindowLayer(CacheLayerMixin):
    """One layer's bounded cache, `parts.SinkWindowCache` as transformers wants it.

    A chunk of at most `window` new tokens takes its place before it is attended to, so that nothing
    sees more than the capacity; a longer one (a long prompt) is attended to whole and cut after.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, sinks: int, window: int, rope: Rope | None = None, pads: Tensor | None = None
    ) -> None:
        super().__init__()
        self.sinks, self.window, self.rope, self.pads = sinks, window, rope, pads
        self.cache: SinkWindowCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn the batch size from the first tokens."""
        batch, start = key_states.shape[0], self.pads
        if start is not None:
            if batch % len(start):
                raise InputError(
                    f"The cache was made for the padding of {len(start)} rows, but it is used with "
                    f"a batch of {batch}; pass the same attention_mask to both."
                )
            # Beam search repeats each row.
            start = start.repeat_interleave(batch // len(start))
        self.cache = SinkWindowCache(self.sinks, self.window, self.rope, rotated=True, start=start)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new keys (B, Hkv, L, D) and values, and return those to attend to now."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None
        return self.cache.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next `query_length` queries attend to, and the first's index.

        By index, the keys are the last so many of the sequence: with them the causal rule lets
        every query see all that is kept, and padding still held is where the 2-D mask has it.
        """
        room = self.sinks + max(0, self.window - query_length)
        kept = min(0 if self.cache is None else len(self.cache), room)
        offset = InCacheOffset(self.get_seq_length() - kept)
        offset.padding_known = self.pads is not None
        return kept + query_length, offset

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far, kept or not: where the next one's position is."""
        return 0 if self.cache is None else self.cache.seen

    def get_max_length(self) -> int:
        """-1: a sequence may go on for ever."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.cache, self.is_initialized = None, False

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
        if self.cache is not None and tokens_to_remove:
            if -tokens_to_remove > self.cache.seen:
                raise InputError(
                    f"crop({tokens_to_remove}): only {self.cache.seen} tokens were seen."
                )
            self.cache.truncate(self.cache.seen + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on from what row beam_idx[b] holds."""
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch: their numbers, or True for each that stays."""
        if self.cache is not None:
            rows = torch.arange(self.cache.evicted.shape[0], device="cpu")
            self.cache.reorder(rows[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold each row `repeats` times."""
        if self.cache is not None:
            rows = torch.arange(self.cache.evicted.shape[0], device="cpu")
            self.cache.reorder(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: a bounded cache stays where it is."""

    def prefetch(self) -> None:
        """Nothing: a bounded cache stays where it is."""


def streaming_cache(
    model: PreTrainedModel,
    sinks: int = 4,
    window: int = 1020,
    *,
    attention_mask: Tensor | None = None,
    reindex: bool = True,
) -> Cache:
    """A cache of at most `sinks + window` tokens per layer, for `past_key_values=`.

        cache = foveate.hf.streaming_cache(model, sinks=4, window=1020)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=100_000)

    With it, generation goes on for ever in bounded memory. It needs no `foveate.use`: whichever
    attention runs sees only what is kept. A prompt longer than the capacity is attended to as that
    attention says (dense; with `use(model, "sink-window")`, sinks and window) and then cut; to
    stream it too, prefill in chunks of at most `window` (`prefill_chunk_size=` of `generate`).
    Layers with a sliding window of the model's own, and linear ones, keep transformers' own caches.

    Args:
        model: a causal model of transformers.
        sinks: tokens kept from the start of each sequence.
        window: tokens kept from its end.
        attention_mask: (B, L), the 2-D mask of a left-padded prompt. Needed for padded batches,
            where it makes the sinks each row's first real tokens; a cache never sees the mask.
        reindex: positions inside the cache, as in the paper. False keeps those of the sequence:
            then decoding equals the mask `causal() & (window(window - 1, 0) | sinks(sinks))`, in
            any model, but positions grow without bound.

    Raises:
        InputError: a size that isn't positive, or a mask that isn't left padding.
        ModelError: the model has no full-attention layer, or positions that can't be moved.
    """
    SinkWindowCache(sinks, window)  # says what is wrong with them
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"streaming_cache(model): expected a transformers model, got {type(model).__name__}."
        )
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has an encoder and a decoder; streaming is for causal models."
        )
    layers = DynamicCache(config=config).layers
    plain = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not plain:
        raise ModelError(
            f"{type(model).__name__} has no layer of full attention to bound; its own cache is "
            "bounded already."
        )
    pads = None if attention_mask is None else _left_padding(attention_mask)
    turning = ropes(model) if reindex else {}
    for i in plain:
        layers[i] = SinkWindowLayer(sinks, window, turning.get(i), pads)
    return Cache(layers=layers)


def _left_padding(attention_mask: Tensor) -> Tensor:
    """Padding in front of each row, (B,) int64 on the CPU."""
    if attention_mask.dim() != 2:
        raise InputError(
            f"streaming_cache(attention_mask): expected the 2-D mask (B, L) of the prompt, got "
            f"{tuple(attention_mask.shape)}."
        )
    spans = contiguous(attention_mask.bool())
    if spans is None or bool((spans.ends != attention_mask.shape[1]).any()):
        raise InputError(
            "streaming_cache(attention_mask): expected left padding, zeros only before each row's "
            "tokens; pad the prompt on the left (tokenizer.padding_side = 'left')."
        )
    return spans.starts.cpu()
