"""The collaborative knowledge graph: users, items and what is known of items as one list of edges.

Nodes are users 0 ... U-1, then entities U ... N-1, of which the first I are the items. An edge is a
triple (head, relation, tail); every triple is there in both directions, the inverse under a
relation of its own. Relation 0 is "interacted with"; r + 1 is relation r of the knowledge graph;
the inverse of relation r is r + R / 2, with R the number of relations in both directions.
Wang et al. 2019, arXiv 1905.07854, section 2.

    n_h = sum over (h, r, t) of w(h, r, t) x_t        messages go from tails to heads

is a product with a sparse matrix (torch's CSR), so that no message is ever held for itself: memory
is one number for each edge and one vector for each node.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole


class Csr(NamedTuple):
    """Rows of a sparse matrix: `col[start[i] : start[i + 1]]` are the columns of row i."""

    start: Tensor
    col: Tensor


@dataclass(frozen=True)
class Adjacency:
    """A sparse matrix W (rows, cols) of weights, kept with its transpose for the backward.

    Attributes:
        forward: its rows, columns ascending and distinct in each.
        back: the rows of its transpose.
        weight: of each entry of `forward`.
        turned: index into `weight` of each entry of `back`.
        shape: (rows, cols).
    """

    forward: Csr
    back: Csr
    weight: Tensor
    turned: Tensor
    shape: tuple[int, int]

    def __matmul__(self, x: Tensor) -> Tensor:
        """W x for x (cols, D), differentiable in x; weights are constants of it.

        Raises:
            InputError: another shape.
        """
        if x.dim() != 2 or x.shape[0] != self.shape[1]:
            raise InputError(
                f"Adjacency @ x: expected x ({self.shape[1]}, D), got {tuple(x.shape)}."
            )
        out: Tensor = _Messages.apply(x, self)
        return out

    def rows(self, wanted: Tensor) -> tuple[Adjacency, Tensor]:
        """The rows `wanted` over the columns that they, or these rows' own vectors, need.

        Args:
            wanted: distinct rows, ascending, int64.

        Returns:
            W' (len(wanted), len(needed)), and the columns `needed`, ascending; `wanted` is in it.
        """
        first = self.forward.start[wanted]
        count = self.forward.start[wanted + 1] - first
        entry = spans(first, count)
        cols = self.forward.col[entry]
        needed = torch.cat((wanted, cols)).unique()
        at = torch.searchsorted(needed, cols)
        row = torch.repeat_interleave(torch.arange(len(wanted), device=cols.device), count)
        order = torch.argsort(at, stable=True)
        shape = (len(wanted), len(needed))
        return Adjacency(
            Csr(starts(count), at),
            Csr(starts(at.bincount(minlength=shape[1])), row[order]),
            self.weight[entry], order, shape,
        ), needed  # fmt: skip


class _Messages(torch.autograd.Function):
    """W x, and W^T g for the gradient: two sparse products and nothing kept but W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Adjacency) -> Tensor:
        ctx.w = w
        return _product(w.forward, w.weight, w.shape, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        w: Adjacency = ctx.w
        return _product(w.back, w.weight[w.turned], w.shape[::-1], grad), None


def _product(rows: Csr, weight: Tensor, shape: tuple[int, int], x: Tensor) -> Tensor:
    if not len(rows.col) or not x.shape[1]:
        return x.new_zeros(shape[0], x.shape[1])
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
        matrix = torch.sparse_csr_tensor(
            rows.start, rows.col, weight.to(wide), shape, check_invariants=False
        )
    return (matrix @ x.to(wide).contiguous()).to(x.dtype)


class Graph:
    """Triples (h, r, t) as a set, sorted by head.

    Args:
        triples: (E, 3) int64 of (head, relation, tail); repeated ones count once.
        nodes: N.
        relations: R.

    Attributes:
        head, relation, tail: (E,) each.
        start: (N + 1,); the triples of head h are start[h] ... start[h + 1] - 1.
        pair: (E,) index of each triple's (head, tail) among the distinct ones, which
            `adjacency` sums over.

    Raises:
        InputError: another shape or type, or a number that is out of range.
    """

    def __init__(self, triples: Tensor, nodes: int, relations: int) -> None:
        self.nodes = whole("Graph", "nodes", nodes, least=1)
        self.relations = whole("Graph", "relations", relations, least=1)
        if nodes * nodes * relations >= 2**63:
            raise InputError(
                f"Graph: {nodes} nodes and {relations} relations are too many to number triples "
                "in 64 bits."
            )
        if triples.dim() != 2 or triples.shape[1] != 3 or triples.dtype != torch.int64:
            raise InputError(
                f"Graph: expected triples (E, 3) of int64, got {triples.dtype} of shape "
                f"{tuple(triples.shape)}."
            )
        for name, column, most in (
            ("head", 0, nodes), ("relation", 1, relations), ("tail", 2, nodes)
        ):  # fmt: skip
            x = triples[:, column]
            if len(x) and not (int(x.min()) >= 0 and int(x.max()) < most):
                raise InputError(
                    f"Graph: a {name} is {int(x.min())} or {int(x.max())}; expected 0 ... "
                    f"{most - 1}."
                )
        self.key = self.number(*triples.unbind(1)).unique()
        place, self.tail = self.key // nodes, self.key % nodes
        self.head, self.relation = place // relations, place % relations
        self.start = starts(self.head.bincount(minlength=nodes))
        pairs, self.pair = (self.head * nodes + self.tail).unique(return_inverse=True)
        row, col = pairs // nodes, pairs % nodes
        self._turned = torch.argsort(col, stable=True)
        self._forward = Csr(starts(row.bincount(minlength=nodes)), col)
        self._back = Csr(starts(col.bincount(minlength=nodes)), row[self._turned])
        by = torch.argsort(self.relation, stable=True)
        sizes = self.relation.bincount(minlength=relations).tolist()
        self.by_relation = by.split(sizes)

    def __len__(self) -> int:
        return len(self.head)

    def number(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        """One number for each triple, in the order of the graph."""
        return (head * self.relations + relation) * self.nodes + tail

    def holds(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        """Whether each of these triples (B,) is in the graph."""
        return contains(self.key, self.number(head, relation, tail))

    def adjacency(self, weight: Tensor) -> Adjacency:
        """Triples' weights (E,) as a matrix (N, N); those of one (head, tail) are summed."""
        if weight.shape != (len(self),):
            raise InputError(
                f"Graph.adjacency: expected one weight for each of {len(self)} triples, got "
                f"{tuple(weight.shape)}."
            )
        summed = weight.new_zeros(len(self._forward.col)).index_add(0, self.pair, weight)
        shape = (self.nodes, self.nodes)
        return Adjacency(self._forward, self._back, summed, self._turned, shape)

    def equal_weights(self) -> Tensor:
        """1 / |N_h| for each triple: attention that doesn't look ("w/o attention")."""
        return (1.0 / self.head.bincount(minlength=self.nodes))[self.head]

    def laplacian(self, form: str = "si") -> Tensor:
        """The weights before anything was learnt, from each relation's own adjacency.

        Args:
            form: "si": 1 / out-degree in its relation, so that a row sums to the number of its
                relations; "bi": 1 / sqrt(out-degree of the head x in-degree of the tail).

        Raises:
            InputError: another form.
        """
        if form not in ("si", "bi"):
            raise InputError(f"Graph.laplacian({form!r}): expected 'si' or 'bi'.")
        size = self.nodes * self.relations
        out = self.head * self.relations + self.relation
        weight = 1.0 / out.bincount(minlength=size)[out]
        if form == "si":
            return weight
        into = self.tail * self.relations + self.relation
        return (weight / into.bincount(minlength=size)[into]).sqrt()


def collaborative(
    interactions: Tensor, knowledge: Tensor, users: int, entities: int, relations: int
) -> Graph:
    """The graph of users' interactions and a knowledge graph of items, both directions.

    Args:
        interactions: (n, 2) int64 of (user, item).
        knowledge: (m, 3) int64 of (entity, relation, entity); items are the first entities.
        users: U.
        entities: number of entities, items included.
        relations: of the knowledge graph, one direction; the graph has 2 (relations + 1).
    """
    for name, x, columns in (("interactions", interactions, 2), ("knowledge", knowledge, 3)):
        if x.dim() != 2 or x.shape[1] != columns or x.dtype != torch.int64:
            raise InputError(
                f"collaborative: expected {name} (n, {columns}) of int64, got {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
    for name, x, most in (
        ("user", interactions[:, 0], users), ("item", interactions[:, 1], entities),
        ("entity", knowledge[:, ::2], entities), ("relation", knowledge[:, 1], relations),
    ):  # fmt: skip
        if x.numel() and not (int(x.min()) >= 0 and int(x.max()) < most):
            raise InputError(
                f"collaborative: a number of a {name} is {int(x.min())} or {int(x.max())}; "
                f"expected 0 ... {most - 1}."
            )
    liked = torch.stack(
        (interactions[:, 0], torch.zeros_like(interactions[:, 0]), interactions[:, 1] + users), 1
    )
    known = knowledge + torch.tensor([users, 1, users], device=knowledge.device)
    one = torch.cat((liked, known))
    other = one.flip(1) + torch.tensor([0, relations + 1, 0], device=one.device)
    return Graph(torch.cat((one, other)), users + entities, 2 * (relations + 1))


def starts(count: Tensor) -> Tensor:
    """Where runs of these lengths begin, and where the last ends."""
    return torch.cat((count.new_zeros(1), count.cumsum(0)))


def spans(first: Tensor, count: Tensor) -> Tensor:
    """first[0], first[0] + 1, ... (count[0] numbers), then those of first[1], ..."""
    offset = first - (count.cumsum(0) - count)
    total = int(count.sum())
    return torch.repeat_interleave(offset, count) + torch.arange(total, device=first.device)


def contains(held: Tensor, wanted: Tensor) -> Tensor:
    """Whether each of `wanted` is among `held`, distinct numbers in ascending order."""
    if not len(held):
        return torch.zeros_like(wanted, dtype=torch.bool)
    at = torch.searchsorted(held, wanted).clamp(max=len(held) - 1)
    return held[at] == wanted
