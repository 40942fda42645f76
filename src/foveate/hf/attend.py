"""The attention function that transformers' layers call while a model is in use.

It turns the layer's arguments into a Context, runs the method of that module (several, if heads
differ) and hands the output back in transformers' axes, (B, Lq, Hq, Dv).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from foveate.hf.assignment import HeadGroup
from foveate.hf.errors import ModelError
from foveate.hf.masks import InCacheOffset, LazyMask
from foveate.hf.places import Site
from foveate.hf.view import View, view_of
from foveate.methods import make
from foveate.ops import AttentionOutput, documents
from foveate.parts import Attention, Context, Pattern, Rope
from foveate.parts.by_heads import joined, key_heads, together
from foveate.parts.context import Phase
from foveate.parts.eviction import EvictingCache
from foveate.parts.tree import Tree

# Arguments of a layer that change the result and that nothing here knows how to honour.
_FOREIGN = {
    "cache": "a paged cache (continuous batching)",
    "sinks": "per-token sinks",
    "block_indices": "a block selection of the model's own",
}


@dataclass
class Running:
    """What the modules of one use share.

    Attributes:
        backend: the core op's backend.
        stats: called by patterns with what they built and how long it took; or None.
        store: what the layers of one forward share; a new dict for each forward.
        last: order of the module that ran last.
        modality: (B, L) of the tokens so far; None where the model has text alone.
        caches: of the modules that run now, the caches that drop keys.
        tree: over the tokens of the forward that runs; None where no method asked for one.
    """

    backend: str = "auto"
    stats: Callable[..., None] | None = None
    store: dict[Any, Any] = field(default_factory=dict)
    last: int = -1
    modality: Tensor | None = None
    caches: WeakKeyDictionary[nn.Module, EvictingCache] = field(default_factory=WeakKeyDictionary)
    tree: Tree | None = None

    def modality_of(self, kv_len: int) -> Tensor | None:
        """The modality of each key of a call; None if the call isn't about those tokens."""
        known = self.modality
        return None if known is None or known.shape[-1] != kv_len else known

    def enter(self, order: int) -> dict[Any, Any]:
        """The store for a module: modules run in order, so one that doesn't begins a forward."""
        if order <= self.last:
            self.store = {}
        self.last = order
        return self.store


@dataclass(frozen=True)
class Seat:
    """What one module runs, and for which use."""

    site: Site
    groups: list[HeadGroup]
    running: Running
    rope: Rope | None = None  # of its queries, where a method wants to know


SEATS: WeakKeyDictionary[nn.Module, Seat] = WeakKeyDictionary()

# Configs that a use has pointed at us, by id; whoever enters one keeps it alive.
HELD: dict[int, Any] = {}


@torch.compiler.disable
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What foveate registers with transformers' AttentionInterface.

    Args:
        module: the layer's attention module.
        query: (B, Hq, Lq, D), rotated.
        key: (B, Hkv, Lkv, D), rotated, not repeated.
        value: (B, Hkv, Lkv, Dv).
        attention_mask: what `foveate.hf.view.view_of` takes.
        dropout: probability of dropping a weight.
        scaling: factor on the scores, default D ** -0.5.
        is_causal: what no mask means; default: the module's own flag.
        kwargs: `sliding_window`, `softcap`, `s_aux` (learned sinks, (Hq,)) and `position_bias`
            (broadcastable to (B, Hq, Lq, Lkv)) count; weights (`output_attentions`) can't be had.

    Returns:
        The output, (B, Lq, Hq, Dv) contiguous, and None.

    Raises:
        ModelError: the call asks for something that can't be honoured, or comes from a copy of a
            model in use.
    """
    _refuse(module, kwargs)
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] != batch or key.shape[0] != batch:
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    causally = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    q_len = query.shape[2]
    seat = _seat(module)
    running = Running() if seat is None else seat.running
    cache = running.caches.pop(module, None)
    view = view_of(
        _own_mask(attention_mask, cache, key.shape[2]),
        q_len=q_len,
        kv_len=key.shape[2],
        is_causal=bool(causally),
        sliding_window=kwargs.get("sliding_window"),
    )
    if view.kv_len < key.shape[2]:
        key, value = key[:, :, : view.kv_len], value[:, :, : view.kv_len]
    bias = kwargs.get("position_bias")
    if bias is not None:
        bias = bias[..., : view.kv_len]
        view = replace(view, bias=bias if view.bias is None else bias + view.bias)
    if view.bias is not None:
        view = replace(view, bias=view.bias.expand(-1, -1, q_len, view.kv_len))

    groups = [HeadGroup(None, make("full"))] if seat is None else seat.groups
    context = Context(
        mask=view.mask,
        q_positions=view.q_positions,
        kv_positions=view.kv_positions,
        bias=view.bias,
        phase=_phase(module, q_len, view.kv_len),
        layer=seat.site.layer if seat is not None else getattr(module, "layer_idx", None) or 0,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        dropout=float(dropout),
        backend=running.backend,
        store=running.enter(seat.site.order) if seat is not None else {},
        stats=running.stats,
        modality=running.modality_of(view.kv_len),
        cache=cache,
        tree=running.tree,
        query_rope=_query_rope(seat, kwargs.get("position_ids"), q_len, view.kv_len, query.device),
    )
    out = _by_head(groups, query, key, value, view, context)
    return out.transpose(1, 2).contiguous(), None


def _own_mask(given: Tensor | None, cache: EvictingCache | None, kv_len: int) -> Tensor | None:
    """The mask for the keys that this layer has, where one of another layer was made for all."""
    if not isinstance(given, LazyMask) or given.request is None or given.contents is not None:
        return given
    request = given.request
    if cache is not None:
        offset = InCacheOffset(cache.seen - kv_len)
    elif isinstance(request.kv_offset, InCacheOffset) and (
        kv_len == request.q_offset + request.q_len
    ):
        offset = InCacheOffset(0)  # nothing was dropped here
    else:
        return given
    return given.for_keys(kv_len, offset)


def _query_rope(
    seat: Seat | None, position_ids: Tensor | None, q_len: int, kv_len: int, device: torch.device
) -> tuple[Rope, Tensor] | None:
    """How the layer turned its queries, and to which positions."""
    if seat is None or seat.rope is None:
        return None
    if position_ids is None or position_ids.shape[-1] != q_len:
        return seat.rope, torch.arange(kv_len - q_len, kv_len, device=device)
    return seat.rope, position_ids


def _seat(module: nn.Module) -> Seat | None:
    """What a module runs; None for one that only shares its config with a model in use."""
    seat = SEATS.get(module)
    if seat is None and id(getattr(module, "config", None)) not in HELD:
        raise ModelError(
            f"This {type(module).__name__} belongs to a copy of a model that was in use: its "
            "config says so, but no pattern was given for the copy. Call foveate.use(copy, "
            "pattern), or copy.set_attn_implementation('sdpa') to run it without foveate."
        )
    return seat


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    # A config can't ask for them: `use` has looked, and transformers refuses to set it later.
    if kwargs.get("output_attentions"):
        raise ModelError(
            "Attention weights were asked for (output_attentions=True), but they are never formed "
            "here. Leave foveate.use and call model.set_attn_implementation('eager') to get them."
        )
    for name, what in _FOREIGN.items():
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} passed {what} ({name}=), which foveate.use doesn't "
                "support; run this model with transformers' own attention."
            )


def _phase(module: nn.Module, q_len: int, kv_len: int) -> Phase:
    if module.training:
        return "train"
    return "decode" if q_len == 1 < kv_len else "prefill"


def _by_head(
    groups: list[HeadGroup], query: Tensor, key: Tensor, value: Tensor, view: View, ctx: Context
) -> Tensor:
    """Each group of query heads by its own method; (B, Hq, Lq, Dv)."""
    if len(groups) == 1 and groups[0].heads is None:
        return _by_document(groups[0].method, query, key, value, view, ctx)
    heads, shared = query.shape[1], query.shape[1] // key.shape[1]
    parts = [(group.heads or (), group.method) for group in groups]
    if ctx.phase == "decode" and view.documents is None:
        one = together(parts, query, key, ctx)
        if one is not None:
            return one(query, key, value, ctx).out
    fewer = joined(parts)
    if len(fewer) == 1 and list(fewer[0][0]) == list(range(heads)):
        return _by_document(fewer[0][1], query, key, value, view, ctx)
    out: Tensor | None = None
    for own, method in fewer:
        index = torch.tensor(own, device=query.device)
        kv_index = key_heads(own, shared)
        sinks = ctx.sink_logits
        theirs = view.heads(index, heads)
        part = _by_document(
            method,
            query[:, index],
            key[:, kv_index],
            value[:, kv_index],
            theirs,
            replace(
                ctx,
                mask=theirs.mask,
                bias=theirs.bias,
                sink_logits=None if sinks is None else sinks[index],
            ),
        )
        if out is None:
            out = part.new_empty(part.shape[0], heads, *part.shape[2:])
        out = out.index_copy(1, index, part)
    assert out is not None
    return out


def _by_document(
    method: Attention, query: Tensor, key: Tensor, value: Tensor, view: View, ctx: Context
) -> Tensor:
    """One method, on each packed sequence as if it stood alone; (B, Hq, Lq, Dv)."""
    mask, ids = view.mask, view.documents
    if ids is None:
        return _run(method, query, key, value, ctx)
    dense = isinstance(method, Pattern) and method.is_dense(query, key, ctx)
    if dense and bool((ids == ids[:1]).all()):
        counts = torch.unique_consecutive(ids[0], return_counts=True)[1]
        bounds = [0, *counts.cumsum(0).tolist()]
        together = documents(bounds) if mask is None else mask & documents(bounds)
        return _run(method, query, key, value, replace(ctx, mask=together))
    out = value.new_zeros(*query.shape[:3], value.shape[-1])
    for length, rows in _segments(ids).items():
        b = torch.tensor([r for r, _ in rows], device=query.device)[:, None]
        at = torch.tensor([s for _, s in rows], device=query.device)[:, None]
        at = at + torch.arange(length, device=query.device)
        pick = (b, slice(None), at)
        q, k, v = (x[pick].transpose(1, 2) for x in (query, key, value))
        bias = None
        if view.bias is not None:
            whole = view.bias.expand(len(ids), -1, -1, -1)
            bias = whole[b[..., None], :, at[:, :, None], at[:, None, :]].permute(0, 3, 1, 2)
        # Each stands alone, also in what its layers share.
        store = ctx.store.setdefault(("document", length), {})
        kinds = None if ctx.modality is None else ctx.modality[b, at]
        alone = replace(ctx, bias=bias, store=store, modality=kinds)
        part = _run(method, q, k, v, alone)
        out = out.index_put(
            (b[..., None], torch.arange(out.shape[1], device=b.device), at[..., None]),
            part.transpose(1, 2),
        )
    return out


def _segments(ids: Tensor) -> dict[int, list[tuple[int, int]]]:
    """Packed sequences by length: {length: [(row, start), ...]}."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row in range(ids.shape[0]):
        counts = torch.unique_consecutive(ids[row], return_counts=True)[1].tolist()
        start = 0
        for count in counts:
            found.setdefault(count, []).append((row, start))
            start += count
    return found


def _run(method: Attention, query: Tensor, key: Tensor, value: Tensor, ctx: Context) -> Tensor:
    result: AttentionOutput = method(query, key, value, ctx)
    return result.out
