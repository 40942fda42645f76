"""A trained recommender on the disk, and its answers with reasons.

    recommender.json          settings, data, figures, names
    recommender.safetensors   what answers need, and nothing else

KGAT, BPR-MF and FM keep a vector for each user and item (176 numbers a node at KGAT's defaults) and
what each user has had; KGAT also its graph with the attention on every triple, for the reasons. The
next item's recommender keeps its weights and the counted transitions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from foveate.hf.fit.artefacts import ArtefactError, load, save
from foveate.methods.kgat import Graph
from foveate.methods.mqsa_ted import MQSATED
from foveate.models.recommender import KGATRecommender, Tables
from foveate.models.sequential import SequentialRecommender
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.fitting import Artefact
from foveate.parts.weights import put_weights, weights
from foveate.recommend.explain import Path as Chain
from foveate.recommend.explain import paths
from foveate.recommend.pairwise import Pairwise
from foveate.recommend.sequential import Sequential

KEY, TENSORS, FACTS = "recommender", "recommender.safetensors", "recommender.json"


def keep(trainee: Pairwise | Sequential, facts: dict[str, Any], folder: Path) -> None:
    """Write a trained recommender into a folder."""
    if isinstance(trainee, Sequential):
        teacher = trainee.transitions
        tensors = {f"model/{n}": t for n, t in weights(trainee.model).items()}
        tensors |= {
            "transitions/row": teacher.row, "transitions/item": teacher.item,
            "transitions/count": teacher.count.long(),
        }  # fmt: skip
        names = {"item": trainee.data.names}
        facts = facts | {"recipe": asdict(trainee.given.recipe), "items": trainee.data.items}
    else:
        data = trainee.data
        tables = trainee.tables()
        had = torch.cat((data.train, data.validation))
        tensors = dict(tables._asdict()) | {"had": had}
        if isinstance(trainee.model, KGATRecommender):
            graph = trainee.model.graph
            tensors |= {
                "head": graph.head, "relation": graph.relation, "tail": graph.tail,
                "attention": trainee.model.attention,
            }  # fmt: skip
            facts = facts | {"nodes": graph.nodes, "relations": graph.relations}
        names = {
            "user": data.user_names, "item": data.entity_names, "relation": data.relation_names
        }  # fmt: skip
    plain = {what: {str(n): name for n, name in known.items()} for what, known in names.items()}
    save(Artefact(KEY, facts | {"names": plain}, tensors), "", folder / TENSORS)
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")


class Kept:
    """A recommender that `keep` wrote.

    Args:
        folder: it lies in.

    Raises:
        InputError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / TENSORS
        if not path.is_file():
            raise InputError(
                f"{folder} holds no trained recommender; make one with: foveate recommend train "
                f"--out {folder}"
            )
        try:
            held, _ = load(path)
        except ArtefactError as error:
            raise InputError(
                f"{path} is damaged; the training's file beside it is enough to make it anew: run "
                "the same foveate recommend train once more."
            ) from error
        self.facts, self.tensors = held.facts, held.tensors
        self.kind: str = self.facts["kind"]
        self.names = {
            what: {int(n): name for n, name in known.items()}
            for what, known in self.facts["names"].items()
        }

    @property
    def sequential(self) -> bool:
        """Whether it answers what comes next, instead of what a user likes."""
        return "items" in self.facts

    def item(self, text: str) -> int:
        """An item by name or number.

        Raises:
            InputError: there is none.
        """
        count = self.facts["items"] if self.sequential else len(self.tensors["items"])
        return _number(text, self.names["item"], count, "item")

    def for_user(self, text: str, top: int = 10, reasons: int = 3) -> list[dict[str, Any]]:
        """The best items that a user hasn't had, with paths to them where there is a graph.

        Args:
            text: the user's name or number.
            top: items.
            reasons: paths for each.

        Raises:
            InputError: there is no such user.
        """
        whole("for_user", "top", top, least=1)
        whole("for_user", "reasons", reasons, least=0)
        tables = Tables(*(self.tensors[name] for name in Tables._fields))
        user = _number(text, self.names["user"], len(tables.users), "user")
        scores = tables.scores(torch.tensor([user]))[0]
        had = self.tensors["had"]
        scores[had[had[:, 0] == user, 1]] = -torch.inf
        best = scores.topk(min(top, int((scores > -torch.inf).sum())))
        graph = None
        if "attention" in self.tensors and reasons:
            triples = [self.tensors[name] for name in ("head", "relation", "tail")]
            graph = Graph(torch.stack(triples, 1), self.facts["nodes"], self.facts["relations"])
        users = len(tables.users)
        return [
            self._item(item, score) | ({} if graph is None else {
                "because": [
                    self._told(path, users)
                    for path in paths(graph, self.tensors["attention"], user, users + item,
                                      most=reasons)
                ]
            })
            for score, item in zip(best.values.tolist(), best.indices.tolist())
        ]  # fmt: skip

    def after(self, items: Sequence[str], top: int = 10, reasons: int = 3) -> list[dict[str, Any]]:
        """The best items to come after these, with what was looked at and counted.

        Raises:
            InputError: there is no such item, or none was given.
        """
        whole("after", "top", top, least=1)
        if not items:
            raise InputError("after: expected one item or more, in order of time.")
        known = [self.item(text) for text in items]
        recipe = MQSATED(**self.facts["recipe"])
        model = SequentialRecommender(self.facts["items"], recipe)
        mark = "model/"
        put_weights(model, {n.removeprefix(mark): t for n, t in self.tensors.items()
                            if n.startswith(mark)})  # fmt: skip
        model.eval()
        given = torch.tensor([known[-recipe.length :]])
        with torch.no_grad():
            scores = model.scores(given)[0]
        scores[torch.tensor(known)] = -torch.inf
        looked = {name: weight[0] for name, weight in model.looks(given).items()}
        best = scores.topk(min(top, int((scores > -torch.inf).sum())))
        row, item, count = (self.tensors[f"transitions/{n}"] for n in ("row", "item", "count"))
        follow = row == known[-1]
        counts = dict(zip(item[follow].tolist(), count[follow].tolist()))
        looks = {
            name: [
                {"item": self._name("item", int(given[0, at])), "weight": float(weight[at])}
                for at in weight.topk(min(reasons, len(weight))).indices.tolist()
            ]
            for name, weight in looked.items()
        }
        return [
            self._item(item, score) | {"times followed the last": counts.get(item, 0),
                                       "looked at": looks}
            for score, item in zip(best.values.tolist(), best.indices.tolist())
        ]  # fmt: skip

    def _name(self, what: str, number: int) -> str:
        return self.names[what].get(number, f"{what} {number}")

    def _item(self, number: int, score: float) -> dict[str, Any]:
        return {"item": self._name("item", number), "number": number, "score": score}

    def _told(self, path: Chain, users: int) -> dict[str, Any]:
        """A path in words: names and relations by turns, "^" before an inverse relation."""
        half = self.facts["relations"] // 2
        said = []
        for node in path.nodes:
            said.append(self._name("user", node) if node < users
                        else self._name("item", node - users))  # fmt: skip
        for at, relation in reversed([*enumerate(path.relations, 1)]):
            forward = relation % half
            name = "interact" if forward == 0 else self._name("relation", forward - 1)
            said.insert(at, name if relation < half else f"^{name}")
        return {"path": said, "weight": path.weight}


def _number(text: str, names: dict[int, str], count: int, what: str) -> int:
    for number, name in names.items():
        if name == text and number < count:
            return number
    if text.isdecimal() and int(text) < count and (not names or what == "item"):
        return int(text)
    known = [name for number, name in names.items() if number < count]
    hint = nearest(text, known) if known else f"they are 0 ... {count - 1}."
    raise InputError(
        f"No {what} is called {text!r}; {hint if len(hint) < 300 else ''}".rstrip("; ")
    )
