"""One look into a model: what its weights say of its heads, and what a task says of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
from foveate.ops.errors import InputError

if TYPE_CHECKING:
    from foveate.lens.circuits_job import Circuits

FACTORS = (0.0, 0.5, 1.5, 2.0, 3.0)
STEPS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
Tell = Callable[[float, str], None]
Keep = Callable[[dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]
"""Takes what is measured (plain data) and how; returns the figures, measured or found again."""


def measure_anew(what: dict[str, Any], how: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Keep nothing."""
    return how()


class Look:
    """One look into a model: its heads, their components, and the scores of both."""

    def __init__(
        self, model: nn.Module, job: Circuits, tell: Tell, keep: Keep = measure_anew
    ) -> None:
        self.model, self.job, self.tell, self.keep = model, job, tell, keep
        read = Reading(job.fold, offset=job.offset)
        exact = read(model)
        if len(exact.layer.unique()) < 2:
            raise InputError(
                "The model has one layer, so no head reads what another wrote; channels need two."
            )
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
        base = self._base(prompts)
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

    def _base(self, prompts: list[Prompts]) -> Answers:
        """The model's own answers, and where all of its heads look."""

        def measure() -> dict[str, Any]:
            found = ask(self.model, prompts, heads=None)
            looks = [[*head, *seen] for head, seen in found.looks.items()]
            return {"accuracy": found.accuracy, "margin": found.margin, "looks": looks}

        kept = self.keep({"what": "base"}, measure)
        looks = {(layer, head): (a, b) for layer, head, a, b in kept["looks"]}
        return Answers(kept["accuracy"], kept["margin"], looks)

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
        facts["control"] = self._without(mover, best, drawn, base, prompts, random=True)
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

        def measure() -> dict[str, Any]:
            found = sweep(
                self.model, prompts, one.early, self.direction(one), mover,
                torch.tensor(STEPS)[:, None],
            )  # fmt: skip
            return {"scale": float(found.scale[0]), "attention": found.attention.tolist()}

        what = {"what": "steered", "mover": list(mover), "channel": one.text}
        return {"channel": one.text, "times": list(STEPS)} | self.keep(what, measure)

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
        random: bool = False,
    ) -> dict[str, Any]:
        """Figures when directions are removed at the last token: for the mover alone, then all."""
        edits = self._edits(best, directions, positions=[END])

        def measure() -> dict[str, Any]:
            paths = [Path(edit, *mover, "q") for edit in edits]
            alone = ask(self.model, prompts, *paths, heads=[mover])
            everywhere = ask(self.model, prompts, *edits)
            return self._lost(base, alone, everywhere, mover)

        what = {"what": "without", "mover": list(mover),
                "channels": [one.text for one in best], "random": random}  # fmt: skip
        return self.keep(what, measure)

    @staticmethod
    def _lost(
        base: Answers, alone: Answers, everywhere: Answers, mover: tuple[int, int]
    ) -> dict[str, Any]:
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
            by_items[items] = self._right(tokenizer, items, "test")
        tried = []
        base = self._right(tokenizer, job.items, "train")
        for count in range(1, len(best) + 1):
            self.tell(0.85 + 0.05 * count, f"rescaling {count} of {len(best)}")
            used = best[:count]

            def score(factor: float, used: list[Channel] = used) -> float:
                return self._right(tokenizer, job.items, "train", used, factor)

            factor, scores = best_factor(score, FACTORS)
            tried.append((scores[factor], used, factor))
        train, used, factor = max(tried, key=lambda one: one[0])
        return {
            "by_items": {str(items): value for items, value in by_items.items()},
            "rescaled": {
                "components": [one.text for one in used], "factor": factor, "train": train,
                "train_before": base, "test_before": by_items[job.items],
                "test": self._right(tokenizer, job.items, "test", used, factor),
            },
        }  # fmt: skip

    def _right(
        self,
        tokenizer: Any,
        items: int,
        split: str,
        used: Sequence[Channel] = (),
        factor: float = 1.0,
    ) -> float:
        """Accuracy on lists of one length, with components rescaled."""

        def measure() -> dict[str, Any]:
            lists = laundry(tokenizer, self.job.prompts, items, seed=self.job.seed, split=split)
            edits = self._edits(used, [self.direction(one) for one in used], factor=factor)
            return {"accuracy": ask(self.model, [lists], *edits).accuracy}

        what = {"what": "lists", "items": items, "split": split, "factor": factor,
                "channels": [one.text for one in used]}  # fmt: skip
        return float(self.keep(what, measure)["accuracy"])


def _listed(matrix: Tensor) -> list[list[float | None]]:
    return [[x if math.isfinite(x) else None for x in row] for row in matrix.tolist()]
