"""From what an attention layer is handed as its mask to a foveate mask, with positions.

Whatever is understood (causal, sliding windows, chunks, padding on either side, packed sequences,
static and sliding caches) becomes a rule on positions, which costs nothing to hold. Whatever isn't
becomes the exact boolean table, `blocks(table, 1)`. Nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from foveate.hf.errors import ModelError
from foveate.hf.masks import InCacheOffset, LazyMask, Request
from foveate.hf.recognise import Padding, Rule, contiguous
from foveate.ops import Mask, blocks, causal, padding, prefix, window

_FOREVER = 2**40


@dataclass(frozen=True)
class View:
    """What one attention call may see.

    mask: over positions; None is everything.
    q_positions, kv_positions: (B, L) or (L,) int64, or None for the default (the queries stand
        at the end of the keys, counted from 0). With left padding they count from each row's first
        real token, so that a rule on the first tokens means real ones.
    kv_len: number of keys to keep; those behind are hidden from every query.
    bias: added to the scores, broadcastable to (B, Hq, Lq, Lkv), or None.
    table: the boolean table that `mask` holds, (B or 1, H or 1, Lq, Lkv), or None.
    documents: (B, L) ids of packed sequences, where `mask` holds only within one; or None.
    """

    mask: Mask | None
    kv_len: int
    q_positions: Tensor | None = None
    kv_positions: Tensor | None = None
    bias: Tensor | None = None
    table: Tensor | None = None
    documents: Tensor | None = None

    def heads(self, index: Tensor, count: int) -> View:
        """The same for some of `count` query heads only."""
        table, bias = self.table, self.bias
        if bias is not None and bias.shape[1] > 1:
            bias = bias[:, index]
        if table is None or table.shape[1] == 1:
            return replace(self, bias=bias)
        if count % table.shape[1]:
            raise ModelError(
                f"The attention mask has {table.shape[1]} heads, but the layer has {count}; a mask "
                "has one for all, or as many as the layer."
            )
        table = table[:, index // (count // table.shape[1])]
        return replace(self, mask=blocks(table, 1), table=table, bias=bias)


def view_of(
    given: object, *, q_len: int, kv_len: int, is_causal: bool, sliding_window: int | None
) -> View:
    """What a call may see, from the mask it was handed.

    Args:
        given: a LazyMask of ours; a 4-D (or 3-D) bool or additive float tensor; a 2-D padding mask
            (B, Lkv); a FlexAttention BlockMask; or None.
        q_len: number of queries.
        kv_len: number of keys.
        is_causal: what None means.
        sliding_window: window of a causal layer, where no mask says it.

    Raises:
        ModelError: the mask doesn't fit the lengths, or is of a kind that isn't known.
    """
    if given is None:
        # One query is the newest token: it stands at the end and sees every key.
        if not is_causal:
            return View(None, kv_len)
        mask: Mask = causal()
        if sliding_window is not None:
            mask = mask & window(sliding_window - 1, -1)
        if kv_len > q_len > 1:
            # Only a static cache that was empty is handed over like this (see SDPA's is_causal).
            return View(mask, q_len)
        return View(mask, kv_len)
    if isinstance(given, LazyMask) and given.request is not None:
        _fits(given, q_len, kv_len)
        if given.contents is not None:
            return _answer(given.request, given.contents)
        if given.view is None:
            given.view = _answer(given.request, None)
        view: View = given.view
        return view
    if isinstance(given, BlockMask):
        batch, heads = given.shape[0], given.shape[1]
        table = create_mask(
            given.mask_mod, batch, heads, q_len, kv_len, device=str(given.kv_indices.device)
        )
        return _table(table, q_len)
    if isinstance(given, Tensor):
        return _tensor(given, q_len, kv_len, is_causal)
    raise ModelError(
        f"The layer was handed a mask of type {type(given).__name__}; expected a boolean or an "
        "additive tensor (B, 1 or H, Lq, Lkv), a padding mask (B, Lkv), a BlockMask or None."
    )


def _fits(mask: Tensor, q_len: int, kv_len: int) -> None:
    if mask.shape[-1] != kv_len or mask.shape[-2] not in (q_len, 1):
        raise ModelError(
            f"The attention mask is for {mask.shape[-2]} queries and {mask.shape[-1]} keys, but "
            f"the layer has {q_len} and {kv_len}. If you passed it, make it match; if the model "
            "made it, its cache and its mask disagree."
        )


# -- masks that transformers asked us for ------------------------------------------------------
def _answer(request: Request, contents: Tensor | None) -> View:
    offset = 0 if isinstance(request.kv_offset, InCacheOffset) else request.kv_offset
    present = request.present
    if present is not None:
        end = request.kv_offset + request.kv_len
        present = torch.nn.functional.pad(present, (0, max(0, end - present.shape[1])))[:, :end]
        if isinstance(request.kv_offset, InCacheOffset):
            if not request.kv_offset.padding_known and not bool(
                present[:, : request.kv_offset].all()
            ):
                raise ModelError(
                    "The batch is padded on the left, but its streaming cache wasn't told so and "
                    "has kept padding as sinks; make it with streaming_cache(model, ..., "
                    "attention_mask=mask)."
                )
            present = present[:, request.kv_offset :]
    q_start = request.q_offset - (request.kv_offset - offset)
    # From here on, keys are offset ... offset + kv_len - 1, queries q_start ..., and `present`
    # (if any) tells of 0 ... offset + kv_len - 1.
    rule = request.rule
    kv_len = request.kv_len
    if rule is not None and rule.causal and contents is None:
        kv_len = max(1, min(kv_len, q_start + request.q_len - offset))
        present = None if present is None else present[:, : offset + kv_len]
    spans = None
    if present is not None and not bool(present.all()):
        spans = contiguous(present)
        if spans is None:
            rule = None
    in_cache = isinstance(request.kv_offset, InCacheOffset)
    if rule is not None and in_cache and rule.chunk_starts is not None:
        rule = None
    if rule is None or contents is not None or not _usable(rule, spans, offset, offset + kv_len):
        # A table's positions begin at its first key, so that behind a sliding cache's dropped keys
        # nothing is known of where a sequence began.
        table = request.dense() if contents is None else contents
        return _table(table, request.q_len, None if offset else _starts(present))
    mask = rule.mask
    inside: Mask
    if rule.documents is not None:
        return View(mask, kv_len, documents=rule.documents)
    if spans is None:
        if q_start + request.q_len == offset + kv_len and offset == 0:
            return View(mask, kv_len)
        if not rule.causal and rule.mask is None:
            return View(None, kv_len)
        shift = torch.zeros(1, dtype=torch.int64, device=request.device)
    else:
        shift = spans.starts
        aligned = q_start + request.q_len == kv_len and offset == 0
        if aligned and not bool(shift.any()):
            inside = padding(spans.ends.tolist())
            return View(inside if mask is None else mask & inside, kv_len)
        inside = prefix(_FOREVER) if offset else padding((spans.ends - shift).tolist())
        mask = inside if mask is None else mask & inside
    q_positions = _count(q_start, request.q_len, shift)
    kv_positions = _count(offset, kv_len, shift)
    return View(mask, kv_len, q_positions, kv_positions)


def _usable(rule: Rule, spans: Padding | None, offset: int, end: int) -> bool:
    """Whether positions counted from each row's first real token say what the rule says."""
    if spans is None:
        return rule.chunk_starts is None or not bool(rule.chunk_starts.any())
    if rule.documents is not None:
        return False
    if rule.chunk_starts is not None and not torch.equal(
        rule.chunk_starts.to(spans.starts), spans.starts
    ):
        return False
    # Keys that a sliding cache has dropped leave positions beyond the number of keys, for which
    # only "a real token" can be said, not "no later than the last".
    return offset == 0 or (rule.causal and bool((spans.ends == end).all()))


def _count(start: int, length: int, shift: Tensor) -> Tensor:
    index = torch.arange(start, start + length, device=shift.device)
    return index[None] - shift[:, None]


def _starts(present: Tensor | None) -> Tensor | None:
    """Where each row's first real token stands, from its padding mask."""
    if present is None or bool(present[:, 0].all()):
        return None
    return present.int().argmax(1)


# -- masks as tensors --------------------------------------------------------------------------
def _tensor(given: Tensor, q_len: int, kv_len: int, is_causal: bool) -> View:
    if isinstance(given, LazyMask):
        given = given.opened()
    if given.dim() == 2 and given.shape[-1] == kv_len and not given.is_floating_point():
        table = given.bool()[:, None, None, :].expand(-1, 1, q_len, -1)
        if is_causal and q_len > 1:
            table = table & causal().dense(q_len, kv_len, device=given.device)
        return _table(table, q_len)
    if given.dim() == 3:
        given = given[:, None]
    if given.dim() != 4:
        raise ModelError(
            f"The attention mask has shape {tuple(given.shape)}; expected (B, 1 or H, Lq, Lkv), or "
            "(B, Lkv) integers or booleans for padding."
        )
    if given.shape[-1] == 1 and kv_len > 1:
        given = given.expand(-1, -1, -1, kv_len)
    _fits(given, q_len, kv_len)
    given = given.expand(-1, -1, q_len, -1)
    if given.dtype == torch.bool:
        return _table(given, q_len)
    if not given.is_floating_point():
        raise ModelError(
            f"The attention mask is {given.dtype}; expected booleans (True = attend) or floats "
            "that are added to the scores."
        )
    table = given > torch.finfo(given.dtype).min / 2
    if not given.requires_grad and not bool((given.masked_fill(~table, 0.0) != 0).any()):
        return _table(table, q_len)
    view = _table(table, q_len)
    return replace(view, bias=given.masked_fill(~table, 0.0)[..., : view.kv_len])


def _table(table: Tensor, q_len: int, starts: Tensor | None = None) -> View:
    """A view of a boolean table (B or 1, H or 1, Lq, Lkv), its queries at the end of its keys.

    Keys at the end that nobody sees (of a static cache, say) are cut off, so that the queries do
    stand at the end. With `starts` (B,), positions count from each row's first real token, and
    the table is moved along.
    """
    seen = table.flatten(0, 2).any(0)
    kept = int(seen.nonzero()[-1]) + 1 if bool(seen.any()) else 1
    kv_len = min(table.shape[-1], max(kept, q_len))
    table = table[..., :kv_len]
    if bool(table.all()):
        return View(None, kv_len)
    if starts is None or q_len > kv_len or not bool(starts.any()):
        return View(blocks(table, 1), kv_len, table=table)
    moved = _moved(table, starts)
    if int(moved.sum()) * len(table) != int(table.sum()) * len(moved):
        # Something is seen from or at the padding, which has no position in a table.
        return View(blocks(table, 1), kv_len, table=table)
    return View(
        blocks(moved, 1),
        kv_len,
        _count(kv_len - q_len, q_len, starts),
        _count(0, kv_len, starts),
        table=moved,
    )


def _moved(table: Tensor, starts: Tensor) -> Tensor:
    """The table by positions that count from starts[b]: row and column p hold index p + starts[b].

    Its last row stands for the last column, as `blocks` has it; rows are added in front so that
    each query's position has one.
    """
    batch, heads, q_len, kv_len = table.shape
    batch = max(batch, len(starts))
    rows = min(kv_len, q_len + int(starts.max()))
    row = torch.arange(rows, device=table.device) + (kv_len - rows) + starts[:, None]
    row = row - (kv_len - q_len)
    col = torch.arange(kv_len, device=table.device) + starts[:, None]
    inside = ((row >= 0) & (row < q_len))[:, None, :, None] & (col < kv_len)[:, None, None, :]
    table = table.expand(batch, heads, q_len, kv_len)
    row = row.clamp(0, q_len - 1)[:, None, :, None].expand(batch, heads, rows, kv_len)
    col = col.clamp(0, kv_len - 1)[:, None, None, :].expand(batch, heads, rows, kv_len)
    return table.gather(2, row).gather(3, col) & inside
