"""Knowledge-aware attention (equations 3 to 5) and TransR (1, 2): the same translation in both.

    pi(h, r, t) = (e_t W_r) . tanh(e_h W_r + e_r)      softmax over ALL triples of head h
    g(h, r, t)  = || e_h W_r + e_r - e_t W_r ||^2      small where a triple is likely
    L_KG = - ln sigmoid(g(h, r, t') - g(h, r, t))      t' with (h, r, t') not in the graph

Probabilities are made for each triple and summed into the matrix afterwards: two triples of one
(head, tail) compete like any others. A softmax of a sparse tensor would sum their logits first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from foveate.methods.kgat.graph import Graph
from foveate.ops.errors import InputError

CHUNK = 1 << 16


def segment_softmax(logits: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Softmax of logits (E,) within each segment; differentiable.

    Args:
        logits: of any order.
        segment: (E,) int64, the segment of each.
        segments: how many there are; empty ones are fine.
    """
    most = torch.full((segments,), -torch.inf, dtype=logits.dtype, device=logits.device)
    most = most.scatter_reduce(0, segment, logits.detach(), "amax")
    exp = (logits - most[segment]).exp()
    return exp / exp.new_zeros(segments).index_add(0, segment, exp)[segment]


@torch.no_grad()
def edge_attention(
    nodes: Tensor, relations: Tensor, projections: Tensor, graph: Graph, chunk: int = CHUNK
) -> Tensor:
    """Each triple's probability among those of its head, (E,) in `nodes`' dtype; no gradient.

    Every node is projected once for each relation that it has; logits are made `chunk` at a time.

    Args:
        nodes: e (N, d).
        relations: e_r (R, k).
        projections: W_r (R, d, k), rows times it.
        graph: with N nodes and R relations.
        chunk: triples at a time: what bounds the memory, chunk x k numbers.
    """
    logits = nodes.new_empty(len(graph))
    for r, edges in enumerate(graph.by_relation):
        if not len(edges):
            continue
        heads, at_head = graph.head[edges].unique(return_inverse=True)
        tails, at_tail = graph.tail[edges].unique(return_inverse=True)
        query = torch.tanh(nodes[heads] @ projections[r] + relations[r])
        key = nodes[tails] @ projections[r]
        for some, h, t in zip(edges.split(chunk), at_head.split(chunk), at_tail.split(chunk)):
            logits[some] = (query[h] * key[t]).sum(1)
    return segment_softmax(logits, graph.head, graph.nodes)


def project(x: Tensor, relation: Tensor, projections: Tensor) -> Tensor:
    """X W_r for x (B, d) and each row's own relation (B,): (B, k), one product a relation."""
    order = torch.argsort(relation, stable=True)
    sizes = relation.bincount(minlength=len(projections)).tolist()
    parts = [rows @ w for rows, w in zip(x[order].split(sizes), projections.unbind(0)) if len(rows)]
    if not parts:
        return x.new_zeros(0, projections.shape[2])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return torch.cat(parts)[back]


class Translation(NamedTuple):
    """Energies of triples and of their corrupted counterparts, and the projections' norms.

    true, false: g (B,).
    squares: sum over h, r, t and t' of the squared projected vectors, (B,).
    """

    true: Tensor
    false: Tensor
    squares: Tensor

    def loss(self, weight: float = 0.0) -> Tensor:
        """The mean of L_KG over the batch, and weight x squares / 2 of each triple."""
        return (functional.softplus(self.true - self.false) + weight * self.squares / 2).mean()


def translate(
    nodes: Tensor, relations: Tensor, projections: Tensor, triples: Tensor, corrupted: Tensor
) -> Translation:
    """TransR's energies of triples (B, 3) and of those with the tail `corrupted` (B,)."""
    head, relation, tail = triples.unbind(1)
    h, t, other = project(
        nodes[torch.cat((head, tail, corrupted))], relation.repeat(3), projections
    ).chunk(3)
    r = relations[relation]
    squares = torch.stack([x.square().sum(1) for x in (h, r, t, other)]).sum(0)
    return Translation((h + r - t).square().sum(1), (h + r - other).square().sum(1), squares)


def corrupt(graph: Graph, triples: Tensor, random: torch.Generator) -> Tensor:
    """A random node t' for each triple (B, 3), such that (h, r, t') is not in the graph: (B,).

    Raises:
        InputError: some head has nearly every node as a tail of one relation.
    """
    head, relation, tail = triples.unbind(1)
    drawn = tail.clone()
    left = torch.arange(len(tail), device=tail.device)
    for _ in range(1000):
        if not len(left):
            return drawn
        new = torch.randint(graph.nodes, (len(left),), generator=random).to(tail.device)
        drawn[left] = new
        left = left[graph.holds(head[left], relation[left], new)]
    raise InputError(
        f"node {int(head[left[0]])} has nearly all {graph.nodes} nodes as tails of relation "
        f"{int(relation[left[0]])}, so that no false triple can be drawn; leave that relation out."
    )
