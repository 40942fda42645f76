"""What tests compare with: masks as plain predicates, and attention in float64, pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import (
    Mask,
    causal,
    documents,
    padding,
    prefix,
    region,
    sinks,
    strided,
    window,
)

Predicate = Callable[[int, int, int], bool]  # (query position, key position, batch entry)


def table(predicate: Predicate, q_len: int, kv_len: int, batch: int = 1) -> Tensor:
    """The predicate element by element, bool (batch, 1, q_len, kv_len), aligned at the end."""
    shift = kv_len - q_len
    rows = [
        [[predicate(i + shift, j, b) for j in range(kv_len)] for i in range(q_len)]
        for b in range(batch)
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(batch, 1, q_len, kv_len)


def by_distance(bias: Tensor, first: int, q_len: int, kv_len: int) -> Tensor:
    """A relative bias (.., .., 1 or Lq, R) pair by pair, distances beyond its ends at the ends."""
    last = bias.shape[-1] - 1
    rows = []
    for i in range(q_len):
        own = bias[:, :, i if bias.shape[2] > 1 else 0]
        distances = [j - (i + kv_len - q_len) for j in range(kv_len)]
        rows.append(own[..., [min(max(d - first, 0), last) for d in distances]])
    return torch.stack(rows, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition in float64: sums of exponentials, no maximum taken off."""
    q, k, v = query.double(), key.double(), value.double()
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // group] for h in range(q.shape[1])], 1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    weights = scores.exp() * allowed.double()
    total = weights.sum(-1)
    if sink_logits is not None:
        total = total + sink_logits.double().exp()[None, :, None]
    safe = torch.where(total > 0, total, torch.ones_like(total))
    out = torch.einsum("bhij,bhjd->bhid", weights, v) / safe[..., None]
    return out, torch.where(total > 0, safe.log(), torch.full_like(safe, -torch.inf))


def leaves(kv_len: int) -> st.SearchStrategy[tuple[Mask, Predicate]]:
    """Single masks for `kv_len` keys, each beside its predicate."""
    n = st.integers(0, kv_len + 3)
    side = st.integers(-1, kv_len)
    block = st.integers(1, 9)

    def near(left: int, right: int, b: int) -> Predicate:
        return lambda i, j, _: (
            (left < 0 or j // b >= i // b - left) and (right < 0 or j // b <= i // b + right)
        )

    def packed(cuts: list[int]) -> tuple[Mask, Predicate]:
        bounds = [0, *sorted(cuts), kv_len]
        which = [sum(c <= p for c in bounds) for p in range(kv_len)]
        return documents(bounds), lambda i, j, _: i >= 0 and which[i] == which[j]

    def lines(stride: int, phase: int, axis: str) -> tuple[Mask, Predicate]:
        at = {"key": lambda i, j: j, "query": lambda i, j: i, "offset": lambda i, j: i - j}[axis]
        phase %= stride
        return strided(stride, phase, axis), lambda i, j, _: at(i, j) % stride == phase

    def box(q: list[int], k: list[int], inner: bool) -> tuple[Mask, Predicate]:
        (q0, q1), (k0, k1) = sorted(q), sorted(k)
        mask = region(causal() if inner else None, (q0, q1), (k0, k1))

        def seen(i: int, j: int, _: int) -> bool:
            inside = q0 <= i < q1 and k0 <= j < k1
            return inside and (not inner or k1 - 1 - j >= q1 - 1 - i)

        return mask, seen

    pair = st.lists(n, min_size=2, max_size=2)
    return st.one_of(
        st.just((causal(), lambda i, j, _: j <= i)),
        block.map(lambda b: (causal(block=b), lambda i, j, _: j // b <= i // b)),
        st.tuples(side, side).map(lambda t: (window(*t), near(*t, 1))),
        st.tuples(side, side, block).map(lambda t: (window(*t), near(*t))),
        n.map(lambda s: (sinks(s), lambda i, j, _: j < s)),
        n.map(lambda s: (prefix(s), lambda i, j, _: 0 <= i < s and j < s)),
        st.lists(st.integers(0, kv_len), max_size=4).map(packed),
        st.tuples(block, n, st.sampled_from(["key", "query", "offset"])).map(lambda t: lines(*t)),
        st.tuples(pair, pair, st.booleans()).map(lambda t: box(*t)),
        st.lists(st.integers(0, kv_len), min_size=2, max_size=2).map(
            lambda lengths: (padding(lengths), lambda i, j, b: j < lengths[b])
        ),
    )


def masks(kv_len: int) -> st.SearchStrategy[tuple[Mask, Predicate]]:
    """Masks of any composition for `kv_len` keys, each beside its predicate."""

    def combine(
        children: st.SearchStrategy[tuple[Mask, Predicate]],
    ) -> st.SearchStrategy[tuple[Mask, Predicate]]:
        def both(t: tuple[tuple[Mask, Predicate], tuple[Mask, Predicate]]):
            (m, p), (n, r) = t
            return m & n, lambda i, j, b: p(i, j, b) and r(i, j, b)

        def either(t: tuple[tuple[Mask, Predicate], tuple[Mask, Predicate]]):
            (m, p), (n, r) = t
            return m | n, lambda i, j, b: p(i, j, b) or r(i, j, b)

        two = st.tuples(children, children)
        return st.one_of(
            two.map(both),
            two.map(either),
            children.map(lambda t: (~t[0], lambda i, j, b: not t[1](i, j, b))),
        )

    return st.recursive(leaves(kv_len), combine, max_leaves=4)
