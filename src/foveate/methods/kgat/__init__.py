"""KGAT: a recommender's graph network whose edges are weighted by relation-aware attention.

Users, items and what is known of items are one graph (`graph`). Every edge's weight is a softmax
over its head's edges (`attention`), constant within an epoch; each of L layers adds a node's
weighted neighbours to it (`aggregate`); a node is its own vector and all layers' side by side,
those of the layers normalised; a user likes an item by the dot product of the two.

    n_h = sum over (h, r, t) of pi(h, r, t) x_t,   x' = dropout(aggregate(x_h, n_h))
    e*_v = [e_v ; x'_v / |x'_v| ; ... ; x^(L)_v / |x^(L)_v|],   y(u, i) = e*_u . e*_i

Wang et al. 2019, arXiv 1905.07854.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.kgat.aggregate import AGGREGATORS, Aggregator
from foveate.methods.kgat.attention import (
    Translation,
    corrupt,
    edge_attention,
    segment_softmax,
    translate,
)
from foveate.methods.kgat.graph import Adjacency, Graph, collaborative
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole, whole_list

__all__ = [
    "AGGREGATORS", "KGAT", "Adjacency", "Aggregator", "Graph", "Propagation", "Translation",
    "collaborative", "corrupt", "edge_attention", "segment_softmax", "translate",
]  # fmt: skip


@dataclass(frozen=True)
class KGAT:
    """The hyper-parameters; `build` makes the network for a graph.

    Attributes:
        dim: d, width of the nodes' vectors.
        relation_dim: k, width of the relations' space.
        layers: width of each propagation layer's output.
        aggregator: "bi-interaction", "gcn" or "graphsage".
        dropout: on each layer's output.
        attention: False weighs all edges of a node equally ("w/o attention").
        initial: weights before the first epoch: "si" or "bi", see `Graph.laplacian`.
        slope: of LeakyReLU below 0.

    Raises:
        InputError: a bad value.
    """

    dim: int = 64
    relation_dim: int = 64
    layers: tuple[int, ...] = (64, 32, 16)
    aggregator: str = "bi-interaction"
    dropout: float = 0.1
    attention: bool = True
    initial: str = "si"
    slope: float = 0.2

    def __post_init__(self) -> None:
        whole("KGAT", "dim", self.dim, least=1)
        whole("KGAT", "relation_dim", self.relation_dim, least=1)
        if not whole_list("KGAT", "layers", self.layers) or min(self.layers) < 1:
            raise InputError(f"KGAT(layers={self.layers!r}): expected one width of 1 or more each.")
        if self.aggregator not in AGGREGATORS:
            raise InputError(
                f"KGAT(aggregator={self.aggregator!r}): expected one of {', '.join(AGGREGATORS)}."
            )
        if self.initial not in ("si", "bi"):
            raise InputError(f"KGAT(initial={self.initial!r}): expected 'si' or 'bi'.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"KGAT(dropout={self.dropout}): expected 0 or more, below 1.")

    @property
    def width(self) -> int:
        """Of e*: 176 at the defaults."""
        return self.dim + sum(self.layers)

    def build(self, nodes: int, relations: int) -> Propagation:
        """The network for a graph of so many nodes and relations, with fresh weights (Xavier)."""
        return Propagation(self, nodes, relations)


class Propagation(nn.Module):
    """Embeddings, attention and propagation over a graph.

    Attributes:
        recipe: its hyper-parameters.
        nodes: e (N, d).
        relations: e_r (R, k).
        projections: W_r (R, d, k).
        aggregators: one for each layer.
    """

    def __init__(self, recipe: KGAT, nodes: int, relations: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.nodes = nn.Parameter(torch.zeros(nodes, recipe.dim))
        self.relations = nn.Parameter(torch.zeros(relations, recipe.relation_dim))
        self.projections = nn.Parameter(torch.zeros(relations, recipe.dim, recipe.relation_dim))
        widths = (recipe.dim, *recipe.layers)
        self.aggregators = nn.ModuleList(
            Aggregator(recipe.aggregator, a, b, recipe.slope) for a, b in zip(widths, widths[1:])
        )
        with torch.no_grad():
            nn.init.xavier_uniform_(self.nodes)
            nn.init.xavier_uniform_(self.relations)
            for w in self.projections:
                nn.init.xavier_uniform_(w)

    def weights(self, graph: Graph) -> Tensor:
        """Each triple's attention (E,) from today's vectors, without gradient."""
        if not self.recipe.attention:
            return graph.equal_weights().to(self.nodes)
        return edge_attention(self.nodes, self.relations, self.projections, graph)

    def forward(self, adjacency: Adjacency, wanted: Tensor | None = None) -> Tensor:
        """e* of all nodes (N, width), or of `wanted` (n,) only: (n, width).

        Args:
            adjacency: A (N, N).
            wanted: nodes, repeated or not, in any order. Only what lies within L steps of them is
                computed, to the same result; worth it where that is far from all nodes.
        """
        if wanted is None:
            x: Tensor = self.nodes
            found = [x]
            for layer in self.aggregators:
                x = self._drop(layer(x, adjacency @ x))
                found.append(functional.normalize(x, dim=1))
            return torch.cat(found, 1)
        rows, back = wanted.unique(return_inverse=True)
        parts, needed = [], [rows]
        for _ in self.aggregators:  # from the last layer to the first, each needs more
            part, cols = adjacency.rows(needed[-1])
            parts.append(part)
            needed.append(cols)
        parts.reverse()
        needed.reverse()
        x = self.nodes[needed[0]]
        found = [self.nodes[rows]]
        for layer, part, cols, own in zip(self.aggregators, parts, needed, needed[1:]):
            x = self._drop(layer(x[torch.searchsorted(cols, own)], part @ x))
            found.append(functional.normalize(x[torch.searchsorted(own, rows)], dim=1))
        return torch.cat(found, 1)[back]

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.recipe.dropout, self.training)

    def translate(self, triples: Tensor, corrupted: Tensor) -> Translation:
        """TransR's energies of triples (B, 3) and of those with other tails (B,)."""
        return translate(self.nodes, self.relations, self.projections, triples, corrupted)
