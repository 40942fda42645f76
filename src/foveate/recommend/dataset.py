"""What a recommender is trained on: interactions, a knowledge graph, and names to show.

Numbers are as KGAT's published files have them: users 0 ... U-1; entities 0 ... E-1, of which the
items are the first I; relations 0 ... R-1 of the knowledge graph, one direction.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from foveate.methods.kgat import Graph, collaborative
from foveate.methods.kgat.graph import contains
from foveate.ops.errors import InputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions in three parts, each (n, 2) int64 of (user, item), and triples.

    Attributes:
        title: what it is, in a few words.
        users: U.
        items: I.
        entities: items included.
        relations: of `knowledge`.
        train, validation, test: no pair is in two of them.
        knowledge: (m, 3) int64 of (entity, relation, entity).
        user_names, entity_names, relation_names: to show; empty where there are none.
    """

    title: str
    users: int
    items: int
    entities: int
    relations: int
    train: Tensor
    validation: Tensor
    test: Tensor
    knowledge: Tensor
    user_names: dict[int, str] = field(default_factory=dict, repr=False)
    entity_names: dict[int, str] = field(default_factory=dict, repr=False)
    relation_names: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.train):
            raise InputError(f"{self.title}: there is no interaction to train on.")
        if self.items > self.entities:
            raise InputError(
                f"{self.title}: {self.items} items but {self.entities} entities; items are the "
                "first entities."
            )

    @cached_property
    def seen(self) -> Tensor:
        """The training pairs as numbers user x items + item, ascending."""
        return self.numbers(self.train).unique()

    def numbers(self, pairs: Tensor) -> Tensor:
        """Pairs (n, 2) as one number each."""
        return pairs[:, 0] * self.items + pairs[:, 1]

    def graph(self, knowledge: bool = True) -> Graph:
        """Users, items and entities in one graph, from training interactions only.

        Args:
            knowledge: False leaves the knowledge graph's triples out.
        """
        triples = self.knowledge if knowledge else self.knowledge[:0]
        return collaborative(self.train, triples, self.users, self.entities, self.relations)

    def features(self) -> Tensor:
        """(n, 2) of (item, entity): the entities that share a triple with each item."""
        head, _, tail = self.knowledge.unbind(1)
        both = torch.cat((torch.stack((head, tail), 1), torch.stack((tail, head), 1)))
        return both[both[:, 0] < self.items].unique(dim=0)

    def held_out(self, share: float = 0.1, seed: int = 0) -> Dataset:
        """The same, with a share of each user's training items as the validation part.

        A user with one training item keeps it.
        """
        if not 0 < share < 1:
            raise InputError(f"held_out(share={share}): expected above 0, below 1.")
        if len(self.validation):
            return self
        place, count = _places(self.train[:, 0], self.users, seed)
        most = (count * share).ceil().long().minimum(count - 1)
        taken = place < most[self.train[:, 0]]
        return replace(self, train=self.train[~taken], validation=self.train[taken])

    def sparse(self, each: int, seed: int = 0) -> Dataset:
        """The same with at most `each` training items of every user; the rest isn't used."""
        place, _ = _places(self.train[:, 0], self.users, seed)
        kept = self.train[place < each]
        return replace(self, train=kept, title=f"{self.title}, {each} training items a user")

    def groups(self, parts: int = 4) -> list[Tensor]:
        """Users by their number of training items, fewest first, in groups that have about as
        many training pairs each: the paper's groups of sparsity.
        """
        count = self.train[:, 0].bincount(minlength=self.users)
        order = torch.argsort(count, stable=True)
        before = count[order].cumsum(0) - count[order]
        group = (before * parts // len(self.train)).clamp(max=parts - 1)
        return [order[group == n].sort().values for n in range(parts)]

    def digest(self) -> str:
        """16 hex digits over all numbers."""
        made = hashlib.sha256(repr((self.users, self.items, self.entities)).encode())
        for x in (self.train, self.validation, self.test, self.knowledge):
            made.update(x.contiguous().numpy().tobytes())
        return made.hexdigest()[:16]

    def describe(self) -> str:
        """What it is and how large, with its digest."""
        return (
            f"{self.title}: {self.users:,} users, {self.items:,} items, {self.entities:,} "
            f"entities; {len(self.train):,} training, {len(self.validation):,} validation and "
            f"{len(self.test):,} test pairs; {len(self.knowledge):,} triples of {self.relations} "
            f"relations; {self.digest()}"
        )

    def user(self, name: str) -> int:
        """The number of a user, by name or number.

        Raises:
            InputError: there is no such user.
        """
        for number, known in self.user_names.items():
            if known == name:
                return number
        if name.isdecimal() and int(name) < self.users and not self.user_names:
            return int(name)
        raise InputError(f"No user is called {name!r}; there are {self.users:,}.")


def _places(user: Tensor, users: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each pair's place in a random order of its user's pairs, and each user's count."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(user), generator=random)
    order = order[torch.argsort(user[order], stable=True)]
    count = user.bincount(minlength=users)
    first = count.cumsum(0) - count
    place = torch.empty_like(order)
    place[order] = torch.arange(len(user)) - first[user[order]]
    return place, count


def distinct(pairs: Tensor, items: int, without: Tensor | None = None) -> Tensor:
    """Pairs (n, 2) once each, and none that is in `without`, in the order of their numbers."""
    numbers = (pairs[:, 0] * items + pairs[:, 1]).unique()
    if without is not None and len(without):
        held = (without[:, 0] * items + without[:, 1]).unique()
        numbers = numbers[~contains(held, numbers)]
    return torch.stack((numbers // items, numbers % items), 1)
