"""Recommenders that score by a dot product: matrix factorisation, factorisation machine, KGAT.

All of them come down to one vector for each user and each item, and one number for each item:

    y(u, i) = a_u . b_i + c_i

so that training (pairs), full ranking and answering queries are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.kgat import KGAT, Adjacency, Graph
from foveate.methods.kgat.graph import Csr, starts
from foveate.ops.errors import InputError


class Tables(NamedTuple):
    """users (U, W), items (I, W), bias (I,): what scores are made of."""

    users: Tensor
    items: Tensor
    bias: Tensor

    def scores(self, users: Tensor) -> Tensor:
        """Y of these users (B,) for all items: (B, I)."""
        return self.users[users] @ self.items.T + self.bias


class Recommender(nn.Module, ABC):
    """See the module's text; `users` and `items` say how many there are."""

    users: int
    items: int

    @abstractmethod
    def vectors(self, users: Tensor | None = None, items: Tensor | None = None) -> Tables:
        """Vectors of these users (B,) and items (C,), in their order; None is all."""

    def refresh(self) -> None:
        """Make anew what is derived from the weights and held constant for an epoch."""

    def pair_loss(self, pairs: Tensor, weight: float = 0.0) -> Tensor:
        """Bayesian personalised ranking: mean of -ln sigmoid(y(u, i+) - y(u, i-)).

        Args:
            pairs: (B, 3) int64 of (user, liked item, other item).
            weight: times half of the vectors' squared norms, summed, over B, is added.
        """
        at = self.vectors(pairs[:, 0], pairs[:, 1:].T.flatten())
        liked, other = at.items.chunk(2)
        bias, bias_other = at.bias.chunk(2)
        margin = (at.users * (liked - other)).sum(1) + bias - bias_other
        squares = sum(x.square().sum() for x in (at.users, liked, other))
        return functional.softplus(-margin).mean() + weight * squares / 2 / len(pairs)


class BPRMF(Recommender):
    """A vector for each user and each item, nothing else (Rendle et al. 2009, arXiv 1205.2618).

    Args:
        users: U.
        items: I.
        dim: of the vectors.
    """

    def __init__(self, users: int, items: int, dim: int = 64) -> None:
        super().__init__()
        self.users, self.items = users, items
        self.user = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(users, dim)))
        self.item = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(items, dim)))

    def vectors(self, users: Tensor | None = None, items: Tensor | None = None) -> Tables:
        """See `Recommender.vectors`."""
        b = self.item if items is None else self.item[items]
        return Tables(self.user if users is None else self.user[users], b, b.new_zeros(len(b)))


class FM(Recommender):
    """Factorisation machine over a user, an item and what is known of the item (Rendle 2010).

        y = sum over f of w_f + sum over f < g of v_f . v_g

    with the features f of a pair: the user, the item, and the entities that the item's triples
    name. In that sum the user meets all others, which meet each other: with s_i = sum of v over
    the item's own features, y(u, i) = v_u . s_i + [w . 1 + (|s_i|^2 - sum |v_f|^2) / 2], and
    whatever is of the user alone drops out of a ranking.

    Args:
        users: U.
        items: I.
        features: (n, 2) int64 of (item, entity); the item itself is added to them.
        entities: number of entities, of which the items are the first.
        dim: of the vectors.
    """

    def __init__(
        self, users: int, items: int, features: Tensor, entities: int, dim: int = 64
    ) -> None:
        super().__init__()
        self.users, self.items = users, items
        self.user = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(users, dim)))
        self.entity = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(entities, dim)))
        self.linear = nn.Parameter(torch.zeros(entities, 1))
        own = torch.arange(items)
        row, col = torch.cat((features, torch.stack((own, own), 1))).unique(dim=0).unbind(1)
        turned = torch.argsort(col, stable=True)
        self.features = Adjacency(
            Csr(starts(row.bincount(minlength=items)), col),
            Csr(starts(col.bincount(minlength=entities)), row[turned]),
            torch.ones(len(row)), turned, (items, entities),
        )  # fmt: skip

    def vectors(self, users: Tensor | None = None, items: Tensor | None = None) -> Tables:
        """See `Recommender.vectors`."""
        f, back = self.features, torch.arange(self.items, device=self.entity.device)
        entity: Tensor = self.entity
        linear: Tensor = self.linear
        if items is not None:
            rows, back = items.unique(return_inverse=True)
            f, needed = f.rows(rows)
            entity, linear = entity[needed], linear[needed]
        sums = f @ torch.cat((entity, entity.square().sum(1, keepdim=True), linear), 1)
        s, squares, w = sums[:, :-2], sums[:, -2], sums[:, -1]
        bias = w + (s.square().sum(1) - squares) / 2
        return Tables(self.user if users is None else self.user[users], s[back], bias[back])


class KGATRecommender(Recommender):
    """KGAT on the graph of users, items and entities; nodes are users first.

    Args:
        recipe: KGAT's hyper-parameters.
        graph: as `foveate.methods.kgat.collaborative` makes it.
        users: U.
        items: I.
        field: compute only what the nodes of a batch reach within the layers, to the same result;
            for graphs of which a batch reaches a small part.

    Attributes:
        network: its weights.
        attention: (E,) of the graph's triples, constant until `refresh`.
    """

    def __init__(
        self, recipe: KGAT, graph: Graph, users: int, items: int, field: bool = False
    ) -> None:
        super().__init__()
        if users + items > graph.nodes:
            raise InputError(
                f"KGATRecommender: {users} users and {items} items are more than the graph's "
                f"{graph.nodes} nodes."
            )
        self.users, self.items, self.graph, self.field = users, items, graph, field
        self.network = recipe.build(graph.nodes, graph.relations)
        self.weigh(graph.laplacian(recipe.initial) if recipe.attention else graph.equal_weights())

    def weigh(self, attention: Tensor) -> None:
        """Take these weights (E,) of the triples."""
        self.attention = attention.to(self.network.nodes)
        self._adjacency = self.graph.adjacency(self.attention)

    def refresh(self) -> None:
        """Attention from today's vectors."""
        self.weigh(self.network.weights(self.graph))

    def start_from(self, factors: BPRMF) -> None:
        """Users' and items' vectors of a trained factorisation as the first ones, as in the paper.

        Raises:
            InputError: they are of other numbers or another width.
        """
        wide = self.network.nodes.shape[1]
        for name, x, count in (("users", factors.user, self.users),
                               ("items", factors.item, self.items)):  # fmt: skip
            if x.shape != (count, wide):
                raise InputError(
                    f"start_from: expected {name}' vectors ({count}, {wide}), got {tuple(x.shape)}."
                )
        with torch.no_grad():
            self.network.nodes[: self.users] = factors.user
            self.network.nodes[self.users : self.users + self.items] = factors.item

    def vectors(self, users: Tensor | None = None, items: Tensor | None = None) -> Tables:
        """See `Recommender.vectors`."""
        if self.field and users is not None and items is not None:
            e = self.network(self._adjacency, torch.cat((users, items + self.users)))
            a, b = e[: len(users)], e[len(users) :]
        else:
            e = self.network(self._adjacency)
            a, b = e[: self.users], e[self.users : self.users + self.items]
            a = a if users is None else a[users]
            b = b if items is None else b[items]
        return Tables(a, b, b.new_zeros(len(b)))

    def triple_loss(self, triples: Tensor, corrupted: Tensor, weight: float = 0.0) -> Tensor:
        """L_KG of triples (B, 3) against those with other tails (B,), and weight decay."""
        return self.network.translate(triples, corrupted).loss(weight)
