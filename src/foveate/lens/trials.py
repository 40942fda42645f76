"""Which pattern each head could run: candidates tried on its own queries, keys and values.

For head h of a layer, with o its dense output and o' the candidate's, W its part of the map out of
the heads and x the residual stream,

    harm_h = mean over tokens t of ||(o'_t - o_t) W^T||^2 / ||x_t||^2,

what the candidate does to the stream that the head writes to. The cost is the area of the tiles
that it visits, over dense attention's. The assignment is the one of least total harm whose mean
cost is within a budget: by a price on area, as small as the budget allows, at which each head picks
for itself (Lagrange), and what then is left of the budget is spent where it helps most.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.methods import make_attention, spec, split
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.parts import Context, Pattern
from foveate.parts.attention import mask_layout

FULL = "full"


def candidates(text: str | None, length: int) -> tuple[str, ...]:
    """The patterns that heads choose from; "full" is always among them.

    Args:
        text: comma-separated patterns; None is windows with sinks, and lines, in several sizes.
        length: tokens of the inputs.

    Raises:
        InputError: a method that no layout tells, or that drops keys from the cache.
    """
    if text is None:
        sizes = [w for w in (64, 128, 256, 512, 1024, 2048, 4096) if w < length]
        found = [f"sink-window(sinks=4, window={w})" for w in sizes]
        found += [
            f"vertical-slash(verticals={n}, slashes={n})" for n in (100, 200, 400) if 4 * n < length
        ]
    else:
        found = split(text)
    for name in found:
        method = make_attention(name)
        if not isinstance(method, Pattern) or method.evicts:
            raise InputError(
                f"--candidates: {name} isn't told by a layout, so heads can't be tried on it; take "
                "patterns such as sink-window, a-shape, vertical-slash or block-sparse."
            )
    return tuple(dict.fromkeys([*(spec(make_attention(name)) for name in found), FULL]))


@dataclass(frozen=True)
class Trial:
    """A candidate on the heads of a layer: cost 0 to 1 and harm of each head."""

    cost: list[float]
    harm: list[float]


@torch.no_grad()
def tried(
    names: Sequence[str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    dense: AttentionOutput,
    weight: Tensor | None,
    stream: Tensor | None,
) -> dict[str, Trial]:
    """Each candidate on one layer.

    Args:
        names: candidates.
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D).
        v: (B, Hkv, L, Dv).
        ctx: of the call.
        dense: what full attention gave.
        weight: (dim, Hq Dv), the map out of the heads; None is the identity of each head.
        stream: (B, L), squared norms of the residual stream; None is those of the output.
    """
    heads, width = q.shape[1], v.shape[3]
    gram = None
    if weight is not None:
        parts = weight.detach().float().unflatten(1, (heads, width)).transpose(0, 1)
        gram = parts.mT @ parts  # (Hq, Dv, Dv)
    if stream is None:
        stream = _energy(dense.out.float(), gram).sum(1)
    whole = mask_layout(ctx.mask, q, k, ctx)
    found = {}
    for name in names:
        if name == FULL:
            found[name] = Trial([1.0] * heads, [0.0] * heads)
            continue
        told: list[Any] = []
        own = replace(ctx, store={}, stats=lambda **said: told.append(said["layout"]))  # noqa: B023
        out = make_attention(name)(q, k, v, own).out
        off = _energy(out.float() - dense.out.float(), gram)
        harm = (off / stream.clamp_min(1e-20)[:, None]).mean((0, 2))
        found[name] = Trial(_areas(told[0], whole.tile_area, heads), harm.tolist())
    return found


def _energy(o: Tensor, gram: Tensor | None) -> Tensor:
    """Squared norms of o (B, Hq, L, Dv), mapped: (B, Hq, L)."""
    if gram is None:
        return o.square().sum(-1)
    return ((o @ gram) * o).sum(-1).clamp_min(0)


def _areas(layout: Any, dense: float, heads: int) -> list[float]:
    """The cost of each head, mean over the batch."""
    batches, groups = layout.groups
    if groups in (1, 0):
        return [float(layout.tile_area) / dense] * heads
    ptr = layout.ptr.reshape(batches, groups, -1)
    counts = (ptr[..., -1] - ptr[..., 0]).double().mean(0)
    share = counts / counts.mean().clamp_min(1e-30) * float(layout.tile_area) / dense
    return share.repeat_interleave(heads // groups).tolist()


@dataclass(frozen=True)
class Choice:
    """Patterns of all heads: total harm, mean cost, and by layer each head's candidate."""

    harm: float
    cost: float
    heads: dict[int, list[str]]


def uniform(trials: dict[int, dict[str, Trial]], name: str) -> Choice:
    """All heads on one candidate."""
    return _sum(trials, {layer: [name] * len(of[name].cost) for layer, of in trials.items()})


def best_uniform(trials: dict[int, dict[str, Trial]], budget: float) -> str | None:
    """The candidate of least harm whose mean cost is within the budget; None if none is."""
    names = next(iter(trials.values()))
    every = {name: uniform(trials, name) for name in names}
    within = [name for name, one in every.items() if one.cost <= budget]
    return min(within, key=lambda name: every[name].harm, default=None)


def assigned(trials: dict[int, dict[str, Trial]], budget: float) -> Choice:
    """The assignment of least harm within a budget of mean cost.

    Raises:
        InputError: even the cheapest candidates cost more.
    """
    items = [
        (layer, head, [(name, t.cost[head], t.harm[head]) for name, t in of.items()])
        for layer, of in trials.items()
        for head in range(len(next(iter(of.values())).cost))
    ]
    least = sum(min(cost for _, cost, _ in options) for _, _, options in items) / len(items)
    if least > budget:
        raise InputError(
            f"--budget {budget}: the cheapest candidates visit {least:.3f} of dense attention's "
            "tiles; give a larger budget or smaller candidates."
        )

    def at(price: float) -> list[int]:
        return [
            min(range(len(o)), key=lambda i: (o[i][2] + price * o[i][1], o[i][1]))
            for _, _, o in items
        ]

    def spent(picks: list[int]) -> float:
        return sum(o[i][1] for (_, _, o), i in zip(items, picks)) / len(items)

    # Prices at which a head changes its mind lie between these two on any data.
    prices = sorted(
        {
            max(0.0, (a[2] - b[2]) / (b[1] - a[1]))
            for _, _, o in items
            for a in o
            for b in o
            if b[1] > a[1]
        }
    )
    prices = [0.0, *prices, (prices[-1] if prices else 0.0) * 2 + 1.0]
    first = bisect.bisect_left(prices, True, key=lambda price: spent(at(price)) <= budget)
    picks = at(prices[min(first, len(prices) - 1)])
    left = budget * len(items) - spent(picks) * len(items)
    while True:  # spend what is left where it takes away the most harm for its area
        gains = [
            ((o[picks[n]][2] - o[i][2]) / (o[i][1] - o[picks[n]][1]), n, i)
            for n, (_, _, o) in enumerate(items)
            for i in range(len(o))
            if 0 < o[i][1] - o[picks[n]][1] <= left and o[i][2] < o[picks[n]][2]
        ]
        if not gains:
            break
        _, n, i = max(gains)
        left -= items[n][2][i][1] - items[n][2][picks[n]][1]
        picks[n] = i
    heads: dict[int, list[str]] = {}
    for (layer, _, o), i in zip(items, picks):
        heads.setdefault(layer, []).append(o[i][0])
    return _sum(trials, heads)


def fitting(trials: dict[int, dict[str, Trial]], budget: float) -> dict[int, list[str]]:
    """For each head on its own the candidate of least harm that costs no more than the budget."""
    return {
        layer: [
            min(
                (name for name, t in of.items() if t.cost[head] <= budget),
                key=lambda name: of[name].harm[head],  # noqa: B023
                default=FULL,
            )
            for head in range(len(next(iter(of.values())).cost))
        ]
        for layer, of in trials.items()
    }


def _sum(trials: dict[int, dict[str, Trial]], heads: dict[int, list[str]]) -> Choice:
    pairs = [
        (trials[layer][name].harm[h], trials[layer][name].cost[h])
        for layer, names in heads.items()
        for h, name in enumerate(names)
    ]
    return Choice(sum(h for h, _ in pairs), sum(c for _, c in pairs) / len(pairs), heads)


def mean(many: list[dict[int, dict[str, Trial]]]) -> dict[int, dict[str, Trial]]:
    """Trials of several inputs as one, costs and harms averaged."""

    def over(lists: list[list[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*lists, strict=True)]

    return {
        layer: {
            name: Trial(
                over([one[layer][name].cost for one in many]),
                over([one[layer][name].harm for one in many]),
            )
            for name in of
        }
        for layer, of in many[0].items()
    }


def as_assignment(heads: dict[int, list[str]]) -> dict[str, Any]:
    """The file that `by-head` and `foveate.use` take."""
    layers: dict[str, Any] = {}
    for layer, names in sorted(heads.items()):
        if len(set(names)) == 1:
            layers[str(layer)] = names[0]
            continue
        layers[str(layer)] = {
            ",".join(str(h) for h, n in enumerate(names) if n == name): name
            for name in dict.fromkeys(names)
        }
    return {"foveate": 1, "default": FULL, "layers": layers}
