"""A plan: one sequence shared out under one rule, with what each call has to visit, made once."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from foveate.parallel.context.rule import Part, Rule
from foveate.parallel.context.sharding import Sharding

Heads = tuple[int, int, int]
"""(first, count, of): query heads first ... first + count - 1 of `of`."""


class Plan:
    """What every pair of ranks has to do; layers and steps share it.

    Args:
        rule: who sees whom.
        sharding: who holds what.
        heads: which query heads these ranks work on; None is all.
    """

    def __init__(self, rule: Rule, sharding: Sharding, heads: Heads | None = None) -> None:
        self.rule, self.sharding, self.heads = rule, sharding, heads
        self._parts: dict[object, Part] = {}
        self._plans: dict[object, Plan] = {}
        self.kept: dict[object, Tensor] = {}  # of schemes, under keys of their own
        self._lock = threading.Lock()

    def pair(self, queries: int, keys: int) -> Part:
        """What rank `queries` sees of the keys of rank `keys`."""
        index = self.sharding.index
        return self.part(("pair", queries, keys), index[queries], index[keys])

    def part(self, key: object, queries: Tensor, keys: Tensor) -> Part:
        """What some tokens see of others, kept under `key`."""
        found = self._parts.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self.rule.part(queries, keys, self.heads)
            self._parts[key] = found
        return found

    def of_heads(self, first: int, count: int, of: int) -> Plan:
        """The same for some of the query heads of this plan."""
        heads = (first, count, of)
        if self.heads is not None:
            heads = (self.heads[0] + first, count, self.heads[2])
        return self.plan(heads, lambda: Plan(self.rule, self.sharding, heads))

    def of_rings(self, ulysses: int, heads: Heads, head_first: bool) -> Plan:
        """The plan of the rings that are left when groups of ranks put their tokens together."""
        key = ("rings", ulysses, heads, head_first)
        return self.plan(
            key, lambda: Plan(self.rule, grouped(self.sharding, ulysses, head_first)[0], heads)
        )

    def plan(self, key: object, make: object) -> Plan:
        """A plan that belongs to this one, made once."""
        with self._lock:
            found = self._plans.get(key)
            if found is None:
                found = self._plans[key] = make()  # type: ignore[operator]
            return found


def grouped(
    sharding: Sharding, ulysses: int, head_first: bool = True
) -> tuple[Sharding, list[Tensor]]:
    """Groups of ranks that put their tokens together, in order of the sequence.

    Returns:
        (who holds what then, for each group the order (L,) that sorts its ranks' tokens).
    """
    rings = sharding.ranks // ulysses
    index, order = [], []
    for ring in range(rings):
        members = group_ranks(ring, ulysses, rings, head_first)
        together = torch.cat([sharding.index[r] for r in members])
        sort = together.argsort()
        index.append(together[sort])
        order.append(sort)
    made = Sharding(f"{sharding.name} by {ulysses}", sharding.length, tuple(index))
    return made, order


def group_ranks(ring: int, ulysses: int, rings: int, head_first: bool) -> list[int]:
    """The ranks of one Ulysses group: neighbours, or where rings come first every rings-th."""
    if head_first:
        return list(range(ring * ulysses, (ring + 1) * ulysses))
    return list(range(ring, rings * ulysses, rings))
