"""Trees over tokens: how they are made, what they say, and the sums over them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.tree import Tree
from foveate.parts.tree_sums import node_means, path_sums, token_sums


def lists(tree: Tree, node: int = 0):
    """Back to nested lists, by parents alone."""
    kids = (tree.parent == node).nonzero()[:, 0].tolist()
    return [lists(tree, c) for c in kids] if kids else int(tree.token[node])


def under(tree: Tree, node: int) -> list[int]:
    """Leaves' tokens under a node, by walking up from each."""
    found = []
    for leaf in tree.leaves.tolist():
        at = leaf
        while at >= 0 and at != node:
            at = int(tree.parent[at])
        found += [int(tree.token[leaf])] if at == node else []
    return found


NESTED = [[0, 1], 2, [[3, 4, 5], [6]], [[[7, 8]], 9]]


def test_nested_lists_are_kept_breadth_first():
    tree = Tree.nested(NESTED)
    assert lists(tree) == NESTED
    assert (tree.parent.diff() >= 0).all()
    assert (len(tree), tree.trees, tree.families, tree.widest) == (18, 1, 8, 4)
    assert tree.levels == (0, 1, 5, 11, 16, 18)
    for node in range(len(tree)):
        assert tree.sizes[node] == len(under(tree, node))
        lo, hi = tree.family[node].tolist()
        same = (tree.parent == tree.parent[node]).nonzero()[:, 0].tolist() if node else [0]
        assert list(range(lo, hi)) == same
    assert tree.token[tree.leaves].tolist() == list(range(10))
    # The root, and from the left 01, 345 6, 345, 6, 78 9, 78 twice: b (b - 1) each, and leaves.
    assert sorted(tree.children[~tree.leaf].tolist()) == [1, 1, 2, 2, 2, 2, 3, 4]
    assert tree.scores == 4 * 3 + 3 * 2 + 4 * 2 + 10


def test_segments_count_anew_in_each_group_above():
    sentence = torch.tensor([[-1, 0, 0, 1, 0, 0, 1, 1], [-1, 0, 1, 1, 1, 0, 0, 5]])
    paragraph = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1], [-1, 0, 0, 0, 0, 7, 7, 7]])
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, 6:] = False
    forest = Tree.segments(sentence, paragraph, real=real)
    assert forest.trees == 2
    assert lists(forest, 0) == [0, [[1, 2], [3]], [[4, 5], [6, 7]]]
    assert lists(forest, 1) == [8, [[9], [10, 11, 12]], [[13]]]
    assert len(under(forest, 1)) == 6


def test_siblings_stand_in_the_order_of_their_tokens_whatever_their_ids():
    tree = Tree.segments(torch.tensor([9, 9, 2, 2, -1, 5]))
    assert lists(tree) == [[0, 1], [2, 3], 4, [5]]


def test_windows_group_until_the_root_has_room():
    assert lists(Tree.windows(10, 3)) == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[9]]]
    assert lists(Tree.windows(9, 3)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert lists(Tree.windows(3, 3)) == [0, 1, 2]
    assert lists(Tree.windows(6, 2, first=1)) == [0, [[1, 2], [3, 4]], [[5]]]
    assert lists(Tree.windows(8, (2,))) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    tree = Tree.windows(4096, 16)
    assert (tree.families, tree.widest, len(tree.levels) - 1) == (273, 16, 4)
    assert tree.places is not None
    assert tree.places[tree.leaves, 0].tolist() == list(range(4096))


def test_patches_are_squares_of_squares():
    tree = Tree.patches((4, 6), (2,), first=1)
    assert lists(tree)[0] == 0
    assert lists(tree)[1] == [1, 2, 7, 8]  # rows 0 and 1, columns 0 and 1, behind a [CLS]
    assert len(lists(tree)) == 7
    deep = Tree.patches((28, 28), (7, 2))
    assert deep.children[~deep.leaf].tolist() == [4] + [4] * 4 + [49] * 16
    assert not Tree.patches((4, 4), 2).ordered
    assert Tree.windows(20, 3).ordered
    assert tree.places is not None
    spots = tree.places[tree.leaves]
    assert spots[1:].tolist() == [[i, j] for i in range(4) for j in range(6)]


def test_modalities_under_one_root():
    whole = Tree.joined([Tree.nested([[0, 1], 2]), Tree.patches((2, 2), 2)])
    assert lists(whole) == [[[0, 1], 2], [3, 4, 5, 6]]
    assert whole.length == 7


def test_a_batch_of_trees_and_what_padding_leaves_of_them():
    forest = Tree.batched([Tree.nested([[0, 1], [2]]), Tree.nested([0, [1, 2, 3]])])
    assert (forest.batch, forest.length, forest.trees) == (2, 4, 2)
    assert lists(forest, 0) == [[0, 1], [2]]
    assert lists(forest, 1) == [4, [5, 6, 7]]
    real = torch.tensor([[True, True, False, False], [True, False, True, False]])
    less = forest.only(real)
    assert lists(less, 0) == [[0, 1]]
    assert lists(less, 1) == [4, [6]]
    assert forest.only(torch.ones(2, 4, dtype=torch.bool)) is forest
    none = forest.only(torch.tensor([[False] * 4, [True] * 4]))
    assert none.trees == 1
    assert lists(none) == [4, [5, 6, 7]]
    assert len(forest.only(torch.zeros(2, 4, dtype=torch.bool))) == 0
    three = Tree.nested([[0, 1], 2]).expanded(3)
    assert [lists(three, i) for i in range(3)] == [[[0, 1], 2], [[3, 4], 5], [[6, 7], 8]]


def test_ancestors_by_level():
    tree = Tree.nested(NESTED)
    for level in range(len(tree.levels) - 1):
        lo, hi = tree.levels[level], tree.levels[level + 1]
        found = tree.ancestors(level)
        for node in range(len(tree)):
            at = node
            while at >= hi:
                at = int(tree.parent[at])
            assert found[node] == (at if at >= lo else -1)


def random_forest() -> Tree:
    random.seed(4)
    trees = []
    for n in (9, 5, 12):
        nodes: list = list(range(n))
        while len(nodes) > 3:
            at = random.randrange(len(nodes) - 1)
            size = random.randint(1, min(4, len(nodes) - at))
            nodes[at : at + size] = [nodes[at : at + size]]
            if size == 1 and random.random() < 0.5:
                nodes[at] = nodes[at][0]
        trees.append(Tree.nested(nodes))
    return Tree.batched(trees)


def ancestry(tree: Tree) -> Tensor:
    """(n, n): 1 where the column's node is the row's, or above it."""
    above = torch.eye(len(tree), dtype=torch.float64)
    for node in range(len(tree)):
        at = int(tree.parent[node])
        while at >= 0:
            above[node, at] = 1
            at = int(tree.parent[at])
    return above


def test_sums_are_those_over_all_pairs_and_so_are_their_gradients():
    tree = random_forest()
    above, roots, leaves = ancestry(tree), tree.trees, tree.leaves
    by_node = torch.randn(len(tree), 2, 3, dtype=torch.float64, requires_grad=True)
    by_token = torch.randn(36, 2, 3, dtype=torch.float64, requires_grad=True)
    below = by_node[roots:]
    chosen = torch.zeros(36, len(tree), dtype=torch.float64)  # token -> its leaf
    chosen[tree.token[leaves], leaves] = 1
    inside = above.T @ chosen.T  # (n, tokens): is the token under the node
    cases = [
        (path_sums(by_node, tree), torch.einsum("ab,bxy->axy", above, by_node)),
        (
            node_means(by_token, tree),
            torch.einsum("at,txy->axy", inside / inside.sum(1, keepdim=True), by_token),
        ),
        (
            token_sums(below, tree),
            torch.einsum("ta,axy->txy", (chosen @ above)[:, roots:], below),
        ),
    ]
    for ours, expected in cases:
        torch.testing.assert_close(ours, expected)
        weight = torch.randn_like(expected)
        both = [
            torch.autograd.grad((x * weight).sum(), (by_node, by_token), allow_unused=True)
            for x in (ours, expected)
        ]
        for one, two in zip(*both):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Tree.nested([0, []]), "empty"),
        (lambda: Tree.nested("01"), "lists"),
        (lambda: Tree.nested([0, [0, 1]]), "two leaves"),
        (lambda: Tree.nested([0, 1.5]), "integer"),
        (lambda: Tree.nested([0, 7], length=4), "beyond"),
        (lambda: Tree.windows(8, 1), "branch"),
        (lambda: Tree.windows(4, 2, first=4), "leaves none"),
        (lambda: Tree.patches((), 2), "sizes"),
        (lambda: Tree.segments(torch.zeros(3).long(), torch.zeros(4).long()), "one length"),
        (lambda: Tree.segments(torch.zeros(3)), "integers"),
        (lambda: Tree.nested([0, 1]).expanded(2).expanded(3), "batch of 2"),
        (lambda: Tree.of_parents(torch.tensor([1, 0]), torch.tensor([-1, -1])), "circle"),
        (lambda: Tree.of_parents(torch.tensor([-1, 0]), torch.tensor([-1, -1])), "every leaf"),
        (lambda: Tree.of_parents(*torch.tensor([[-1, -1, 0, 1], [-1, -1, 0, 1]])), "root"),
    ],
)  # fmt: skip
def test_what_is_no_tree_is_refused(make, word):
    with pytest.raises(InputError, match=word):
        make()
