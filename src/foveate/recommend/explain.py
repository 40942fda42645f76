"""Why an item was recommended: paths from the user to it, by the attention on their edges.

    user -- liked --> film -- director --> person -- inverse of director --> recommended film

A path's weight is the product of its edges' attention: with a weight of one for each layer's own
matrix that is how much of the item's vector flows to the user along it. Summed over all paths of n
steps it is the entry of A^n.  Wang et al. 2019, section 4.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.kgat.graph import Graph, contains, spans
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole


class Path(NamedTuple):
    """nodes (n + 1), the relation of each step (n), and the product of attention."""

    nodes: tuple[int, ...]
    relations: tuple[int, ...]
    weight: float


def paths(
    graph: Graph,
    attention: Tensor,
    start: int,
    end: int,
    steps: int = 3,
    most: int = 5,
    beam: int = 1_000_000,
) -> list[Path]:
    """The paths of up to `steps` edges from one node to another that weigh most.

    A path doesn't come back to its first node or pass its last one on the way.

    Args:
        graph: whose triples are walked from head to tail.
        attention: (E,) of its triples.
        start: a node, such as a user's.
        end: a node, such as users + item.
        steps: edges of a path, at most.
        most: how many paths.
        beam: paths that are looked at in a step, which bounds the memory: where there are more,
            those that weigh most so far are followed.

    Raises:
        InputError: a number is out of its range.
    """
    whole("paths", "steps", steps, least=1)
    whole("paths", "most", most, least=1)
    whole("paths", "beam", beam, least=1)
    for name, node in (("start", start), ("end", end)):
        if not 0 <= node < graph.nodes:
            raise InputError(f"paths({name}={node}): the graph has nodes 0 ... {graph.nodes - 1}.")
    if attention.shape != (len(graph),):
        raise InputError(
            f"paths: expected the attention of {len(graph)} triples, got {tuple(attention.shape)}."
        )
    attention = attention.detach().double()
    edges = torch.empty(1, 0, dtype=torch.int64)  # of each partial path
    at, weight = torch.tensor([start]), torch.ones(1, dtype=torch.float64)
    found: list[tuple[float, list[int]]] = []
    before_end = graph.head[graph.tail == end].unique()
    for step in range(steps):
        if step == steps - 1:  # only what is next to the end can reach it
            near = contains(before_end, at)
            edges, at, weight = edges[near], at[near], weight[near]
        count = graph.start[at + 1] - graph.start[at]
        if int(count.sum()) > beam:
            order = weight.argsort(descending=True, stable=True)
            kept = order[: max(1, int((count[order].cumsum(0) <= beam).sum()))]
            edges, at, weight, count = edges[kept], at[kept], weight[kept], count[kept]
        edge, row = spans(graph.start[at], count), torch.repeat_interleave(count)
        tail = graph.tail[edge]
        fits = tail != start
        edge, row, tail = edge[fits], row[fits], tail[fits]
        edges = torch.cat((edges[row], edge[:, None]), 1)
        weight = weight[row] * attention[edge]
        there = tail == end
        best = weight[there].topk(min(most, int(there.sum())))
        found += zip(best.values.tolist(), edges[there][best.indices].tolist())
        edges, at, weight = edges[~there], tail[~there], weight[~there]
    found.sort(key=lambda one: -one[0])
    return [
        Path(
            (start, *(int(graph.tail[e]) for e in taken)),
            tuple(int(graph.relation[e]) for e in taken),
            value,
        )
        for value, taken in found[:most]
    ]
