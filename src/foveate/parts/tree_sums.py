"""Sums over a tree: of all that is below each node, and of all that is above it.

Each is the other's transpose, so each is the other's gradient, and both are one pass over the
levels: O(n) rows read and written.

    subtree_sums(x)_A = sum of x_B over B in the subtree of A, A included
    path_sums(x)_A    = sum of x_B over B on the path from the root to A, A included
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from foveate.parts.tree import Tree


def subtree_sums(x: Tensor, tree: Tree) -> Tensor:
    """x (n, ...) by node -> (n, ...), in the dtype of x."""
    return _Up.apply(x, tree)  # type: ignore[no-any-return]


def path_sums(x: Tensor, tree: Tree) -> Tensor:
    """x (n, ...) by node -> (n, ...), in the dtype of x."""
    return _Down.apply(x, tree)  # type: ignore[no-any-return]


def leaf_rows(x: Tensor, tree: Tree) -> Tensor:
    """Tokens' rows (B * L, ...) as those of nodes (n, ...); 0 for inner nodes."""
    leaves = tree.leaves
    rows = x.new_zeros(len(tree), *x.shape[1:])
    return rows.index_copy(0, leaves, x.index_select(0, tree.token[leaves]))


def token_rows(x: Tensor, tree: Tree) -> Tensor:
    """Nodes' rows (n, ...) as those of tokens (B * L, ...); 0 for tokens without a leaf."""
    leaves = tree.leaves
    rows = x.new_zeros(tree.batch * tree.length, *x.shape[1:])
    return rows.index_copy(0, tree.token[leaves], x.index_select(0, leaves))


def leaf_means(x: Tensor, tree: Tree) -> Tensor:
    """Tokens' rows (B * L, ...) as each node's mean over its leaves, (n, ...)."""
    sizes = tree.sizes.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    return subtree_sums(leaf_rows(x, tree), tree) / sizes


def _up(x: Tensor, tree: Tree) -> Tensor:
    sums = x.clone()
    for start, lo, hi in reversed(tree.steps):
        sums[start:lo].index_add_(0, tree.parent[lo:hi] - start, sums[lo:hi])
    return sums


def _down(x: Tensor, tree: Tree) -> Tensor:
    sums = x.clone()
    for lo, hi in tree.spans:
        sums[lo:hi] += sums.index_select(0, tree.parent[lo:hi])
    return sums


class _Up(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, tree: Tree) -> Tensor:  # type: ignore[override]
        ctx.tree = tree
        return _up(x, tree)

    @staticmethod
    @override
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _down(grad, ctx.tree), None


class _Down(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, tree: Tree) -> Tensor:  # type: ignore[override]
        ctx.tree = tree
        return _down(x, tree)

    @staticmethod
    @override
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _up(grad, ctx.tree), None
