"""A partition that is a tree: documents of sentences of tokens, images of patches, both under one.

Leaves are tokens, inner nodes are their groups, at any depth; the children of one node may be
leaves and groups mixed. A tree is kept breadth first: nodes level by level, siblings side by side
in the order of their parents, so that every family is one contiguous range and a sum over all
subtrees is one pass over the levels (`foveate.parts.tree_sums`). A batch is a forest, a tree for
each entry; tokens that no leaf names (padding) are in no node.

        Tree.nested([[0, 1], [2, 3, 4]])                    # by hand
        Tree.windows(4096, 16)                              # groups of 16, of 16 of these, ...
        Tree.segments(sentence, paragraph)                  # (B, L) ids, the finest first
        Tree.patches((28, 28), (7, 2))                      # squares of 7 x 7, of 2 x 2 of these
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole, whole_list

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Tree:
    """A forest over the tokens of a batch; make it with one of the static methods.

    Attributes:
        parent: (n,) int64, the parent of each node; -1 for roots, which come first. Never falls.
        token: (n,) int64, b * length + t for the leaf of token t of entry b; -1 for inner nodes.
        levels: the first node of each level, and n.
        batch: entries, a root for each (an entry without tokens has none).
        length: tokens of an entry.
        places: (n, axes) float, where each node stands in its parent's domain (its row and column
            among patches, its number in a line); None is unknown, as in a set.
    """

    parent: Tensor
    token: Tensor
    levels: tuple[int, ...]
    batch: int
    length: int
    places: Tensor | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    # -- making one --------------------------------------------------------------------------------
    @staticmethod
    def nested(children: Sequence[Any], length: int | None = None) -> Tree:
        """A tree of one sequence from nested lists of token indices, siblings in their order.

        Args:
            children: of the root; a number is a token, a list is a group.
            length: tokens of the sequence; None is one more than the largest index.

        Raises:
            InputError: an empty group, a token that stands twice, or anything else than these.
        """
        parents: list[int] = [-1]
        tokens: list[int] = [-1]
        waiting = [(0, children)]
        for node, group in waiting:  # breadth first: grows while it is read
            if isinstance(group, str) or not isinstance(group, Sequence) or not group:
                raise InputError(
                    f"Tree.nested: expected lists of tokens and lists that aren't empty, got "
                    f"{group!r}."
                )
            for child in group:
                parents.append(node)
                leaf = not isinstance(child, Sequence)
                tokens.append(whole("Tree.nested", "token", child, least=0) if leaf else -1)
                if not leaf:
                    waiting.append((len(parents) - 1, child))
        return Tree.of_parents(torch.tensor(parents), torch.tensor(tokens), length=length)

    @staticmethod
    def of_parents(
        parent: Tensor, token: Tensor, *, batch: int = 1, length: int | None = None
    ) -> Tree:
        """A forest from a parent for each node, in any order; siblings in the order of their nodes.

        Args:
            parent: (n,) integers, -1 for a root.
            token: (n,) integers, b * length + t for a leaf, -1 for an inner node.
            batch: entries.
            length: tokens of an entry; None (for one entry only) is one more than the largest.

        Raises:
            InputError: not a tree for each entry that has tokens, with every token in one leaf at
                most and every leaf and no inner node without children.
        """
        if parent.dim() != 1 or parent.shape != token.shape or parent.is_floating_point():
            raise InputError("Tree.of_parents: expected integers (n,) for parent and for token.")
        parent, token = parent.long(), token.long()
        if length is None:
            if batch != 1:
                raise InputError("Tree.of_parents: give length= with a batch of more than one.")
            length = int(token.max()) + 1 if len(token) else 0
        n = len(parent)
        if n and not (-1 <= int(parent.min()) and int(parent.max()) < n):
            raise InputError(f"Tree.of_parents: parents must be -1 ... {n - 1}.")
        tree = _breadth_first(parent, token, batch, length, None)
        tree._check()
        return tree

    @staticmethod
    def segments(
        *ids: Tensor, real: Tensor | None = None, places: Sequence[Tensor] | None = None
    ) -> Tree:
        """A forest from ids: tokens of one id are a group of their level.

        Args:
            ids: for each level of groups, the finest first, integers (L,) or (B, L): which group of
                that level the token is in. Ids count within the group above, so that sentences may
                be numbered anew in each paragraph, and need not be contiguous (patches aren't). A
                negative id is no group at this level: the token hangs on the next one, as [CLS] on
                the root. No ids at all need `real`: all tokens on the root.
            real: bool (L,) or (B, L), tokens that aren't padding; None is all.
            places: for the tokens and for each level of groups, (L, axes) or (B, L, axes) floats:
                where the token, or the group that it is in, stands in the domain above it.

        Siblings stand in the order of their first tokens.

        Raises:
            InputError: shapes that don't fit.
        """
        given = [*ids, *([] if real is None else [real])]
        shapes = {tuple(x.shape) for x in given}
        if not given or any(len(s) not in (1, 2) for s in shapes) or len({s[-1] for s in shapes}) > 1:
            raise InputError(
                f"Tree.segments: expected ids (L,) or (B, L) of one length, got {sorted(shapes)}."
            )
        if any(x.is_floating_point() or x.dtype == torch.bool for x in ids):
            raise InputError("Tree.segments: ids must be integers.")
        batch, length = max((s[0] if len(s) == 2 else 1) for s in shapes), given[0].shape[-1]
        if any(len(s) == 2 and s[0] != batch for s in shapes):
            raise InputError(f"Tree.segments: batches differ, {sorted(shapes)}.")
        flat = [x.expand(batch, length).reshape(-1).long() for x in ids]
        device = given[0].device
        at = torch.arange(batch * length, device=device)
        if real is not None:
            at = at[real.expand(batch, length).reshape(-1)]
        # Groups from the coarsest: each is known by the group above it and its id.
        above = torch.unique(at // length, return_inverse=True)[1] if len(at) else at
        parents = [torch.full((int(above.max()) + 1 if len(at) else 0,), -1, device=device)]
        firsts = [_first(above, at, len(parents[0]))]
        where: list[tuple[Tensor, Tensor, int]] = []
        count = len(parents[0])
        for level in range(len(flat) - 1, -1, -1):
            own = flat[level][at]
            member = own >= 0
            values, code = torch.unique(own[member], return_inverse=True)
            span = max(1, len(values))
            groups, index = torch.unique(above[member] * span + code, return_inverse=True)
            parents.append(groups // span)
            firsts.append(_first(index, at[member], len(groups)))
            where.append((firsts[-1], torch.arange(len(groups), device=device) + count, level))
            above = above.index_put((member,), index + count)
            count += len(groups)
        parents.append(above)
        firsts.append(at)
        token = torch.cat((torch.full((count,), -1, device=device), at))
        spots = None
        if places is not None:
            spots = _spots(places, where, at, count, batch, length)
        return _breadth_first(
            torch.cat(parents), token, batch, length, torch.cat(firsts), places=spots
        )

    @staticmethod
    def windows(
        length: int, branch: int | Sequence[int] = 16, *, first: int = 0, device: Any = None
    ) -> Tree:
        """Groups of neighbouring tokens, of these, and so on; places are numbers in a line.

        Args:
            length: tokens.
            branch: children of a group, at each level until no more than these are left for the
                root; or one number for each level of groups, the finest first, whose groups are
                then all on the root.
            first: tokens at the front that hang on the root, such as [CLS].

        Raises:
            InputError: a branch below 2, or not that many tokens.
        """
        whole("Tree.windows", "length", length, least=1)
        whole("Tree.windows", "first", first, least=0)
        if first >= length:
            raise InputError(f"Tree.windows: first={first} of {length} tokens leaves none.")
        at = torch.arange(length, device=device) - first
        sizes = _sizes(branch, length - first, "Tree.windows")
        ids, places, unit = [], [at.clamp_min(0)], 1
        for size in sizes:
            unit *= size
            ids.append(torch.where(at >= 0, at // unit, -1))
            places.append(ids[-1].clamp_min(0))
        everyone = torch.ones(length, dtype=torch.bool, device=device)
        return Tree.segments(*ids, real=everyone, places=[p[:, None].float() for p in places])

    @staticmethod
    def patches(
        grid: Sequence[int], branch: int | Sequence[int] = 4, *, first: int = 0, device: Any = None
    ) -> Tree:
        """Blocks of a grid of tokens (row by row), blocks of these, and so on, as in `windows`.

        A block is `branch` wide in every axis, so that an image's has branch ** 2 children, whose
        places are their rows and columns.

        Args:
            grid: tokens in each axis, such as (height, width).
            branch: as in `windows`, along each axis.
            first: tokens before the grid's, which hang on the root.

        Raises:
            InputError: sizes below 1, or a branch below 2.
        """
        shape = whole_list("Tree.patches", "grid", grid)
        whole("Tree.patches", "first", first, least=0)
        if not shape or min(shape) < 1:
            raise InputError(f"Tree.patches(grid={grid!r}): expected sizes of at least 1.")
        sizes = _sizes(branch, max(shape), "Tree.patches")
        axes = [torch.arange(n, device=device) for n in shape]
        at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))
        ids, places, unit = [], [at], 1
        for size in sizes:
            unit *= size
            block, number = at // unit, torch.zeros(len(at), dtype=torch.int64, device=device)
            for axis, n in enumerate(shape):
                number = number * -(-n // unit) + block[:, axis]
            ids.append(torch.cat((number.new_full((first,), -1), number)))
            places.append(block)
        front = at.new_zeros(first, len(shape))
        everyone = torch.ones(first + prod(shape), dtype=torch.bool, device=device)
        return Tree.segments(
            *ids, real=everyone, places=[torch.cat((front, p)).float() for p in places]
        )

    @staticmethod
    def batched(trees: Sequence[Tree], length: int | None = None) -> Tree:
        """The trees of several entries as one forest.

        Args:
            trees: of entries, in order.
            length: tokens of an entry, padding included; None is the longest.
        """
        if not trees:
            raise InputError("Tree.batched: expected at least one tree.")
        most = max(tree.length for tree in trees)
        length = most if length is None else length
        if length < most:
            raise InputError(f"Tree.batched(length={length}): a tree has {most} tokens.")
        parents, tokens, before, entry = [], [], 0, 0
        for tree in trees:
            parents.append(torch.where(tree.parent < 0, -1, tree.parent + before))
            b, t = tree.token // max(1, tree.length), tree.token % max(1, tree.length)
            tokens.append(torch.where(tree.token < 0, -1, (b + entry) * length + t))
            before += len(tree)
            entry += tree.batch
        some = [tree.places for tree in trees]
        places = None
        if all(p is not None and p.shape[1] == some[0].shape[1] for p in some):  # type: ignore[union-attr]
            places = torch.cat(some)  # type: ignore[arg-type]
        return _breadth_first(
            torch.cat(parents), torch.cat(tokens), entry, length, None, places=places
        )

    @staticmethod
    def joined(trees: Sequence[Tree]) -> Tree:
        """Several trees of one entry each under one root: the modalities of one signal.

        Tokens follow each other in the order of the trees.
        """
        if not trees or any(tree.batch != 1 for tree in trees):
            raise InputError("Tree.joined: expected trees of one entry each.")
        parents, tokens = [torch.tensor([-1], device=trees[0].device)], [trees[0].token.new_tensor([-1])]
        before, start = 1, 0
        for tree in trees:
            parents.append(torch.where(tree.parent < 0, 0, tree.parent + before))
            tokens.append(torch.where(tree.token < 0, -1, tree.token + start))
            before += len(tree)
            start += tree.length
        return _breadth_first(torch.cat(parents), torch.cat(tokens), 1, start, None)

    # -- the same tree, changed --------------------------------------------------------------------
    def expanded(self, batch: int) -> Tree:
        """The tree of one entry for each of `batch` entries; a forest of that many as it is."""
        if batch == self.batch:
            return self
        if self.batch != 1:
            raise InputError(f"The tree is for a batch of {self.batch}, the call has {batch}.")
        return self.kept(("expanded", batch), lambda: Tree.batched([self] * batch, self.length))

    def only(self, real: Tensor) -> Tree:
        """Without the leaves of tokens that are padding, and the groups that this leaves empty.

        Args:
            real: bool (B, L).
        """
        stays = torch.zeros(len(self), dtype=torch.int64, device=self.device)
        stays[self.leaves] = real.reshape(-1)[self.token[self.leaves]].long()
        if bool(stays[self.leaves].all()):
            return self
        for lo, hi in reversed(self.spans):
            stays.index_add_(0, self.parent[lo:hi], stays[lo:hi].clamp_max(1))
        keep = stays > 0
        number = keep.cumsum(0) - 1
        parent = self.parent[keep]
        parent = torch.where(parent < 0, -1, number[parent.clamp_min(0)])
        places = None if self.places is None else self.places[keep]
        before = [int(keep[:at].sum()) for at in self.levels]
        levels = [at for i, at in enumerate(before) if i == 0 or at > before[i - 1]]
        return Tree(parent, self.token[keep], tuple(levels), self.batch, self.length, places)

    def to(self, device: Any) -> Tree:
        """The same tree on another device."""
        if torch.device(device) == self.device:
            return self
        places = None if self.places is None else self.places.to(device)
        return Tree(
            self.parent.to(device),
            self.token.to(device),
            self.levels,
            self.batch,
            self.length,
            places,
        )

    def kept(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` makes of this tree, made once."""
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]

    # -- what it says ------------------------------------------------------------------------------
    def __len__(self) -> int:
        """Nodes, leaves and roots included."""
        return len(self.parent)

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.parent.device

    @property
    def trees(self) -> int:
        """Roots."""
        return self.levels[1] if len(self.levels) > 1 else 0

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last (excluded) node of each level below the roots."""
        return list(zip(self.levels[1:-1], self.levels[2:]))

    @property
    def steps(self) -> list[tuple[int, int, int]]:
        """For each level below the roots: first node of the level above it, its own, the next's."""
        return list(zip(self.levels[:-2], self.levels[1:-1], self.levels[2:]))

    @cached_property
    def leaf(self) -> Tensor:
        """(n,) bool."""
        return self.token >= 0

    @cached_property
    def leaves(self) -> Tensor:
        """Nodes of the leaves in the order of their tokens: what puts tokens into tree order."""
        found = self.leaf.nonzero()[:, 0]
        return found[self.token[found].argsort()]

    @cached_property
    def inner(self) -> Tensor:
        """(M,) inner nodes, roots first."""
        return (~self.leaf).nonzero()[:, 0]

    @cached_property
    def inner_place(self) -> Tensor:
        """(n,) the number of each inner node among `inner`; of leaves it says nothing."""
        return ((~self.leaf).cumsum(0) - 1).clamp_min(0)

    @cached_property
    def inner_spans(self) -> list[tuple[int, int]]:
        """First and last (excluded) inner node of each level below the roots, numbered so."""
        ends = [int((~self.leaf[:at]).sum()) for at in self.levels]
        return list(zip(ends[1:-1], ends[2:]))

    @cached_property
    def sizes(self) -> Tensor:
        """(n,) int64, |A|: leaves under each node."""
        count = self.leaf.long()
        for start, lo, hi in reversed(self.steps):
            count[start:lo].index_add_(0, self.parent[lo:hi] - start, count[lo:hi])
        return count

    @cached_property
    def children(self) -> Tensor:
        """(n,) int64: children of each node."""
        below = self.parent[self.trees :]
        return torch.bincount(below, minlength=len(self))

    @cached_property
    def family(self) -> Tensor:
        """(n, 2) int64: first and last (excluded) of each node and its siblings; roots alone."""
        ends = self.children.cumsum(0) + self.trees
        family = torch.stack((ends - self.children, ends), 1)[self.parent.clamp_min(0)]
        own = torch.arange(self.trees, device=self.device)
        family[: self.trees] = torch.stack((own, own + 1), 1)
        return family

    @property
    def families(self) -> int:
        """M: inner nodes."""
        return int((~self.leaf).sum())

    @property
    def widest(self) -> int:
        """b: the largest number of children."""
        return int(self.children.max()) if len(self) else 0

    @cached_property
    def scores(self) -> int:
        """Logits that the program needs, leaves' own included: sum of b (b - 1) and the leaves."""
        b = self.children[self.children > 0]
        return int((b * (b - 1)).sum()) + int(self.leaf.sum())

    @cached_property
    def ordered(self) -> bool:
        """Whether each node's tokens all come before those of its next sibling."""
        if not len(self):
            return True
        last, first = self.token.clone(), self.token.clone()
        first[~self.leaf] = self.batch * self.length
        for start, lo, hi in reversed(self.steps):
            above = self.parent[lo:hi] - start
            last[start:lo].scatter_reduce_(0, above, last[lo:hi], "amax")
            first[start:lo].scatter_reduce_(0, above, first[lo:hi], "amin")
        together = self.parent[1:] == self.parent[:-1]
        return bool((last[:-1] < first[1:])[together].all())

    def ancestors(self, level: int) -> Tensor:
        """(n,) int64: each node's ancestor at a level, itself there; -1 for nodes above it."""

        def build() -> Tensor:
            found = torch.full_like(self.parent, -1)
            at = torch.arange(len(self), device=self.device)
            found[self.levels[level] : self.levels[level + 1]] = at[
                self.levels[level] : self.levels[level + 1]
            ]
            for lo, hi in self.spans[level:]:
                found[lo:hi] = found[self.parent[lo:hi]]
            return found

        return self.kept(("ancestors", level), build)

    def _check(self) -> None:
        inner = ~self.leaf
        if bool((self.children[self.leaf] > 0).any()) or bool((self.children[inner] == 0).any()):
            raise InputError(
                "Tree: every leaf must hold a token and no children, every other node children "
                "and no token."
            )
        tokens = self.token[self.leaf]
        if len(tokens) and int(tokens.max()) >= self.batch * self.length:
            raise InputError(
                f"Tree: token {int(tokens.max())} is beyond the {self.length} of each of "
                f"{self.batch} entries."
            )
        if len(tokens.unique()) < len(tokens):
            raise InputError("Tree: a token stands in two leaves.")
        if not len(self):
            return
        root = torch.arange(len(self), device=self.device)
        for lo, hi in self.spans:
            root[lo:hi] = root[self.parent[lo:hi]]
        entry = tokens // max(1, self.length)
        pairs = torch.stack((root[self.leaf], entry)).unique(dim=1)
        if len(pairs[0].unique()) < pairs.shape[1] or len(pairs[1].unique()) < pairs.shape[1]:
            raise InputError("Tree: each entry's tokens must be under one root of their own.")


# -- on the way to breadth first -------------------------------------------------------------------
def _breadth_first(
    parent: Tensor,
    token: Tensor,
    batch: int,
    length: int,
    key: Tensor | None,
    places: Tensor | None = None,
) -> Tree:
    """Nodes in any order as a `Tree`; siblings by `key`, None their number."""
    n, device = len(parent), parent.device
    if key is None:
        key = torch.arange(n, device=device)
    rank = torch.full((n + 1,), -1, device=device)  # the last slot is every root's parent
    here = (parent < 0).nonzero()[:, 0]
    order, levels, done = [], [0], 0
    open_ = parent >= 0
    while len(here):
        by_key = here[key[here].argsort(stable=True)]
        here = by_key[rank[parent[by_key]].argsort(stable=True)]
        rank[here] = torch.arange(done, done + len(here), device=device)
        order.append(here)
        done += len(here)
        levels.append(done)
        here = (open_ & (rank[:-1] < 0) & (rank[parent] >= 0)).nonzero()[:, 0]
    if done < n:
        raise InputError(f"Tree: {n - done} nodes hang on no root: their parents form a circle.")
    at = torch.cat(order) if order else here
    above = torch.where(parent[at] < 0, -1, rank[parent[at]])
    return Tree(
        above, token[at], tuple(levels), batch, length, None if places is None else places[at]
    )


def _first(index: Tensor, at: Tensor, count: int) -> Tensor:
    """The first token of each group."""
    most = torch.full((count,), torch.iinfo(torch.int64).max, device=at.device)
    return most.scatter_reduce(0, index, at, "amin")


def _sizes(branch: int | Sequence[int], length: int, who: str) -> tuple[int, ...]:
    """Children of a group at each level of groups, the finest first."""
    if isinstance(branch, Sequence):
        return tuple(whole(who, "branch", size, least=2) for size in branch)
    whole(who, "branch", branch, least=2)
    sizes = []
    while length > branch:
        sizes.append(branch)
        length = -(-length // branch)
    return tuple(sizes)


def _spots(
    places: Sequence[Tensor],
    where: list[tuple[Tensor, Tensor, int]],
    at: Tensor,
    count: int,
    batch: int,
    length: int,
) -> Tensor:
    """Places node by node, from those by token."""
    flat = [p.expand(batch, length, -1).reshape(batch * length, -1) for p in places]
    if len(flat) != len(where) + 1:
        raise InputError(
            f"Tree.segments: expected places of the tokens and of {len(where)} levels, got "
            f"{len(flat)}."
        )
    spots = flat[0].new_zeros(count, flat[0].shape[1])
    for firsts, nodes, level in where:
        spots[nodes] = flat[level + 1][firsts]
    return torch.cat((spots, flat[0][at]))
