"""Learnable: direct is the query's own cluster, spans are all the other clusters.

Clusters as in the Routing Transformer (Roy et al. 2020, arXiv 2003.05997), for each key head: a
token belongs to the unit centroid nearest to its key's direction, and in training centroids move
to the mean of theirs. Under a causal mask everything is cut at i: a cluster's span is its prefix in
order of position, so each token has the summary of its cluster up to it, and a query sees of each
other cluster the last one before it. L (L / C + C) items with even clusters: O(L^1.5).

Tokens are taken in order of their clusters by row indices; of summaries a tile of queries lists its
own tokens' and the last of each cluster before them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from foveate.methods.combiner.call import Call
from foveate.methods.combiner.clustered import cluster_layout, summary_layout
from foveate.methods.combiner.partition import Partition, Parts
from foveate.methods.combiner.pooling import Pooling
from foveate.methods.combiner.state import Lane
from foveate.parts.attention import Heads
from foveate.parts.cache import Field


class Groups(NamedTuple):
    """The tokens of each (batch entry, key head) in order of cluster, then position.

    ids (B, Hkv, L) cluster by position; order (B, Hkv, L) position by place; low, high, of each
    place the first of its cluster's places and the one behind the last; counts (B, Hkv, C + 1) with
    padding as one more cluster.
    """

    ids: Tensor
    order: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor

    @property
    def place(self) -> Tensor:
        """(B, Hkv, L) place by position."""
        at = torch.arange(self.order.shape[2], device=self.order.device).expand_as(self.order)
        return torch.empty_like(self.order).scatter_(2, self.order, at)


class Learnable(Partition):
    """`clusters` centroids for each key head; see the module's text.

    Args:
        heads: sizes of the layer.
        queries: pools queries.
        keys: pools keys.
        clusters: C.
        momentum: share of a centroid that stays in each step of training.
    """

    centroids: Tensor

    def __init__(
        self, heads: Heads, queries: Pooling, keys: Pooling, clusters: int, momentum: float
    ) -> None:
        super().__init__(heads, queries, keys)
        self.clusters, self.momentum = clusters, momentum
        drawn = F.normalize(torch.randn(heads.kv, clusters, heads.key_dim), dim=-1)
        self.register_buffer("centroids", drawn)

    @torch.no_grad()
    def assign(self, k: Tensor) -> Tensor:
        """(B, Hkv, L) cluster of each key."""
        work = torch.promote_types(k.dtype, torch.float32)
        return (k.to(work) @ self.centroids.to(work).mT).argmax(-1)

    @torch.no_grad()
    def move(self, k: Tensor, ids: Tensor) -> None:
        """Move the centroids to the mean direction of their keys."""
        unit = F.normalize(k.to(self.centroids.dtype), dim=-1)
        one = F.one_hot(ids, self.clusters + 1)[..., : self.clusters].to(unit.dtype)
        total = (one.mT @ unit).sum(0)
        mean = F.normalize(total, dim=-1)
        moved = F.normalize(self.momentum * self.centroids + (1 - self.momentum) * mean, dim=-1)
        self.centroids.copy_(torch.where((one.sum((0, 2)) > 0)[..., None], moved, self.centroids))

    def groups(self, call: Call) -> Groups:
        """How the tokens of a call are clustered; the same for `direct` and `spans`."""
        if self not in call.memo:
            ids = self.assign(call.k)
            if call.seen is not None:
                ids = ids.masked_fill(~call.seen[:, None], self.clusters)
            call.memo[self] = _grouped(ids, self.clusters)
            if self.training and call.ctx.phase == "train" and torch.is_grad_enabled():
                self.move(call.k, ids)
        found: Groups = call.memo[self]
        return found

    @override
    def direct(self, call: Call) -> Parts:
        groups = self.groups(call)
        place = torch.arange(call.length, device=call.q.device)
        high = place + 1 if call.causal else groups.high
        layout = cluster_layout(groups, groups.low, high.expand_as(groups.low), queries=True)
        return [call.attend(call.q, call.k, call.v, layout=layout)]

    def prefixes(self, call: Call, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
        """k_S, u_S and length of each cluster's prefix up to each token, by place."""
        at = torch.arange(call.length, device=call.q.device)
        depth = at - groups.low
        longest = int(depth.max()) + 1
        k_s = _scan(self.keys, _by(call.k, groups.order), depth, longest)
        wide = groups._replace(order=call.each(groups.order), low=call.each(groups.low))
        deep = call.each(depth)
        q_s = _scan(self.queries, _by(call.q, wide.order), deep, longest)
        layout = cluster_layout(
            groups, groups.low, (at + 1).expand_as(groups.low), queries=False
        )  # fmt: skip
        return k_s, call.attend(q_s, call.k, call.v, layout=layout).out, depth + 1

    @override
    def spans(self, call: Call) -> Parts:
        groups = self.groups(call)
        k_s, u, count = self.prefixes(call, groups)
        if not call.causal:
            return self._whole(call, groups, k_s, u)
        place = groups.place
        key, value = call.each(_by(k_s, place)), _by(u, call.each(place))
        bias = call.span_bias(call.each(count.gather(2, place)))
        layout = summary_layout(groups, self.clusters)
        return [call.attend(call.q, key, value, layout=layout, bias=bias)]

    def _whole(self, call: Call, groups: Groups, k_s: Tensor, u: Tensor) -> Parts:
        """All other clusters, whole: what their last prefix says."""
        counts = groups.counts[..., : self.clusters]
        last = (groups.counts.cumsum(-1)[..., : self.clusters] - 1).clamp_min(0)
        key, value = call.each(_by(k_s, last)), _by(u, call.each(last))
        own = groups.ids[..., None] == torch.arange(self.clusters, device=last.device)
        seen = counts[:, :, None].masked_fill(own, 0)
        return [call.attend(call.q, key, value, bias=call.span_bias(call.each(seen)))]

    # -- decoding ------------------------------------------------------------------------------
    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        h, c = self.heads, self.clusters
        return (
            Field("k", "token", (h.kv, h.key_dim), None),
            Field("v", "token", (h.kv, h.value_dim), None),
            Field("ids", "token", (h.kv, 1), None),
            Field("q_sum", "sequence", (h.query, c, h.key_dim), None),
            Field("k_sum", "sequence", (h.kv, c, h.key_dim), None),
            Field("count", "sequence", (h.kv, c), None),
            Field("u", "sequence", (h.query, c, h.value_dim), None),
        )

    @override
    def fill(self, call: Call, lane: Lane) -> None:
        groups = self.groups(call)
        _, u, _ = self.prefixes(call, groups)
        for name, x in (("k", call.k), ("v", call.v), ("ids", groups.ids[..., None])):
            lane.append(name, x)
        last = (groups.counts.cumsum(-1)[..., : self.clusters] - 1).clamp_min(0)
        lane.put("u", _by(u, call.each(last)))
        lane.put("count", groups.counts[..., : self.clusters])
        for name, pool, x, ids in (
            ("q_sum", self.queries, call.q, call.each(groups.ids)),
            ("k_sum", self.keys, call.k, groups.ids),
        ):
            lane.put(name, _kept(pool, x, ids, self.clusters))

    @override
    def step_direct(self, call: Call, lane: Lane) -> Parts:
        own = self.assign(call.k)
        k, v = lane.append("k", call.k), lane.append("v", call.v)
        mine = lane.append("ids", own[..., None])[..., 0] == own
        most = int(mine.sum(-1).max())
        at = mine.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
        k, v = _by(k, at), _by(v, at)
        there = mine.gather(2, at)
        for name, x in (("own", own), ("own_k", k), ("own_v", v), ("own_there", there)):
            lane.put(name, x)
        return [call.attend(call.q, k, v, seen=call.each(there))]

    @override
    def step_spans(self, call: Call, lane: Lane) -> Parts:
        own, count, u, k_sum = (lane.get(name) for name in ("own", "count", "u", "k_sum"))
        if own is None or count is None or u is None or k_sum is None:
            return []
        others = count.scatter(2, own, 0)
        key = k_sum / count.clamp_min(1)[..., None] if self.keys.pool == "mean" else k_sum
        bias = call.span_bias(call.each(others)[:, :, None])
        return [call.attend(call.q, call.each(key), u, bias=bias)]

    @override
    def close(self, call: Call, lane: Lane) -> None:
        names = ("own", "own_k", "own_v", "own_there")
        own, k, v, there = (lane.get(name) for name in names)
        assert own is not None and k is not None and v is not None and there is not None
        count, u = lane.get("count"), lane.get("u")
        if count is None or u is None:
            shape = (*own.shape[:2], self.clusters)
            count = own.new_zeros(shape)
            u = call.v.new_zeros(len(own), call.q.shape[1], self.clusters, call.v.shape[3])
        before = count.gather(2, own)
        for name, pool, x, ids, n in (
            ("q_sum", self.queries, call.q, call.each(own), call.each(before)),
            ("k_sum", self.keys, call.k, own, before),
        ):
            held = lane.get(name)
            new = pool.features(x)
            if held is None:
                held = new.new_zeros(*new.shape[:2], self.clusters, new.shape[3])
            at = ids[..., None].expand(-1, -1, -1, new.shape[3])
            joined = torch.where(n[..., None] > 0, pool.joined(held.gather(2, at), new), new)
            lane.put(name, held.scatter(2, at, joined))
            if name == "q_sum":
                q_s = joined / (n[..., None] + 1) if pool.pool == "mean" else joined
                made = call.attend(q_s, k, v, seen=call.each(there)).out
                wide = ids[..., None].expand(-1, -1, -1, made.shape[3])
                lane.put("u", u.scatter(2, wide, made))
        lane.put("count", count.scatter(2, own, before + 1))
        lane.empty(*names)

    @override
    def items(self, length: int) -> tuple[int, int, int]:
        """With clusters as even as can be, their tokens taking turns."""
        c = self.clusters
        n, rest = divmod(length, c)
        direct = (c - rest) * n * (n + 1) // 2 + rest * (n + 1) * (n + 2) // 2
        early = min(length, c)
        spans = early * (early - 1) // 2 + (length - early) * (c - 1)
        return direct, spans, direct


def _grouped(ids: Tensor, clusters: int) -> Groups:
    order = ids.sort(dim=-1, stable=True).indices
    counts = torch.zeros(*ids.shape[:2], clusters + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(2, ids, torch.ones_like(ids))
    ends = counts.cumsum(-1)
    sorted_ids = ids.gather(2, order)
    return Groups(
        ids, order, (ends - counts).gather(2, sorted_ids), ends.gather(2, sorted_ids), counts
    )


def _by(x: Tensor, index: Tensor) -> Tensor:
    """Take x (B, H, L, W) at index (B, H, n): (B, H, n, W)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def _scan(pool: Pooling, x: Tensor, depth: Tensor, longest: int) -> Tensor:
    """Prefixes of clusters, x (B, H, L, W) by place: each place with all `depth` before it.

    A scan by doubling: after step t each place holds the last 2^t of them.
    """
    x = pool.features(x)
    step = 1
    while step < longest:
        before = F.pad(x[:, :, :-step], (0, 0, step, 0))
        x = torch.where((depth >= step)[..., None], pool.joined(before, x), x)
        step *= 2
    return x / (depth + 1)[..., None] if pool.pool == "mean" else x


def _kept(pool: Pooling, x: Tensor, ids: Tensor, clusters: int) -> Tensor:
    """What `Pooling.kept` is of each cluster, 0 for an empty one: (B, H, C, W)."""
    x = pool.features(x)
    at = ids[..., None].expand_as(x)
    empty = x.new_zeros(*x.shape[:2], clusters, x.shape[3])
    how = "amax" if pool.pool == "max" else "sum"
    return empty.scatter_reduce(2, at, x, how, include_self=how == "sum")
