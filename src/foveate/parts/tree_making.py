"""How trees over tokens are made; `foveate.parts.tree.Tree` tells what each function takes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole, whole_list
from foveate.parts.tree import Tree


def nested(children: Sequence[Any], length: int | None = None) -> Tree:
    """See `Tree.nested`."""
    parents: list[int] = [-1]
    tokens: list[int] = [-1]
    waiting = [(0, children)]
    for node, group in waiting:  # breadth first: grows while it is read
        if isinstance(group, str) or not isinstance(group, Sequence) or not group:
            raise InputError(
                f"Tree.nested: expected lists of tokens and lists that aren't empty, got {group!r}."
            )
        for child in group:
            parents.append(node)
            leaf = not isinstance(child, Sequence)
            tokens.append(whole("Tree.nested", "token", child, least=0) if leaf else -1)
            if not leaf:
                waiting.append((len(parents) - 1, child))
    return of_parents(torch.tensor(parents), torch.tensor(tokens), length=length)


def of_parents(parent: Tensor, token: Tensor, *, batch: int = 1, length: int | None = None) -> Tree:
    """See `Tree.of_parents`."""
    if parent.dim() != 1 or parent.shape != token.shape or parent.is_floating_point():
        raise InputError("Tree.of_parents: expected integers (n,) for parent and for token.")
    parent, token = parent.long(), token.long()
    if length is None:
        if batch != 1:
            raise InputError("Tree.of_parents: give length= with a batch of more than one.")
        length = int(token.max()) + 1 if len(token) else 0
    n = len(parent)
    if n and not (int(parent.min()) >= -1 and int(parent.max()) < n):
        raise InputError(f"Tree.of_parents: parents must be -1 ... {n - 1}.")
    tree = _breadth_first(parent, token, batch, length, None)
    tree.check()
    return tree


def segments(
    *ids: Tensor, real: Tensor | None = None, places: Sequence[Tensor] | None = None
) -> Tree:
    """See `Tree.segments`."""
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
    return _breadth_first(torch.cat(parents), token, batch, length, torch.cat(firsts), places=spots)


def windows(
    length: int, branch: int | Sequence[int] = 16, *, first: int = 0, device: Any = None
) -> Tree:
    """See `Tree.windows`."""
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
    return segments(*ids, real=everyone, places=[p[:, None].float() for p in places])


def patches(
    grid: Sequence[int], branch: int | Sequence[int] = 4, *, first: int = 0, device: Any = None
) -> Tree:
    """See `Tree.patches`."""
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
    return segments(*ids, real=everyone, places=[torch.cat((front, p)).float() for p in places])


def batched(trees: Sequence[Tree], length: int | None = None) -> Tree:
    """See `Tree.batched`."""
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
    return _breadth_first(torch.cat(parents), torch.cat(tokens), entry, length, None, places=places)


def joined(trees: Sequence[Tree]) -> Tree:
    """See `Tree.joined`."""
    if not trees or any(tree.batch != 1 for tree in trees):
        raise InputError("Tree.joined: expected trees of one entry each.")
    parents, tokens = (
        [torch.tensor([-1], device=trees[0].device)],
        [trees[0].token.new_tensor([-1])],
    )
    before, start = 1, 0
    for tree in trees:
        parents.append(torch.where(tree.parent < 0, 0, tree.parent + before))
        tokens.append(torch.where(tree.token < 0, -1, tree.token + start))
        before += len(tree)
        start += tree.length
    return _breadth_first(torch.cat(parents), torch.cat(tokens), 1, start, None)


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
