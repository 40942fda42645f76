"""Training of a retriever: ColBERTer's losses on triples, in the paper's stages.

    two-way reduction of sub-words -> whole words and stopwords -> second compression, exact match

each from the weights of the one before. The encoder is frozen by default, so that its states are
made once and a step costs the head alone; `Plan(encoder=True)` trains it too. What was trained so
far lies in files, and the same call goes on from them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hf.fit.job import FileState
from foveate.methods.colberter import Colberter, ColberterHead, Encoding, Weights, aggregate
from foveate.models.colberter import ColberterModel
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.fit_loop import loop
from foveate.parts.fitting import State
from foveate.retrieve import model as retrievers
from foveate.retrieve.bank import Some
from foveate.retrieve.collection import Judged, Passage
from foveate.retrieve.lessons import Lessons, Triples
from foveate.retrieve.model import Retriever
from foveate.runs.records import digest

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Plan:
    """How a retriever is trained.

    Attributes:
        steps: of each stage.
        batch: triples of a step.
        lr: the highest learning rate, of the head.
        seed: of the first weights and of the triples' order.
        most: passages that are trained on; more are drawn from.
        negatives: passages that BM25 ranks high, of each question.
        lexical: weight of BM25 in the teacher, beside MaxSim.
        spread: standard deviation of the teacher's margins.
        encoder: train the encoder too.
        encoder_lr: its highest learning rate.

    Raises:
        InputError: a number is out of its range.
    """

    steps: int = 1000
    batch: int = 32
    lr: float = 2e-3
    seed: int = 0
    most: int = 4000
    negatives: int = 30
    lexical: float = 1.0
    spread: float = 3.0
    encoder: bool = False
    encoder_lr: float = 2e-5

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "negatives"):
            whole("Plan", name, getattr(self, name), least=1)
        whole("Plan", "most", self.most, least=2)
        whole("Plan", "seed", self.seed, least=0)
        for name in ("lr", "encoder_lr", "spread"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"Plan({name}={getattr(self, name)}): expected a number above 0.")
        if not 0 <= self.lexical < math.inf:
            raise InputError(f"Plan(lexical={self.lexical}): expected 0 or more.")


def stages(recipe: Colberter) -> list[Colberter]:
    """The recipes that lead to this one, itself last."""
    words = replace(recipe, second=None, exact=False)
    first = replace(words, whole_words=False, stopwords=False)
    path = [first, words, recipe]
    return [one for i, one in enumerate(path) if one not in path[:i]]


@torch.no_grad()
def begin(head: ColberterHead, lessons: Lessons) -> None:
    """First weights: the states' main directions, their scale fitted to the teacher's margins.

    W_t are the main directions of words' states, W_CLS those of the pooled ones; centred, so that
    biases are what takes the mean off.
    """
    count = len(lessons.passages)
    some = lessons.passages.some(list(range(0, count, 1 + count // 512)))
    bags = some.bags(True)
    words = aggregate(some.states, bags)[bags.real]
    _principal(head.compressor, words)
    _principal(head.retrieval, head.pooled(some.states, some.real))
    calibrate(head, lessons, ("retrieval", "compressor"))


def _principal(linear: nn.Linear, x: Tensor) -> None:
    mean = x.mean(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    count = min(len(linear.weight), vectors.shape[1])
    linear.weight[:count] = vectors.flip(1)[:, :count].T
    linear.bias.copy_(-(linear.weight @ mean))


@torch.no_grad()
def calibrate(head: ColberterHead, lessons: Lessons, names: Sequence[str]) -> None:
    """Scale layers so that their margins are the teacher's, by least squares on some triples."""
    found: dict[str, list[Tensor]] = {"teacher": [], "retrieval": [], "token": []}
    for number in range(4):
        triples = lessons.batch(-1, number, 32)
        q, up, down = encoded(head, triples)
        above, below = head.scores(q, up), head.scores(q, down)
        found["teacher"].append(triples.margin)
        found["retrieval"].append(above[1] - below[1])
        found["token"].append(above[2] - below[2])
    teacher, single, token = (torch.cat(x) for x in found.values())
    for name in names:
        margin = single if name == "retrieval" else token
        factor = float((margin @ teacher) / margin.square().sum().clamp(min=1e-9))
        layer = getattr(head, name)
        for weight in layer.parameters():
            weight.mul_(min(max(factor, 1e-3), 1e3) ** 0.5)


def encoded(
    head: ColberterHead, triples: Triples, live: Callable[[Some, str], Some] | None = None
) -> tuple[Encoding, Encoding, Encoding]:
    """The three texts of triples, encoded by a head."""

    def one(some: Some, name: str) -> Encoding:
        some = some if live is None else live(some, name)
        bags = some.bags(head.recipe.whole_words)
        return head(some.states, bags, some.real, passage=name != "query")

    return one(triples.query, "query"), one(triples.better, "better"), one(triples.worse, "worse")


def train(
    head: ColberterHead,
    lessons: Lessons,
    plan: Plan,
    weights: Weights | None = None,
    *,
    state: State | None = None,
    tell: Tell = lambda share, doing: None,
    setting: Any = None,
    model: ColberterModel | None = None,
) -> list[dict[str, float]]:
    """Train one stage, in place.

    Args:
        head: what is trained, on the states that the lessons hold.
        lessons: triples.
        plan: how.
        weights: of the losses; default: the paper's.
        state: where to keep what is needed to go on; None keeps nothing.
        tell: takes the share that is done and a few words.
        setting: whatever decides the training besides plan and recipe.
        model: whose encoder is trained too; None trains the head alone.

    Returns:
        The losses of all steps.
    """
    device = head.gamma.device
    trained = [p for p in head.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": list(trained), "lr": plan.lr}]
    module: nn.Module = head
    if model is not None:
        groups.append({"params": list(model.encoder.parameters()), "lr": plan.encoder_lr})
        trained += groups[-1]["params"]
        model.encoder.requires_grad_(True)
        module = nn.ModuleDict({"encoder": model.encoder, "head": head})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    rates = [float(group["lr"]) for group in groups]
    warm = max(1, plan.steps // 10)

    def step(number: int) -> dict[str, float]:
        share = min((number + 1) / warm, (plan.steps - number) / max(1, plan.steps - warm))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * share
        triples = lessons.batch(plan.seed, number, plan.batch).to(device)
        live = None if model is None else _live(model)
        q, up, down = encoded(head, triples, live)
        losses = head.loss(q, up, down, triples.margin, weights)
        loss = sum(losses.values(), torch.zeros((), device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        gates = {} if up.gates is None else {"open": _share_open(up)}
        return {name: float(x.detach()) for name, x in losses.items()} | gates

    made = {"plan": dataclasses.asdict(plan), "recipe": repr(head.recipe), "more": setting,
            "weights": repr(weights)}  # fmt: skip
    head.train()
    history = loop(
        module, optimizer, step, plan.steps, tell, state or _Nowhere(), every=50, setting=made
    )
    head.eval()
    return history


def _live(model: ColberterModel) -> Callable[[Some, str], Some]:
    """States by the encoder as it is now, without dropout, so that a step is the same again."""
    return lambda some, name: replace(some, states=model.states(some.tokens)[0])


def _share_open(passage: Encoding) -> float:
    assert passage.gates is not None
    real = passage.ids > 0
    return float(((passage.gates > 0) & real).sum() / real.sum().clamp(min=1))


class _Nowhere:
    """A state that keeps nothing."""

    def load(self) -> None:
        """Nothing."""

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Nothing."""


def follow(head: ColberterHead, before: ColberterHead, lessons: Lessons) -> None:
    """Take over the weights of the stage before; what is new is scaled to the teacher."""
    own = head.state_dict()
    kept = {n: x for n, x in before.state_dict().items() if n in own and x.shape == own[n].shape}
    head.load_state_dict(own | kept)
    if head.second is not None and before.second is None:
        calibrate(head, lessons, ("second",))


def fit_on(
    passages: Sequence[Passage],
    recipe: Colberter | None,
    plan: Plan,
    encoder: str | None,
    length: int,
    folder: Path,
    device: torch.device | str = "cpu",
    tell: Tell = lambda share, doing: None,
    say: Callable[[str], None] = lambda text: None,
    *,
    judged: Judged | None = None,
    fresh: bool = False,
) -> Retriever:
    """Train a retriever on passages, stage by stage.

    Args:
        passages: what it learns from; see `foveate.retrieve.lessons`.
        recipe: of its head; None is the default with mean pooling.
        plan: how.
        encoder: as `foveate.retrieve.model.new` takes it.
        length: most sub-words of a text.
        folder: where each stage keeps what it needs to go on.
        judged: more questions.
        fresh: forget what is there.

    Raises:
        InputError: too little to train on, or the encoder doesn't fit.
    """
    recipe = Colberter(pool="mean") if recipe is None else recipe
    base = replace(recipe, whole_words=True)
    found = retrievers.new(encoder, base, length=length, device=device, say=say)
    draw = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(passages), generator=draw)[: plan.most].sort().values.tolist()
    drawn = [passages[i] for i in order]
    say(f"Training on {len(drawn):,} passages; the encoder is {found.facts['encoder']['name']}.")
    lessons = Lessons.of(
        found.model, drawn, judged=judged, negatives=plan.negatives, weight=plan.lexical,
        spread=plan.spread, tell=lambda share: tell(0.4 * share, "encoding for training"),
    )  # fmt: skip
    torch.manual_seed(plan.seed)
    path, head = stages(recipe), None
    told: dict[str, Any] = {}
    what = digest([p.digest for p in drawn])
    for number, one in enumerate(path):
        new = one.build(found.model.head.dim)
        if head is None:
            begin(new, lessons)
        else:
            follow(new, head, lessons)
        new.to(device)
        state = FileState(folder / f"training-{number}.safetensors", what, "colberter")
        if fresh:
            state.clear()

        def show(share: float, doing: str, number: int = number) -> None:
            done = (number + share) / len(path)
            tell(0.4 + 0.6 * done, f"stage {number + 1} of {len(path)}: {doing}")

        history = train(
            new, lessons, plan, state=state, tell=show, setting=[what, length, number],
            model=found.model if plan.encoder else None,
        )  # fmt: skip
        told[f"stage {number + 1}"] = {
            name: sum(entry[name] for entry in history[-20:]) / len(history[-20:])
            for name in history[-1] if name != "seconds"
        }  # fmt: skip
        head = new
    assert head is not None
    found.model.use(head)
    facts = found.facts | {"training": told | {"plan": dataclasses.asdict(plan)}}
    return Retriever(found.model, facts, own=plan.encoder)
