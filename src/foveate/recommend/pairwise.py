"""Training BPR-MF, FM and KGAT: one class for all three, KGAT with its second optimiser.

An epoch is n / batch steps of pairwise ranking loss (Adam); for KGAT it is followed by triples /
triple_batch steps of TransR (a second Adam over the same weights), and attention is made anew from
the new vectors: the alternation of Wang et al. 2019, section 3.4 and their code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.methods.kgat import KGAT, Graph, corrupt
from foveate.methods.kgat.graph import contains
from foveate.models.recommender import BPRMF, FM, KGATRecommender, Recommender, Tables
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.recommend.dataset import Dataset
from foveate.recommend.metrics import evaluate

KINDS = ("kgat", "bpr-mf", "fm")


@dataclass(frozen=True)
class Setting:
    """What decides a training, but for data and plan.

    Attributes:
        kind: one of KINDS.
        dim: of the vectors of "bpr-mf" and "fm".
        lr: learning rate of all optimisers.
        batch: pairs of a step.
        triple_batch: triples of a step; None: as many as make the steps of both kinds equally
            many, which is what the published code does.
        decay: weight of squared norms in the steps on pairs.
        triple_decay: likewise on triples; the published code has one for each, too.
        recipe: of KGAT.
        knowledge: False leaves the knowledge graph out of KGAT's graph.
        translation: False leaves TransR's steps out ("w/o KGE").
        field: as `KGATRecommender`.
        judge: the validation figure that decides.

    Raises:
        InputError: a bad value.
    """

    kind: str = "kgat"
    dim: int = 64
    lr: float = 1e-3
    batch: int = 1024
    triple_batch: int | None = None
    decay: float = 1e-5
    triple_decay: float = 1e-5
    recipe: KGAT = field(default_factory=KGAT)
    knowledge: bool = True
    translation: bool = True
    field: bool = False
    judge: str = "recall@20"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"{self.kind!r} is no recommender; expected one of {', '.join(KINDS)}."
            )
        for name in ("dim", "batch", "triple_batch"):
            if getattr(self, name) is not None:
                whole("Setting", name, getattr(self, name), least=1)
        if not 0 < self.lr < float("inf"):
            raise InputError(f"Setting(lr={self.lr}): expected a number above 0.")
        for name in ("decay", "triple_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"Setting({name}={getattr(self, name)}): expected 0 or more.")


def build(setting: Setting, data: Dataset, seed: int) -> Recommender:
    """The model with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if setting.kind == "bpr-mf":
            return BPRMF(data.users, data.items, setting.dim)
        if setting.kind == "fm":
            return FM(data.users, data.items, data.features(), data.entities, setting.dim)
        graph = data.graph(setting.knowledge)
        return KGATRecommender(setting.recipe, graph, data.users, data.items, setting.field)


class Pairwise:
    """A `Trainee` (see `recommend.loop`).

    Args:
        setting: of the training.
        data: its training pairs are learnt, its validation pairs judge.
        seed: of the first weights.
        start: a trained factorisation that KGAT starts from, as its authors advise.
        told: more that decides the training, such as how `start` was made.
    """

    def __init__(
        self,
        setting: Setting,
        data: Dataset,
        seed: int = 0,
        start: BPRMF | None = None,
        told: dict[str, Any] | None = None,
    ) -> None:
        if not len(data.validation):
            raise InputError(f"{data.title}: there is no validation part; see Dataset.held_out.")
        self.given, self.data, self.seed, self.told = setting, data, seed, told or {}
        self.model: Recommender = build(setting, data, seed)
        self.graph: Graph | None = None
        if isinstance(self.model, KGATRecommender):
            self.graph = self.model.graph
            if start is not None:
                self.model.start_from(start)
        count = 2 if self.graph is not None and setting.translation else 1
        self.optimizers = tuple(
            torch.optim.Adam(self.model.parameters(), setting.lr) for _ in range(count)
        )

    def setting(self) -> dict[str, Any]:
        """See `Trainee.setting`."""
        given = asdict(self.given)
        given["recipe"] = {k: list(v) if isinstance(v, tuple) else v
                           for k, v in given["recipe"].items()}  # fmt: skip
        return given | {"data": self.data.digest(), "first": self.seed} | self.told

    def loaded(self, epochs: int) -> None:
        """See `Trainee.loaded`."""
        if epochs:
            self.model.refresh()

    def epoch(self, number: int, random: torch.Generator) -> dict[str, float]:
        """See `Trainee.epoch`."""
        given, figures = self.given, {}
        losses = [
            self._step(self.optimizers[0], self.model.pair_loss(pairs, given.decay))
            for pairs in self._pairs(random)
        ]
        figures["pairs"] = sum(losses) / len(losses)
        if isinstance(self.model, KGATRecommender):
            if given.translation:
                weight, loss_of = given.triple_decay, self.model.triple_loss
                losses = [
                    self._step(self.optimizers[1], loss_of(*drawn, weight))
                    for drawn in self._triples(random)
                ]
                figures["triples"] = sum(losses) / len(losses)
            self.model.refresh()
        return figures

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    def _pairs(self, random: torch.Generator) -> Iterator[Tensor]:
        """Every training pair once, with an item that its user hasn't: (B, 3)."""
        data = self.data
        device = next(self.model.parameters()).device
        order = torch.randperm(len(data.train), generator=random)
        for some in data.train[order].split(self.given.batch):
            other = self._unseen(some[:, 0], random)
            yield torch.cat((some, other[:, None]), 1).to(device)

    def _unseen(self, users: Tensor, random: torch.Generator) -> Tensor:
        data = self.data
        drawn = torch.zeros_like(users)
        left = torch.arange(len(users))
        for _ in range(1000):
            if not len(left):
                return drawn
            drawn[left] = torch.randint(data.items, (len(left),), generator=random)
            left = left[contains(data.seen, users[left] * data.items + drawn[left])]
        raise InputError(
            f"user {int(users[left[0]])} has nearly all {data.items} items, so that none can be "
            "drawn that they haven't; leave that user out."
        )

    def _triples(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every triple of the graph once, users' included, with a false tail."""
        graph = self.graph
        assert graph is not None
        order = torch.randperm(len(graph), generator=random)
        size = self.given.triple_batch
        if size is None:
            size = len(graph) // max(1, len(self.data.train) // self.given.batch)
        for some in order.split(size):
            triples = torch.stack((graph.head[some], graph.relation[some], graph.tail[some]), 1)
            yield triples, corrupt(graph, triples, random)

    @torch.no_grad()
    def tables(self) -> Tables:
        """Vectors of all users and items, as they stand."""
        training = self.model.training
        self.model.eval()
        found = self.model.vectors()
        self.model.train(training)
        return Tables(*(x.detach() for x in found))

    def figures(self, part: str = "test", ks: tuple[int, ...] = (20,)) -> dict[str, float]:
        """Full-ranking figures on a part, "test" or "validation"; see `metrics.evaluate`."""
        data, seen = self.data, self.data.had(part)
        return evaluate(self.tables().scores, getattr(data, part), seen, data.users, data.items, ks)

    def by_sparsity(self, k: int = 20, parts: int = 4) -> list[dict[str, float]]:
        """Test figures of users with few training items to those with many; see `Dataset.groups`.

        Returns:
            For each group that has someone to judge: "most" training items of its users, their
            figures at K, and how many were judged.
        """
        data, scores = self.data, self.tables().scores
        count = data.train[:, 0].bincount(minlength=data.users)
        seen = data.had("test")
        found = []
        for users in data.groups(parts):
            some = data.test[torch.isin(data.test[:, 0], users)]
            if len(some):
                figures = evaluate(scores, some, seen, data.users, data.items, (k,))
                found.append({"most": float(count[users].max())} | figures)
        return found

    def validate(self) -> float:
        """See `Trainee.validate`."""
        name, _, k = self.given.judge.partition("@")
        return self.figures("validation", (int(k),))[f"{name}@{k}"]


def pretraining(setting: Setting) -> Setting:
    """The factorisation that a KGAT of this setting starts from."""
    return replace(setting, kind="bpr-mf", dim=setting.recipe.dim)
