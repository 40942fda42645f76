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
from typing import Any, TypeVar

import torch
from torch import Tensor

from foveate.ops.errors import InputError

T = TypeVar("T")


class _Told(cached_property):
    """Made once, under inference mode as outside of it: what is kept must serve training, too."""

    def __get__(self, tree: Any, owner: type | None = None) -> Any:
        with torch.inference_mode(False):
            return super().__get__(tree, owner)


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

    # -- making one (in its own file; named here so that it is found) -----------------------------
    @staticmethod
    def nested(children: Sequence[Any], length: int | None = None) -> Tree:
        """A tree of one sequence from nested lists of token indices, siblings in their order.

        Args:
            children: of the root; a number is a token, a list is a group.
            length: tokens of the sequence; None is one more than the largest index.

        Raises:
            InputError: an empty group, a token that stands twice, or anything else than these.
        """
        from foveate.parts import tree_making

        return tree_making.nested(children, length)

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
        from foveate.parts import tree_making

        return tree_making.of_parents(parent, token, batch=batch, length=length)

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
        from foveate.parts import tree_making

        return tree_making.segments(*ids, real=real, places=places)

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
        from foveate.parts import tree_making

        return tree_making.windows(length, branch, first=first, device=device)

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
        from foveate.parts import tree_making

        return tree_making.patches(grid, branch, first=first, device=device)

    @staticmethod
    def batched(trees: Sequence[Tree], length: int | None = None) -> Tree:
        """The trees of several entries as one forest.

        Args:
            trees: of entries, in order.
            length: tokens of an entry, padding included; None is the longest.
        """
        from foveate.parts import tree_making

        return tree_making.batched(trees, length)

    @staticmethod
    def joined(trees: Sequence[Tree]) -> Tree:
        """Several trees of one entry each under one root: the modalities of one signal.

        Tokens follow each other in the order of the trees.
        """
        from foveate.parts import tree_making

        return tree_making.joined(trees)

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
            with torch.inference_mode(False):
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

    @_Told
    def leaf(self) -> Tensor:
        """(n,) bool."""
        return self.token >= 0

    @_Told
    def leaves(self) -> Tensor:
        """Nodes of the leaves in the order of their tokens: what puts tokens into tree order."""
        found = self.leaf.nonzero()[:, 0]
        return found[self.token[found].argsort()]

    @_Told
    def inner(self) -> Tensor:
        """(M,) inner nodes, roots first."""
        return (~self.leaf).nonzero()[:, 0]

    @_Told
    def inner_place(self) -> Tensor:
        """(n,) the number of each inner node among `inner`; of leaves it says nothing."""
        return ((~self.leaf).cumsum(0) - 1).clamp_min(0)

    @_Told
    def inner_spans(self) -> list[tuple[int, int]]:
        """First and last (excluded) inner node of each level below the roots, numbered so."""
        ends = [int((~self.leaf[:at]).sum()) for at in self.levels]
        return list(zip(ends[1:-1], ends[2:]))

    @_Told
    def sizes(self) -> Tensor:
        """(n,) int64, |A|: leaves under each node."""
        count = self.leaf.long()
        for start, lo, hi in reversed(self.steps):
            count[start:lo].index_add_(0, self.parent[lo:hi] - start, count[lo:hi])
        return count

    @_Told
    def children(self) -> Tensor:
        """(n,) int64: children of each node."""
        below = self.parent[self.trees :]
        return torch.bincount(below, minlength=len(self))

    @_Told
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

    @_Told
    def scores(self) -> int:
        """Logits that the program needs, leaves' own included: sum of b (b - 1) and the leaves."""
        b = self.children[self.children > 0]
        return int((b * (b - 1)).sum()) + int(self.leaf.sum())

    @_Told
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

    def check(self) -> None:
        """Refuse what is no tree for each entry, a leaf for each token at most."""
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
