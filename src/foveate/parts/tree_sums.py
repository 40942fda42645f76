"""Sums over a tree: of all that is below each node, and of all that is above it.

    path_sums(x)_A   = sum of x_B over B on the path from the root to A, A included
    node_means(x)_A  = mean of x_i over the leaves i under A
    token_sums(y)_i  = sum of y_B over B on the path from below the root to leaf i, i included

Each is one pass over the levels, O(n) rows read and written; most rows are leaves', which are
only copied. What goes up in the forward comes down in the backward, and the other way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from foveate.parts.tree import Tree


def path_sums(x: Tensor, tree: Tree) -> Tensor:
    """X (n, ...) by node -> (n, ...), in the dtype of x."""
    return _Paths.apply(x, tree)


def node_means(x: Tensor, tree: Tree) -> Tensor:
    """X (B * L, ...) by token -> (n, ...) by node, in the dtype of x (fp32 or wider)."""
    return _Means.apply(x, tree)


def token_sums(y: Tensor, tree: Tree) -> Tensor:
    """Y (n - roots, ...) by node below the roots -> (B * L, ...); 0 for what the tree lacks."""
    return _Tokens.apply(y, tree)


def _up(x: Tensor, tree: Tree) -> Tensor:
    """Add to each node what is below it, in place."""
    for start, lo, hi in reversed(tree.steps):
        x[start:lo].index_add_(0, tree.parent[lo:hi] - start, x[lo:hi])
    return x


def _sums_of_leaves(x: Tensor, tree: Tree) -> Tensor:
    """Tokens' rows by node: a leaf's own, the sum of all leaves' below an inner node."""
    rows = x.index_select(0, tree.token.clamp_min(0))
    return _up(rows.index_fill_(0, tree.inner, 0.0), tree)


def _sums_at_leaves(rows: Tensor, inner: Tensor, tree: Tree) -> Tensor:
    """By token: its leaf's row and all inner nodes' above it.

    rows: by node, from the first node that they have (leaves count); inner: by inner node, which is
    overwritten.
    """
    above = tree.inner_place[tree.parent[tree.inner]]
    for lo, hi in tree.inner_spans:
        inner[lo:hi] += inner.index_select(0, above[lo:hi])
    leaves = tree.leaves
    found = rows.index_select(0, leaves - (len(tree) - len(rows)))
    found += inner.index_select(0, tree.inner_place[tree.parent[leaves]])
    if len(leaves) == tree.batch * tree.length:
        return found  # leaves are in the order of their tokens
    out = found.new_zeros(tree.batch * tree.length, *found.shape[1:])
    return out.index_copy_(0, tree.token[leaves], found)


def _sizes(tree: Tree, like: Tensor) -> Tensor:
    return tree.sizes[tree.inner].to(like.dtype).reshape(-1, *(1,) * (like.dim() - 1))


class _Paths(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, tree: Tree) -> Tensor:
        ctx.tree = tree
        sums = x.clone()
        for _, lo, hi in tree.steps:
            sums[lo:hi] += sums.index_select(0, tree.parent[lo:hi])
        return sums

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _up(grad.clone(), ctx.tree), None


class _Means(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, tree: Tree) -> Tensor:
        ctx.tree = tree
        rows, inner = _sums_of_leaves(x, tree), tree.inner
        return rows.index_copy_(0, inner, rows.index_select(0, inner) / _sizes(tree, rows))

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tree = ctx.tree
        inner = grad.index_select(0, tree.inner) / _sizes(tree, grad)
        return _sums_at_leaves(grad, inner, tree), None


class _Tokens(Function):
    @staticmethod
    @override
    def forward(ctx: Any, y: Tensor, tree: Tree) -> Tensor:
        ctx.tree = tree
        roots = tree.trees
        inner = y.new_zeros(len(tree.inner), *y.shape[1:])
        inner[roots:] = y.index_select(0, tree.inner[roots:] - roots)
        return _sums_at_leaves(y, inner, tree)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sums_of_leaves(grad, ctx.tree)[ctx.tree.trees :], None
