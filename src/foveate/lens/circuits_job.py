"""The job of `foveate circuits`: channels from weights, then what happens without them.

    read the heads -> decompose OV -> score every component into every later head -> rank
    with a task: find the heads that look at the answer, remove what they are told, rescale it

Without a task no token is run: weights alone say who could talk to whom. With one, a component that
stands out into a mover's query is taken away at the last token: first for that mover alone (its
inhibition, attention to the answer minus that to another, should shrink), then for all (the answers
should get worse). As a control the same is done with random directions of the same heads' outputs.

The component that matters most is then set to multiples of what it is ("steered"), and the mover's
attention to the first, second ... listed word watched. Laundry also rescales: up to three of the
components taken away, those that inhibit most, times one factor that is chosen on other prompts
than it is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.lens.circuits import Heads, Spectrum
from foveate.lens.composition import (
    KINDS,
    Channel,
    Kind,
    chance,
    channels,
    component_scores,
    read_by,
    score_of,
    standardised,
    whole_scores,
)
from foveate.lens.interventions import END, Edit, Path
from foveate.lens.ioi import ioi
from foveate.lens.laundry import laundry
from foveate.lens.prompts import Answers, Prompts, ask, best_factor, movers
from foveate.lens.reading import Reading
from foveate.lens.steering import sweep
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole

TASKS = ("none", "ioi", "laundry")
FACTORS = (0.0, 0.5, 1.5, 2.0, 3.0)
STEPS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Circuits:
    """What is looked for in a model's heads.

    Attributes:
        fold: the gain of the norm before attention goes into the maps that read.
        offset: how far keys stand behind queries, where positions are rotary; None leaves the
            rotation out.
        kinds: of what later heads are fed: any of "q", "k", "v".
        top: channels to tell of each kind.
        into: later heads as "layer.head"; None is all.
        task: "ioi", "laundry", or "none" for weights alone.
        items: the longest list of the laundry task.
        prompts: of the task.
        movers: heads that are looked at closely.
        tried: components taken away, of each mover.
        seed: of prompts and controls.

    Raises:
        InputError: a number out of its range, or an unknown word.
    """

    fold: bool = True
    offset: int | None = None
    kinds: str = "qkv"
    top: int = 10
    into: Sequence[str] | None = None
    task: str = "none"
    items: int = 8
    prompts: int = 32
    movers: int = 2
    tried: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        Reading(self.fold, offset=self.offset)
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise InputError(f"Circuits(kinds={self.kinds!r}): expected letters out of qkv.")
        if self.task not in TASKS:
            raise InputError(f"Circuits(task={self.task!r}): {nearest(str(self.task), TASKS)}")
        for name in ("top", "prompts", "movers", "tried"):
            whole("Circuits", name, getattr(self, name), least=1)
        whole("Circuits", "items", self.items, least=3)
        self.places()

    def places(self) -> list[tuple[int, int]] | None:
        """`into` as numbers."""
        if self.into is None:
            return None
        found = []
        for text in self.into:
            layer, dot, head = str(text).partition(".")
            if not (dot and layer.isdecimal() and head.isdecimal()):
                raise InputError(f"Circuits(into={text!r}): expected layer.head, such as 9.6.")
            found.append((int(layer), int(head)))
        return found

    def __call__(
        self, model: nn.Module, tokenizer: Any = None, tell: Tell = lambda share, doing: None
    ) -> dict[str, Any]:
        """Look into a model.

        Args:
            model: any that `Reading` reads, in evaluation mode.
            tokenizer: of transformers, for a task.
            tell: takes the share that is done, and what it is doing.

        Returns:
            Plain data: "channels" by kind, "maps" (by kind the composition of whole heads and the
            highest z of a component, as N x N lists with None), and the task's figures.

        Raises:
            InputError: a model whose heads can't be read, or a head that isn't there.
        """
        if self.task != "none" and tokenizer is None:
            raise InputError(f"Circuits(task={self.task!r}): its prompts need a tokenizer.")
        tell(0.0, "reading the heads")
        look = Look(model, self, tell)
        facts = look.weights()
        if self.task != "none":
            facts["task"] = look.task(tokenizer)
        tell(1.0, "")
        return facts


class Look:
    """One look into a model: its heads, their components, and the scores of both."""

    def __init__(self, model: nn.Module, job: Circuits, tell: Tell) -> None:
        self.model, self.job, self.tell = model, job, tell
        read = Reading(job.fold, offset=job.offset)
        exact = read(model)
        self.spectrum: Spectrum = exact.ov().svd()
        self.heads: Heads = exact.to(torch.float32)
        self.raw: Heads = replace(read, fold=False)(model) if job.fold else exact
        # The largest of these tensors has N x r x N numbers.
        self.scores: dict[Kind, Tensor] = {}
        self.whole: dict[Kind, Tensor] = {}
        for number, kind in enumerate(self.kinds):
            tell(0.05 + 0.25 * number / len(self.kinds), f"scores into the {kind}")
            self.scores[kind] = component_scores(self.spectrum, self.heads, kind, job.offset)
            self.whole[kind] = whole_scores(self.heads, kind, job.offset)

    @property
    def kinds(self) -> list[Kind]:
        """Those that are told, and the query where a task needs it."""
        wanted = [kind for kind in KINDS if kind in self.job.kinds]
        return wanted if self.job.task == "none" or "q" in wanted else ["q", *wanted]

    def channels(self, kind: Kind, into: list[tuple[int, int]] | None, top: int) -> list[Channel]:
        """As `composition.channels`, from the scores at hand."""
        return channels(
            self.heads, self.spectrum, kind, offset=self.job.offset, into=into, top=top,
            scores=self.scores[kind], whole=self.whole[kind],
        )  # fmt: skip

    def direction(self, channel: Channel) -> Tensor:
        """v_i of a channel, (D, 1)."""
        at = self.heads.at(*channel.early)
        return self.spectrum.v[at, :, channel.component, None]

    def weights(self) -> dict[str, Any]:
        """What the weights alone say."""
        told, maps = {}, {}
        for kind in self.kinds:
            if kind not in self.job.kinds:
                continue
            found = self.channels(kind, self.job.places(), self.job.top)
            told[kind] = [self._told(one) for one in found]
            best = standardised(self.scores[kind]).nan_to_num(nan=-math.inf).amax(1)
            maps[kind] = {"whole": _listed(self.whole[kind]), "component": _listed(best)}
        layers = self.heads.layer.tolist()
        return {
            "heads": len(self.heads),
            "layers": max(layers) + 1,
            "names": [f"{a}.{b}" for a, b in zip(layers, self.heads.head.tolist())],
            "dim": self.heads.dim,
            "components": int(self.spectrum.s.shape[1]),
            "chance": chance(self.heads.dim),
            "folded": self.job.fold,
            "offset": self.job.offset,
            "rotary": any(self.heads.ropes.values()),
            "channels": told,
            "maps": maps,
        }

    def _told(self, one: Channel) -> dict[str, Any]:
        return {
            "channel": one.text, "early": list(one.early), "component": one.component,
            "late": list(one.late), "kind": one.kind, "score": one.score, "z": one.z,
            "unfolded": self._unfolded(one), "singular": one.singular, "effect": one.effect,
            "whole": one.whole, "whole_rank": one.whole_rank,
        }  # fmt: skip

    def _unfolded(self, one: Channel) -> float:
        """CS of the same written direction into the later head's maps without the norm's gain."""
        at = self.raw.at(*one.late)
        into = read_by(self.raw.only(at), one.kind, self.job.offset)
        return float(score_of(self.direction(one).mT, into))

    # -- the task ----------------------------------------------------------------------------------
    def task(self, tokenizer: Any) -> dict[str, Any]:
        """What a task says of the channels into the heads that answer it."""
        job = self.job
        if job.task == "ioi":
            prompts = ioi(tokenizer, job.prompts, job.seed)
        else:
            prompts = [laundry(tokenizer, job.prompts, job.items, seed=job.seed)]
        self.tell(0.35, "the model's own answers")
        base = ask(self.model, prompts, heads=None)
        chosen = movers(base, job.movers)
        found: dict[str, Any] = {
            "name": job.task, "prompts": sum(len(p.ids) for p in prompts),
            "accuracy": base.accuracy, "margin": base.margin, "movers": [],
        }  # fmt: skip
        for number, mover in enumerate(chosen):
            share = 0.4 + 0.35 * number / len(chosen)
            found["movers"].append(self._mover(mover, base, prompts, share))
        if job.task == "laundry":
            found |= self._laundry(tokenizer, self._inhibiting(found["movers"], chosen))
        return found

    def _mover(
        self, mover: tuple[int, int], base: Answers, prompts: list[Prompts], share: float
    ) -> dict[str, Any]:
        looked = base.looks[mover]
        facts: dict[str, Any] = {
            "head": f"{mover[0]}.{mover[1]}", "to_answer": looked[0], "to_others": looked[1],
            "inhibition": base.inhibition(mover), "components": [],
        }  # fmt: skip
        best = self.channels("q", [mover], self.job.tried)
        for one in best:
            self.tell(share, f"without {one.text}")
            v = self.direction(one)
            facts["components"].append(
                self._told(one) | self._without(mover, [one], [v], base, prompts)
            )
        self.tell(share, f"without all {len(best)} into {facts['head']}")
        directions = [self.direction(one) for one in best]
        facts["all"] = self._without(mover, best, directions, base, prompts)
        random = torch.Generator().manual_seed(self.job.seed)
        drawn = [self._random(one, random) for one in best]
        facts["control"] = self._without(mover, best, drawn, base, prompts)
        facts["steered"] = self._steered(mover, best, facts["components"], prompts, share)
        return facts

    def _steered(
        self,
        mover: tuple[int, int],
        best: Sequence[Channel],
        told: list[dict[str, Any]],
        prompts: list[Prompts],
        share: float,
    ) -> dict[str, Any]:
        """The mover's attention along the list, by what the strongest component tells it."""
        one = best[min(range(len(told)), key=lambda i: told[i]["inhibition_without"])]
        self.tell(share, f"steering {one.text}")
        coordinates = torch.tensor(STEPS)[:, None]
        found = sweep(self.model, prompts, one.early, self.direction(one), mover, coordinates)
        return {
            "channel": one.text, "times": list(STEPS), "scale": float(found.scale[0]),
            "attention": found.attention.tolist(),
        }  # fmt: skip

    def _random(self, one: Channel, random: torch.Generator) -> Tensor:
        """A random unit direction of what the same head writes."""
        written = self.spectrum.v[self.heads.at(*one.early)].cpu()
        drawn = torch.randn(written.shape[1], 1, generator=random, dtype=torch.float64)
        return torch.nn.functional.normalize(written.double() @ drawn, dim=0)

    def _edits(self, best: Sequence[Channel], directions: Sequence[Tensor], **more: Any
               ) -> list[Edit]:  # fmt: skip
        """Edits by head: components of one head are orthogonal, random directions made so."""
        heads: dict[tuple[int, int], list[Tensor]] = {}
        for one, v in zip(best, directions):
            heads.setdefault(one.early, []).append(v)
        return [
            Edit(*head, torch.linalg.qr(torch.cat(vs, 1)).Q, **more) for head, vs in heads.items()
        ]

    def _without(
        self,
        mover: tuple[int, int],
        best: Sequence[Channel],
        directions: Sequence[Tensor],
        base: Answers,
        prompts: list[Prompts],
    ) -> dict[str, Any]:
        """Figures when directions are removed at the last token: for the mover alone, then all."""
        edits = self._edits(best, directions, positions=[END])
        paths = [Path(edit, *mover, "q") for edit in edits]
        alone = ask(self.model, prompts, *paths, heads=[mover])
        everywhere = ask(self.model, prompts, *edits)
        before, after = base.inhibition(mover), alone.inhibition(mover)
        return {
            "inhibition_without": after,
            "inhibition_lost": (before - after) / abs(before) if before else 0.0,
            "accuracy_without": everywhere.accuracy,
            "margin_without": everywhere.margin,
        }

    def _inhibiting(
        self, told: list[dict[str, Any]], chosen: list[tuple[int, int]]
    ) -> list[Channel]:
        """The three components whose removal cost the movers the most inhibition."""
        found: dict[tuple[Any, int], tuple[float, Channel]] = {}
        for facts, mover in zip(told, chosen):
            for one, figures in zip(self.channels("q", [mover], self.job.tried),
                                    facts["components"]):  # fmt: skip
                lost = facts["inhibition"] - figures["inhibition_without"]
                key = (one.early, one.component)
                if key not in found or found[key][0] < lost:
                    found[key] = (lost, one)
        return [one for _, one in sorted(found.values(), key=lambda at: -at[0])[:3]]

    def _laundry(self, tokenizer: Any, best: list[Channel]) -> dict[str, Any]:
        """Accuracy by the list's length, and the best factor on these components."""
        job, lengths = self.job, sorted({*range(3, self.job.items, 2), self.job.items})
        by_items = {}
        for number, items in enumerate(lengths):
            self.tell(0.75 + 0.1 * number / len(lengths), f"lists of {items}")
            held = laundry(tokenizer, job.prompts, items, seed=job.seed, split="test")
            by_items[items] = ask(self.model, [held]).accuracy
        train = [laundry(tokenizer, job.prompts, job.items, seed=job.seed)]
        test = [laundry(tokenizer, job.prompts, job.items, seed=job.seed, split="test")]
        tried: list[dict[str, Any]] = []
        base = ask(self.model, train).accuracy
        for count in range(1, len(best) + 1):
            self.tell(0.85 + 0.05 * count, f"rescaling {count} of {len(best)}")
            used = best[:count]
            vs = [self.direction(one) for one in used]

            def score(factor: float, used: Any = used, vs: Any = vs) -> float:
                return ask(self.model, train, *self._edits(used, vs, factor=factor)).accuracy

            factor, scores = best_factor(score, FACTORS)
            tried.append({"components": [one.text for one in used], "factor": factor,
                          "train": scores[factor], "used": used, "vs": vs})  # fmt: skip
        top = max(tried, key=lambda one: one["train"])
        chosen_edit = self._edits(top.pop("used"), top.pop("vs"), factor=top["factor"])
        after = ask(self.model, test, *chosen_edit).accuracy
        return {
            "by_items": {str(items): value for items, value in by_items.items()},
            "rescaled": top | {"train_before": base, "test_before": by_items[job.items],
                               "test": after},
        }  # fmt: skip


def _listed(matrix: Tensor) -> list[list[float | None]]:
    return [[x if math.isfinite(x) else None for x in row] for row in matrix.tolist()]
