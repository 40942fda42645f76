"""The job of `foveate inspect`: measure the heads of a model on a text, and suggest patterns.

    short segments -> sink rates;   long windows, layer by layer -> figures, maps, trials
    -> similarity of layers -> an assignment within a budget -> report.html, suggestion.json

What was measured lies in results.jsonl, a record for each window and layer; the same command goes
on from there.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.hf.load import ModelInfo, load_tokenizer, load_weights, locate
from foveate.lens.probe import Model, Seen, Watch
from foveate.lens.report import page
from foveate.lens.summary import summary
from foveate.lens.trials import candidates
from foveate.ops.errors import InputError
from foveate.runs.activations import Activations
from foveate.runs.drawing import need_matplotlib
from foveate.runs.heads import Wanted, similarity
from foveate.runs.machine import machine
from foveate.runs.records import Records, digest, writable_folder
from foveate.runs.text import Text

Tell = Callable[[float, str], None]
EPSILONS = (0.2, 0.3, 0.4)
SEGMENT, SEGMENTS = 64, 100
FACTS, SUGGESTION, REPORT = "inspect.json", "suggestion.json", "report.html"
SHARE = 0.02  # of the whole job that the short segments take, for the progress


@dataclass(frozen=True)
class Job:
    """An inspection.

    Attributes:
        model: as `foveate.hf.load.load_model` takes it, a causal language model.
        text: to look at.
        out: folder of everything that is written.
        length: tokens of a window.
        windows: how many, spread over the text.
        candidates: comma-separated patterns that heads choose from; None is `trials.candidates`.
        budget: of the suggested assignment: mean share of dense attention's tiles.
        wanted: what is measured.
        device: to run on.
        threads: of the CPU; None is torch's own choice.
        fresh: put earlier results aside.
    """

    model: str | None
    text: Text = field(repr=False)
    out: Path = Path("foveate-inspect")
    length: int = 4096
    windows: int = 1
    candidates: str | None = None
    budget: float = 0.3
    wanted: Wanted = Wanted()
    device: torch.device = torch.device("cpu")
    threads: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, least in (("length", 8), ("windows", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)}: expected {least} or more.")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: expected 1 or more.")
        if not 0 < self.budget <= 1:
            raise InputError(f"--budget {self.budget}: expected a share above 0, up to 1.")


def run(job: Job, tell: Tell, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Inspect, and write report.html, inspect.json, suggestion.json and results.jsonl.

    Args:
        job: what is asked for.
        tell: takes the share that is done, 0 to 1, and what is being done.
        say: takes a line for people.

    Returns:
        The facts, as in inspect.json.

    Raises:
        InputError: bad input, before any weights are read.
        MissingPackageError: matplotlib isn't there.
    """
    need_matplotlib()
    info = locate(job.model, progress=say)
    if info.kind != "causal-lm":
        raise InputError(f"{info.name} is no causal language model, which is what inspect reads.")
    if info.max_positions is not None and job.length > info.max_positions:
        raise InputError(
            f"--length {job.length} is beyond the {info.max_positions} positions of {info.name}."
        )
    names = candidates(job.candidates, job.length)
    writable_folder(job.out)
    ids = _tokens(job, info)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    fixed = {
        "model": info.fingerprint, "text": job.text.sha256, "length": job.length,
        "names": list(names), "wanted": str(job.wanted), "windows": job.windows,
    }  # fmt: skip
    with Records(job.out, fresh=job.fresh) as records:
        for note in records.notes:
            say(note)
        work = _Work(job, info, names, ids, records, digest(fixed), tell, say)
        found = work.measured()
    facts = summary(found, names, job.budget) | {
        "model": info.name, "fingerprint": info.fingerprint, "text": job.text.title,
        "length": job.length, "windows": job.windows, "budget": job.budget,
        "near": job.wanted.near, "environment": machine(job.device),
    }  # fmt: skip
    given = job.out / SUGGESTION
    _write(given, json.dumps(facts["suggestion"].pop("assignment"), indent=2) + "\n")
    facts["suggestion"] |= _named(given, info, facts["suggestion"])
    maps = {(one["window"], one["layer"]): one.pop("maps") for one in found["layers"]}
    _write(job.out / REPORT, page(facts, {k: v for k, v in maps.items() if k[0] == 0}))
    facts["files"] = {
        "report": str(job.out / REPORT), "facts": str(job.out / FACTS),
        "suggestion": str(given), "results": str(job.out / "results.jsonl"),
    }  # fmt: skip
    _write(job.out / FACTS, json.dumps(facts, indent=1, allow_nan=False) + "\n")
    return facts


def _named(path: Path, info: ModelInfo, suggestion: dict[str, Any]) -> dict[str, str]:
    """The suggestion as a method, and how to compare and use it."""
    method = f"by-head(file={str(path)!r})"
    rivals = [method, *(suggestion[k] for k in ("uniform",) if suggestion[k])]
    model = "" if info.source is None else f" {info.source}"
    return {
        "method": method,
        "compare": f'foveate compare{model} --methods "{", ".join(rivals)}"',
        "use": f'foveate.use(model, "{method}")',
    }


def _tokens(job: Job, info: ModelInfo) -> Tensor:
    tokenizer = load_tokenizer(info)
    ids = torch.tensor(
        tokenizer(job.text.content, add_special_tokens=False, verbose=False).input_ids
    )
    if len(ids) < job.length:
        raise InputError(
            f"The text ({job.text.title}) has {len(ids):,} tokens, too few for --length "
            f"{job.length}; give a longer --text or a smaller --length."
        )
    return ids


def _write(path: Path, text: str) -> None:
    """A file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


@dataclass
class _Work:
    """What is measured, with the records of what was."""

    job: Job
    info: ModelInfo
    names: tuple[str, ...]
    ids: Tensor
    records: Records
    key: str
    tell: Tell
    say: Callable[[str], None]
    _model: Model | None = None

    @property
    def model(self) -> Model:
        """The model, loaded when it's first needed."""
        if self._model is None:
            self.say(f"Loading {self.info.name}")
            self._model = Model(load_weights(self.info, device=self.job.device))
        return self._model

    def cell(self, **what: Any) -> tuple[str, dict[str, Any]]:
        """A record's key, and what it is of."""
        return digest({"job": self.key, "cell": what}), what

    def measured(self) -> dict[str, Any]:
        """All figures: of segments, of layers by window, and the layers' similarity by window."""
        segments = self._segments()
        layers, alike = [], []
        for window in range(self.job.windows):
            self._window(window)
            key, _ = self.cell(kind="similarity", window=window)
            held = self.records.get(key)
            assert held is not None
            alike.append(held)
            for layer in held["layers"]:
                one = self.records.get(self.cell(kind="layer", window=window, layer=layer)[0])
                assert one is not None
                layers.append({"window": window, "layer": layer} | one)
        return {"segments": segments, "layers": layers, "similarity": alike}

    def _segments(self) -> dict[str, Any]:
        """Sink rates of the first two tokens on segments of 64 tokens (arXiv 2410.10781)."""
        key, what = self.cell(kind="segments")
        held = self.records.get(key)
        if held is not None:
            return held
        count = min(SEGMENTS, len(self.ids) // SEGMENT)
        if not count:
            return {"count": 0, "length": SEGMENT, "rates": {}, "heads": {}}
        self.tell(0.0, "sink rates")
        starts = torch.linspace(0, len(self.ids) - SEGMENT, count).long()
        found = self.model.importance(
            torch.stack([self.ids[s : s + SEGMENT] for s in starts.tolist()])
        )
        alpha = torch.stack(list(found.values()))  # (layers, N, Hq, 2)
        above = {eps: (alpha > eps).float() for eps in EPSILONS}
        values = {
            "count": count, "length": SEGMENT,
            "rates": {str(eps): above[eps].mean((0, 1, 2)).tolist() for eps in EPSILONS},
            "heads": {str(layer): above[0.3][i, ..., 0].mean(0).tolist()
                      for i, layer in enumerate(found)},
            "share": {str(layer): alpha[i, ..., 0].mean(0).tolist()
                      for i, layer in enumerate(found)},
        }  # fmt: skip
        self.records.add(key, what, values)
        return values

    def _window(self, window: int) -> None:
        """One forward over a long window: what isn't recorded of its layers is measured."""
        alike_key, alike = self.cell(kind="similarity", window=window)
        if alike_key in self.records:
            return
        done = 0
        layers = self.model.layers
        missing = frozenset(
            layer
            for layer in layers
            if self.cell(kind="layer", window=window, layer=layer)[0] not in self.records
        )
        if len(missing) < len(layers):
            self.say(f"{len(layers) - len(missing)} of {len(layers)} layers were measured before.")
        states: dict[int, Activations] = {}
        sampled: dict[int, Tensor] = {}

        def layer_done(layer: int, seen: Seen) -> None:
            nonlocal done
            sampled[layer] = seen.sampled
            done += 1
            if seen.figures is not None and seen.trials is not None:
                key, what = self.cell(kind="layer", window=window, layer=layer)
                self.records.add(key, what, _plain(seen, states.get(layer)))
            share = (window + done / len(layers)) / self.job.windows
            self.tell(SHARE + (1 - SHARE) * share, f"layer {layer}")

        watch = Watch(
            self.job.wanted, missing, self.names, self.model.weights(), done=layer_done
        )  # fmt: skip
        spare = len(self.ids) - self.job.length
        start = spare * window // max(1, self.job.windows - 1) if self.job.windows > 1 else 0
        ids = self.ids[None, start : start + self.job.length]
        self.model.watched(ids, watch, states.__setitem__)
        maps = [sampled[layer] for layer in layers]
        self.records.add(
            alike_key,
            alike,
            {
                "layers": list(layers),
                "maps": similarity(maps).tolist(),
                "apart": similarity(maps, skip=self.job.wanted.sinks).tolist(),
            },
        )


def _plain(seen: Seen, states: Activations | None) -> dict[str, Any]:
    """A layer's figures as plain data, means over the batch."""
    f, trials = seen.figures, seen.trials
    assert f is not None and trials is not None

    def each(x: Tensor) -> list[float]:
        return [round(value, 6) for value in x.float().mean(0).tolist()]

    maps = None
    if f.maps is not None:
        # Brightness goes with the logarithm of a cell's weight over that of uniform attention.
        level = (f.maps.float().mean(0) * f.lse.shape[2]).clamp_min(1e-3).log10()
        maps = {
            "cells": f.maps.shape[-1],
            "heads": [
                base64.b64encode(one.contiguous().numpy().tobytes()).decode()
                for one in ((level + 3) / 6 * 255).clamp(0, 255).byte().cpu()
            ],
        }
    return {
        "importance": each(f.importance[..., 0]),
        "strongest": f.importance.mean(0).argmax(-1).tolist(),
        "sink_share": each(f.sink_share),
        "entropy": each(f.entropy),
        "spread": each(f.spread),
        "distance": each(f.distance),
        "near": each(f.near),
        "no_op": each(f.no_op),
        "drain": each(f.drain),
        "sink_cosine": each(f.sink_cosine),
        "other_cosine": each(f.other_cosine),
        "output_rank": each(f.output_rank),
        "map_rank": each(f.map_rank),
        "density": {str(mass): each(x) for mass, x in f.density.items()},
        "states": None if states is None else states.as_dict(),
        "trials": {name: {"cost": t.cost, "harm": t.harm} for name, t in trials.items()},
        "maps": maps,
    }
