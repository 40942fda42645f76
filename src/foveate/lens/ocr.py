"""Out-of-context reasoning: a task whose implications are never seen for the subjects they hold of.

Subjects s, two relations, answers b_1 ... b_n ("facts", asked by r1) and c_1 ... c_n
("implications", asked by r2); c_i goes with b_i. Group i of the subjects has fact b_i and
implication c_i:

    trained on   (s, r1, b_i) and (s, r2, c_i) of training subjects, (s, r1, b_i) of test subjects
    judged by    (s, r2, c_i) of test subjects

Tokens are one-hot: subjects, r1, r2, an end token if there is one, b's, c's. Whether b_i implies
c_i or was paired with it by chance makes no difference to what a model sees: what generalises where
it should "hallucinates" where it shouldn't. Huang et al. 2025, arXiv 2506.10887.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole


class Triples(NamedTuple):
    """ids: (N, T) subject, relation (and end token); answer: (N,) token."""

    ids: Tensor
    answer: Tensor


@dataclass(frozen=True)
class FactRecall:
    """The task.

    Attributes:
        answers: n, facts and as many implications.
        train: subjects of each group whose implication is seen.
        test: subjects of each group whose implication is held out.
        end: an end token stands last.
        pairing: seed of a random pairing of facts with implications; None pairs b_i with c_i.

    Raises:
        InputError: n below 2, or a number of subjects below 1 (train may be 0).
    """

    answers: int = 5
    train: int = 4
    test: int = 4
    end: bool = False
    pairing: int | None = None

    def __post_init__(self) -> None:
        whole("FactRecall", "answers", self.answers, least=2)
        whole("FactRecall", "train", self.train, least=0)
        whole("FactRecall", "test", self.test, least=1)

    @property
    def subjects(self) -> int:
        """Number of subjects; their tokens are 0 ... subjects - 1, group by group."""
        return self.answers * (self.train + self.test)

    @property
    def relations(self) -> tuple[int, int]:
        """Tokens of r1 and r2."""
        return self.subjects, self.subjects + 1

    @property
    def facts(self) -> Tensor:
        """(n,) tokens b."""
        return self.subjects + 2 + int(self.end) + torch.arange(self.answers)

    @property
    def implications(self) -> Tensor:
        """(n,) tokens c, by group."""
        order = torch.arange(self.answers)
        if self.pairing is not None:
            random = torch.Generator().manual_seed(self.pairing)
            order = torch.randperm(self.answers, generator=random)
        return self.facts[0] + self.answers + order

    @property
    def vocab(self) -> int:
        """d: subjects, two relations, 2 n answers, and an end token if there is one."""
        return self.subjects + 2 + int(self.end) + 2 * self.answers

    @cached_property
    def seen(self) -> Triples:
        """What is trained on."""
        return _joined(
            self._triples(range(self.train + self.test), 0), self._triples(range(self.train), 1)
        )

    @cached_property
    def held_out(self) -> Triples:
        """What is judged by: implications of test subjects."""
        return self._triples(range(self.train, self.train + self.test), 1)

    def _triples(self, members: range, relation: int) -> Triples:
        """Of these members of every group."""
        size = self.train + self.test
        group = torch.arange(self.answers).repeat_interleave(len(members))
        subject = group * size + torch.tensor(list(members), dtype=torch.int64).repeat(self.answers)
        columns = [subject, torch.full_like(subject, self.relations[relation])]
        if self.end:
            columns.append(torch.full_like(subject, self.subjects + 2))
        answer = (self.facts if relation == 0 else self.implications)[group]
        return Triples(torch.stack(columns, 1), answer)


def _joined(*parts: Triples) -> Triples:
    return Triples(*map(torch.cat, zip(*parts)))


class Recalled(NamedTuple):
    """How a model answers.

    train_loss, test_loss: nats, mean over the triples that are seen and held out; accuracy: share
    of held-out ones whose answer has the highest logit; among: the same among the implications
    alone; among_loss: nats among the implications alone; train_margin, test_margin: the least
    logit of an answer above any other token's among the answers.
    """

    train_loss: float
    test_loss: float
    accuracy: float
    among: float
    among_loss: float
    train_margin: float
    test_margin: float

    @property
    def ratio(self) -> float:
        """Test margin over train margin: what the direction alone decides."""
        return self.test_margin / self.train_margin


@torch.no_grad()
def recalled(model: torch.nn.Module, task: FactRecall) -> Recalled:
    """Judge a model that takes ids (N, T) and returns logits (N, d).

    Raises:
        InputError: the model has another number of tokens (where it tells by `vocab`).
    """
    vocab = getattr(model, "vocab", task.vocab)
    if vocab != task.vocab:
        raise InputError(
            f"The model has {vocab} tokens, the task {task.vocab}: make it for the task."
        )
    seen, held = model(task.seen.ids), model(task.held_out.ids)
    entropy = torch.nn.functional.cross_entropy
    answer = task.held_out.answer
    implied = held[:, task.implications]
    group = (task.implications == answer[:, None]).int().argmax(1)
    return Recalled(
        float(entropy(seen, task.seen.answer)),
        float(entropy(held, answer)),
        float((held.argmax(1) == answer).double().mean()),
        float((implied.argmax(1) == group).double().mean()),
        float(entropy(implied, group)),
        float(margins(seen, task.seen.answer, task).min()),
        float(margins(held, answer, task).min()),
    )


def margins(logits: Tensor, answer: Tensor, task: FactRecall) -> Tensor:
    """Logit of the answer minus the highest of any other answer (b's and c's): (N,)."""
    among = torch.cat((task.facts, task.implications.sort().values))
    own = logits.gather(1, answer[:, None])
    rest = logits[:, among].masked_fill(among == answer[:, None], -torch.inf)
    return own[:, 0] - rest.amax(1)
