"""Training the next item's recommender: MQSA-TED and, with alpha 1 and no distillation, SASRec."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from foveate.methods.mqsa_ted import MQSATED
from foveate.models.sequential import SequentialRecommender
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.recommend.metrics import leave_one_out, rank_figures
from foveate.recommend.sequences import SequenceData

KINDS = ("mqsa-ted", "sasrec")


@dataclass(frozen=True)
class Setting:
    """What decides a training, but for data and plan.

    Attributes:
        recipe: of the model.
        lr: of Adam.
        batch: sequences of a step.
        l2: weight of all weights' squared norm.
        judge: the validation figure that decides.

    Raises:
        InputError: a bad value.
    """

    recipe: MQSATED = field(default_factory=MQSATED)
    lr: float = 1e-3
    batch: int = 256
    l2: float = 1e-4
    judge: str = "ndcg@20"

    def __post_init__(self) -> None:
        whole("Setting", "batch", self.batch, least=1)
        if not 0 < self.lr < float("inf") or not 0 <= self.l2 < float("inf"):
            raise InputError(
                f"Setting(lr={self.lr}, l2={self.l2}): expected lr above 0, l2 from 0."
            )


class Sequential:
    """A `Trainee` (see `recommend.loop`).

    Args:
        setting: of the training.
        data: whose training part is learnt.
        seed: of the first weights.
    """

    def __init__(self, setting: Setting, data: SequenceData, seed: int = 0) -> None:
        self.given, self.data, self.seed = setting, data, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = SequentialRecommender(data.items, setting.recipe)
        self.optimizers = (torch.optim.Adam(self.model.parameters(), setting.lr),)
        self.transitions = data.transitions(setting.recipe.span)

    def setting(self) -> dict[str, Any]:
        """See `Trainee.setting`."""
        return asdict(self.given) | {"data": self.data.digest(), "first": self.seed}

    def loaded(self, epochs: int) -> None:
        """Nothing is derived from the weights."""

    def epoch(self, number: int, random: torch.Generator) -> dict[str, float]:
        """See `Trainee.epoch`."""
        given, (optimizer,) = self.given, self.optimizers
        device = self.model.table.device
        sums: dict[str, float] = {}
        count = 0
        for items, targets in self.data.batches(given.recipe.length, given.batch, random):
            losses = self.model.losses(
                items.to(device), targets.to(device), self.transitions, given.l2
            )
            optimizer.zero_grad(set_to_none=True)
            torch.stack([*losses.values()]).sum().backward()
            optimizer.step()
            count += 1
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        return {name: value / count for name, value in sums.items()}

    @torch.no_grad()
    def figures(
        self, part: str = "test", ks: tuple[int, ...] = (5, 10, 20), size: int = 512
    ) -> dict[str, float]:
        """HR@K and NDCG@K over all items that weren't seen.

        Also of the sequences whose last step, from the last known item to the next, occurs in the
        training part ("seen ndcg@10") or doesn't ("unseen ndcg@10"), and the share that doesn't
        ("unseen"); 0 where there is none of a kind.
        """
        data, model = self.data, self.model
        judged = data.judged(part)
        if not judged:
            raise InputError(f"{data.title}: no sequence has 3 items or more, to judge by.")
        training = model.training
        model.eval()
        device, ranks, steps = model.table.device, [], []
        for at in range(0, len(judged), size):
            known, target = zip(*judged[at : at + size])
            items = data.padded([*known], self.given.recipe.length).to(device)
            seen = torch.zeros(len(known), data.items, dtype=torch.bool)
            for row, had in enumerate(known):
                seen[row, list(had)] = True
            wanted = torch.tensor(target)
            scores = model.scores(items)
            ranks.append(leave_one_out(scores, wanted.to(device), seen.to(device)).cpu())
            last = torch.tensor([had[-1] for had in known])
            steps.append(self.transitions.counts(last, wanted))
        model.train(training)
        rank, step = torch.cat(ranks), torch.cat(steps)
        found = rank_figures(rank, ks)
        for name, kind in (("unseen", step == 0), ("seen", step > 0)):
            some = rank_figures(rank[kind], (10,)) if bool(kind.any()) else {"ndcg@10": 0.0}
            found[f"{name} ndcg@10"] = some["ndcg@10"]
        return found | {"unseen": float((step == 0).double().mean()), "users": float(len(rank))}

    def validate(self) -> float:
        """See `Trainee.validate`."""
        name, _, k = self.given.judge.partition("@")
        return self.figures("validation", (int(k),))[f"{name}@{k}"]
