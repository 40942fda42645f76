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
from foveate.hf.rotary import Turn, turns
from foveate.ops.errors import InputError


class SinkWindowLayer(CacheLayerMixin):
    """One layer's bounded cache.

    Keys and values are (B, Hkv, at most sinks + window, D), in the order of the sequence. A chunk
    of at most `window` new tokens takes its place before it is attended to, so that nothing sees
    more than the capacity; a longer one (a long prompt) is attended to whole and cut afterwards.

    Attributes:
        seen: tokens of the sequence so far.
        dropped: (B,) real tokens dropped from between sinks and window.
        pads: (B,) padding still held in front.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(
        self, sinks: int, window: int, turn: Turn | None = None, pads: Tensor | None = None
    ) -> None:
        super().__init__()
        self.sinks, self.window, self.turn = sinks, window, turn
        self.first_pads = torch.zeros(1, dtype=torch.int64) if pads is None else pads
        self.seen = 0

    @property
    def capacity(self) -> int:
        """The most tokens held between two calls."""
        return self.sinks + self.window

    @property
    def kept(self) -> int:
        """Tokens held now."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, head sizes, dtype and device from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch = key_states.shape[0]
        if batch % len(self.first_pads):
            raise InputError(
                f"The cache was made for the padding of {len(self.first_pads)} rows, but it is "
                f"used with a batch of {batch}; pass the same attention_mask to streaming_cache and "
                "to the model."
            )
        self.pads = self.first_pads.repeat_interleave(batch // len(self.first_pads))
        self.dropped = torch.zeros(batch, dtype=torch.int64)
        self.keys = key_states[..., :0, :]
        self.values = value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new keys (B, Hkv, L, D) and values, and return those to attend to now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if new <= self.window:
            self._cut(self.capacity - new)
        held_keys, held_values = self._held()
        self.keys = torch.cat([held_keys, key_states], dim=-2)
        self.values = values = torch.cat([held_values, value_states], dim=-2)
        self.seen += new
        keys = self._placed(self.keys)
        self._cut(self.capacity)
        return keys, values

    def _placed(self, keys: Tensor) -> Tensor:
        """The keys at their positions inside the cache, relative to the newest query."""
        if self.turn is None or not self.sinks or not bool(self.dropped.any()):
            return keys
        same = bool((self.dropped == self.dropped[0]).all())
        by = self.dropped[:1] if same else self.dropped
        turned = self.turn(keys[..., : self.sinks, :], by)
        return torch.cat([turned, keys[..., self.sinks :, :]], dim=-2)

    def _cut(self, size: int) -> None:
        """Keep `size` tokens: padding goes first, then what stands behind the sinks."""
        excess = self.kept - size
        if excess <= 0:
            return
        keys, values = self._held()
        front = self.pads.clamp(max=excess)
        self.pads = self.pads - front
        self.dropped = self.dropped + (excess - front)
        if not bool((front > 0).any()):
            self.keys, self.values = (self._without(x, excess) for x in (keys, values))
            return
        index = torch.arange(size)[None] + excess
        at_front = torch.arange(size)[None] + front[:, None]
        index = torch.where(torch.arange(size)[None] < self.sinks, at_front, index)
        index = index[:, None, :, None].to(keys.device)
        self.keys, self.values = (
            x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values)
        )

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _without(self, held: Tensor, excess: int) -> Tensor:
        return torch.cat([held[..., : self.sinks, :], held[..., self.sinks + excess :, :]], dim=-2)

    # -- what transformers asks ----------------------------------------------------------------
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next `query_length` queries attend to, and the first's index.

        By index, the keys are the last so many of the sequence: with them the causal rule lets
        every query see all that is kept, and padding still held is where the 2-D mask has it.
        """
        kept = self.kept
        if query_length <= self.window:
            kept = min(kept, self.capacity - query_length)
        return kept + query_length, InCacheOffset(self.seen - kept)

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far, kept or not: where the next one's position is."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: a sequence may go on for ever."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys, self.values = None, None
        self.is_initialized = False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; impossible once any were dropped."""
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if count < 0 or count > self.seen or self.seen > self.kept:
            raise ModelError(
                f"The cache can't take back {count} tokens: it has dropped "
                f"{self.seen - self.kept} that would have to return. Assisted decoding needs a "
                "cache that keeps everything."
            )
        self.keys, self.values = (x[..., :-count, :] for x in self._held())
        self.seen -= count

    def _pick(self, index: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.index_select(0, index.to(x.device)) for x in self._held())
            self.pads, self.dropped = self.pads[index.cpu()], self.dropped[index.cpu()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on from what row beam_idx[b] holds."""
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch."""
        self._pick(torch.arange(len(self.pads))[indices.cpu()] if self.is_initialized else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold each row `repeats` times."""
        if self.is_initialized:
            self._pick(torch.arange(len(self.pads)).repeat_interleave(repeats))


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
    for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"streaming_cache({name}={value!r}): expected at least {least}.")
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
    turn = turns(model) if reindex else {}
    for i in plain:
        layers[i] = SinkWindowLayer(sinks, window, turn.get(i), pads)
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
