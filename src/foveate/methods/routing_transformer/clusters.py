"""Clusters as rows for the core op: gathered queries, gathered keys, and who sees whom.

A query that is in several clusters has one row in each, because its outputs there are averaged,
not merged by their lse; so queries are gathered here, and keys by the layout's own index. Each
cluster has whole tiles of its own, and each key tells which of its cluster's rows see it. With
members in rising order that is the lower triangle (sequence form), or the rows from the key's own
to the one that pushes it out (prefix form).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.routing_transformer.members import Stay, best, packed, streamed
from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.core import FULL, ROW_RANGE

_TILE = 128


class Clusters(NamedTuple):
    """Rows and keys of all clusters of each head; B batch, H query heads, C clusters.

    rows (B, H, C, R) index of the query, -1 for none; keys (B, H, C, K) index of the key, -1 for
    none; first, last (B, H, C, K): row r of the cluster sees the key if first <= r < last; and not
    its own key if `hole`, unless it is the cluster's only one.
    """

    rows: Tensor
    keys: Tensor
    first: Tensor
    last: Tensor
    hole: bool = False


def gather_clusters(
    query_scores: Tensor,
    key_scores: Tensor | None,
    counts: tuple[int, int],
    real: tuple[Tensor | None, Tensor | None],
    *,
    causal: bool,
    prefix: bool,
    own: bool,
) -> Clusters:
    """Who is in which cluster, and sees whom there.

    Args:
        query_scores: (B, H, C, Lq) fp32 or wider.
        key_scores: (B, H, C, Lkv); None where keys are the queries.
        counts: w, members of a cluster among the queries, and among the keys.
        real: bool (B or 1, L) of queries and keys, False on padding; None is all real.
        causal: whether a query sees no later key.
        prefix: members as they were at each query's place; causal only.
        own: whether a query sees its own key; False leaves it to queries that have no other.
    """
    q_real, k_real = (None if x is None else x[:, None, None] for x in real)
    lengths = query_scores.shape[-1:]
    q_stay = _members(query_scores, counts[0], q_real, prefix)
    k_stay = q_stay
    if key_scores is not None:
        k_stay = _members(key_scores, counts[1], k_real, prefix)
    if causal:
        return gather_stays(q_stay, k_stay, lengths[0], own=own or counts[1] == 1)
    rows, keys = q_stay.place, k_stay.place
    first = torch.zeros_like(keys)
    total = (rows >= 0).sum(-1, keepdim=True) * (keys >= 0)
    return Clusters(rows, keys, first, total, hole=key_scores is None and not own)


def gather_stays(queries: Stay, keys: Stay, length: int, *, own: bool) -> Clusters:
    """Causal clusters: a key is seen from its own place until it is no member any more.

    Args:
        queries: members among the queries, (B, H, C, R).
        keys: members among the keys, (B, H, C, K).
        length: Lq, also the number of keys.
        own: whether a query sees its own key beside others.
    """
    rows, there = queries.place, keys.place >= 0
    # Slots without a query are put behind all, to be found by a search.
    places = torch.where(rows >= 0, rows, length).contiguous()
    first = torch.searchsorted(places, keys.place.contiguous())
    last = torch.searchsorted(places, keys.until.contiguous())
    if not own:
        # The first member has no other key than its own.
        mine = places.gather(-1, first.clamp_max(places.shape[-1] - 1)) == keys.place
        later = torch.arange(there.shape[-1], device=rows.device) > 0
        first = first + (mine & later)
    return Clusters(rows, keys.place, first * there, last * there)


def _members(scores: Tensor, count: int, real: Tensor | None, prefix: bool) -> Stay:
    if prefix:
        return streamed(scores, count, real)[0]
    place = best(scores, count, real)
    return Stay(place, torch.full_like(place, scores.shape[-1]))


def in_tiles(clusters: Clusters) -> tuple[Clusters, int]:
    """The clusters with rows and keys filled up to whole tiles, and the tile.

    Where many keys came and went, rows are cut into pieces of one tile with their own keys first.
    """
    height = clusters.rows.shape[-1]
    each = -(-height // -(-height // _TILE))
    tile = -(-each // 8) * 8
    if clusters.keys.shape[-1] > 2 * _TILE and _come_and_go(clusters):
        tile = _TILE
        clusters = by_rows(clusters, tile)

    def fill(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % tile), value=value)

    return Clusters(
        fill(clusters.rows, -1),
        fill(clusters.keys, -1),
        fill(clusters.first, 0),
        fill(clusters.last, 0),
        clusters.hole,
    ), tile


def _come_and_go(clusters: Clusters) -> bool:
    """Whether some key is pushed out before its cluster's last row."""
    total = (clusters.rows >= 0).sum(-1, keepdim=True)
    return bool(((clusters.last < total) & (clusters.last > 0)).any())


def by_rows(clusters: Clusters, size: int) -> Clusters:
    """The clusters cut into pieces of `size` rows, each with those keys alone that its rows see.

    Members of prefixes come and go: of all that ever were, a piece sees at most w + size.
    """
    rows, keys, first, last, _ = clusters
    batch, heads, count, height = rows.shape
    pieces = -(-height // size)
    rows = torch.nn.functional.pad(rows, (0, pieces * size - height), value=-1)
    top = torch.arange(pieces, device=rows.device)[:, None] * size
    lo, hi = (x[:, :, :, None] - top for x in (first, last))  # (B, H, C, pieces, K)
    seen = (lo < size) & (hi > 0) & (hi > lo)
    at = packed(seen, max(1, int(seen.sum(-1).max())))
    there, at = at >= 0, at.clamp_min(0)

    def pick_keys(x: Tensor) -> Tensor:
        return x.expand_as(seen).gather(-1, at).flatten(2, 3)

    there = there.flatten(2, 3)
    return Clusters(
        rows.view(batch, heads, count * pieces, size),
        pick_keys(keys[:, :, :, None]).masked_fill(~there, -1),
        pick_keys(lo).clamp_min(0) * there,
        pick_keys(hi).clamp_max(size) * there,
    )


def cluster_layout(clusters: Clusters, tile: int, kv_len: int) -> Layout:
    """The layout of the gathered rows, (B, H, C * R), on Lkv keys.

    Tiles in which no row sees a key aren't visited.

    Args:
        clusters: filled up to whole tiles.
        tile: rows and keys of a tile.
        kv_len: number of keys that `clusters.keys` names.
    """
    rows, keys, first, last, hole = clusters
    batch, heads, count, height = rows.shape
    tall, wide = height // tile, keys.shape[-1] // tile
    device = rows.device
    top = torch.arange(tall, device=device)[:, None] * tile
    real = (rows >= 0).view(batch, heads, count, tall, 1, tile).all(-1)
    seen = (last > first).view(batch, heads, count, 1, wide, tile)
    lo = first.view(batch, heads, count, 1, wide, tile)
    hi = last.view(batch, heads, count, 1, wide, tile)
    big = torch.iinfo(torch.int64).max
    visit = (lo.masked_fill(~seen, big).amin(-1) < top + tile) & (
        hi.masked_fill(~seen, -1).amax(-1) > top
    )
    full = seen.all(-1) & real & (lo.amax(-1) <= top) & (hi.amin(-1) >= top + tile)
    kinds = torch.where(full, FULL, ROW_RANGE)
    bits = torch.zeros(0, tile, tile // 8, dtype=torch.uint8, device=device)
    if hole:
        apart = ~torch.eye(tile, dtype=torch.bool, device=device)
        bits = bitset.pack(apart[None])
        several = ((keys >= 0).sum(-1) > 1)[..., None, None]
        diagonal = torch.eye(tall, wide, dtype=torch.bool, device=device)
        kinds = torch.where(diagonal & several, 1, kinds)
    counts = visit.sum(-1).reshape(batch * heads, -1)
    ends = counts.flatten().cumsum(0).view(batch * heads, -1)
    ptr = torch.cat((ends[:, :1] - counts[:, :1], ends), 1)
    across = torch.arange(count, device=device)[:, None, None] * wide
    cols = across + torch.arange(wide, device=device)
    offset = (torch.arange(count, device=device) * height)[:, None]
    ranges = torch.stack((first + offset, last + offset), -1)
    return Layout(
        q_len=count * height,
        kv_len=kv_len,
        q_tile=tile,
        kv_tile=tile,
        ptr=ptr.view(batch, heads, -1),
        cols=cols.expand_as(visit)[visit].int(),
        kinds=kinds[visit].int(),
        bits=bits,
        kv_index=keys.reshape(batch, heads, -1).int(),
        row_range=ranges.reshape(batch, heads, -1, 2).int(),
    )


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (B, H, L, D): (B, H, C * R, D); what stands where there is none doesn't count."""
    flat = x.reshape(-1, x.shape[3]).index_select(0, _flat(rows.clamp_min(0), x.shape[2]))
    return flat.view(*x.shape[:2], -1, x.shape[3])


def average(out: Tensor, saw: Tensor, rows: Tensor, length: int, eps: float) -> Tensor:
    """Each query's mean over its clusters: sum of its rows / (their number + eps), 0 without any.

    Args:
        out: (B, H, C * R, Dv).
        saw: (B, H, C * R) bool: whether the row saw a key; those that didn't don't count.
        rows: (B, H, C, R) index of the query, -1 for none.
        length: Lq.
        eps: added to the number.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    saw = saw & (rows.flatten(2) >= 0)
    index = _flat(rows.clamp_min(0), length)
    weight = saw.reshape(-1).to(wide)
    size = out.shape[0] * out.shape[1] * length
    number = weight.new_zeros(size).index_add(0, index, weight)
    # What didn't count may be anything but is finite: an empty row is 0.
    each = out.reshape(-1, out.shape[3]).to(wide) * weight[:, None]
    total = each.new_zeros(size, out.shape[3]).index_add(0, index, each)
    mean = total / (number + eps if eps else number.clamp_min(1))[:, None]
    return mean.view(*out.shape[:2], length, -1).to(out.dtype)


def _flat(rows: Tensor, length: int) -> Tensor:
    """Indices (B, H, C, R) of each head as those of all heads' rows behind each other, flat."""
    heads = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device)
    return (rows.reshape(len(heads), -1) + heads[:, None] * length).reshape(-1)


def with_memory(clusters: Clusters, kv_len: int, each: int) -> Clusters:
    """The clusters with `each` keys of their own in front, from kv_len on, seen by all rows."""
    rows, keys, first, last, hole = clusters
    if hole:
        raise InputError(
            "routing-transformer(memory=...): with keys that are the queries and a mask that isn't "
            "causal it isn't defined; expected own=True or shared=False."
        )
    count = rows.shape[2]
    places = torch.arange(kv_len, kv_len + count * each, device=rows.device).view(count, each)
    total = (rows >= 0).sum(-1, keepdim=True)
    return Clusters(
        rows,
        torch.cat((places.expand(*keys.shape[:2], -1, -1), keys), -1),
        torch.cat((first.new_zeros(*first.shape[:3], each), first), -1),
        torch.cat((total.expand(-1, -1, -1, each), last), -1),
    )
