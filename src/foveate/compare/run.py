"""A run of compare: check, load, measure round by round, and say what to use.

Whatever is measured is on the disk before the next round begins; started again with the same
arguments, a run goes on where it was stopped and measures nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveate.compare.environment import environment
from foveate.compare.listener import Listener
from foveate.compare.options import Options
from foveate.compare.plan import Cell, Entry, Plan
from foveate.compare.recommend import Recommendation, recommend
from foveate.compare.report import write
from foveate.compare.rounds import Bench
from foveate.compare.summary import Row, summarise
from foveate.compare.validate import Job, validate
from foveate.hf.demo_models import DEMOS
from foveate.hf.fit.artefacts import Shelf, contents
from foveate.hf.load import load_weights
from foveate.runs.drawing import need_matplotlib
from foveate.runs.records import Records


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        job: the checked input.
        plan: what was measured.
        rows: by length, then in the order of the methods.
        recommendation: the answer.
        environment: of the run.
        measured: cells measured now; found: cells that were there already.
        files: what was written, by kind.
        raw: the records behind the rows, each with its cell and values.
    """

    job: Job
    plan: Plan
    rows: list[Row]
    recommendation: Recommendation
    environment: dict[str, Any]
    measured: int
    found: int
    files: dict[str, Path]
    raw: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for --json."""
        return {
            "recommendation": self.recommendation.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "run": self.plan.fingerprint,
            "environment": self.environment,
            "measured": self.measured,
            "found": self.found,
            "files": {kind: str(path) for kind, path in self.files.items()},
        }


def compare(options: Options, listener: Listener | None = None) -> Result:
    """Measure attentions against dense and write the report.

    Args:
        options: what was asked for.
        listener: hears of the progress.

    Raises:
        FoveateError: bad input, before any work.
    """
    listener = Listener() if listener is None else listener
    before = torch.get_num_threads()
    try:
        if options.threads is not None and options.threads > 0:
            torch.set_num_threads(options.threads)
        return _compare(options, listener)
    finally:
        torch.set_num_threads(before)


def _compare(options: Options, listener: Listener) -> Result:
    need_matplotlib()
    job = validate(options, listener.say)
    where = environment(job.device) | {"threads": torch.get_num_threads()}
    model, made = _fitted(job, listener)
    plan = Plan(job.entries, job.lengths, job.passes, fingerprint(job, where) | made)
    with Records(options.folder, fresh=options.fresh) as records:
        for note in records.notes:
            listener.say(note)
        cells = list(plan.cells())
        done = {cell for cell in cells if plan.key(cell) in records}
        total, had = sum(map(_work, cells)), sum(map(_work, done))
        found = len(done)
        if done:
            listener.say(
                f"{found} of {len(cells)} cells were measured before; going on from there."
            )
        for entry, length in _complete(plan, done):
            listener.row(_row(job, plan, records, entry, length))
        if len(done) < len(cells):
            if model is None:
                listener.say(f"Loading {job.info.name}")
                model = load_weights(job.info, dtype=job.dtype, device=job.device)
            job = replace(job, info=replace(job.info, parameters=_count(model)))
            listener.begin(total, had)
            _measure(job, plan, records, Bench(job, model), done, listener)
        rows = [
            _row(job, plan, records, entry, length)
            for length in plan.lengths
            for entry in plan.entries
        ]
        answer = recommend(
            rows,
            max_loss=options.max_ppl_loss,
            max_needle_loss=options.max_needle_loss,
            loading=loading(job),
        )
        files = {"results": records.path}
        raw = [
            {"cell": cell.as_dict(), "values": records.get(plan.key(cell)) or {}} for cell in cells
        ]
    result = Result(job, plan, rows, answer, where, len(cells) - found, found, files, raw)
    files |= write(result)
    return result


def _fitted(job: Job, listener: Listener) -> tuple[Any, dict[str, Any]]:
    """The model and what was fitted on it, where a method asks for that; else None and nothing.

    Figures depend on it, so that it is looked at before asking what was measured already.

    Raises:
        InputError: a method wasn't fitted on this model yet; says how to.
    """
    entries = [entry for entry in job.entries if entry.fitted]
    if not entries:
        return None, {}
    listener.say(f"Loading {job.info.name}")
    model = load_weights(job.info, dtype=job.dtype, device=job.device)
    shelf = Shelf(model)
    for entry in entries:
        shelf.bind(entry.key, entry.method())
    return model, {"fitted": {key: contents(one) for key, (one, _) in shelf.taken.items()}}


def _measure(
    job: Job, plan: Plan, records: Records, bench: Bench, done: set[Cell], listener: Listener
) -> None:
    bench.warm_up([entry.name for entry in plan.entries], plan.lengths[0])
    for round_ in plan.rounds(set(done)):
        names = " and ".join(cell.entry.name for cell in round_.cells)
        listener.advance(
            0.0, f"{round_.length:,} tokens, pass {round_.number + 1} of {plan.passes}: {names}"
        )
        for cell, values in bench.run(round_):
            records.add(plan.key(cell), cell.as_dict(), values)
            done.add(cell)
        listener.advance(sum(map(_work, round_.cells)), "")
        for cell in round_.cells:
            if all(Cell(cell.entry, cell.length, n) in done for n in range(plan.passes)):
                listener.row(_row(job, plan, records, cell.entry, cell.length))


def fingerprint(job: Job, where: dict[str, Any]) -> dict[str, Any]:
    """All that the figures depend on, besides method, length and prompt."""
    options = job.options
    return {
        "model": job.info.name,
        "weights": job.info.fingerprint,
        "text": job.text.title,
        "text_sha256": job.text.sha256,
        "device": where.get("gpu", where["device"]),
        "processor": where["processor"],
        "threads": where["threads"],
        "dtype": str(job.dtype).removeprefix("torch."),
        "batch": options.batch,
        "passes": job.passes,
        "needle_depths": list(job.depths),
        "decode_tokens": options.decode_tokens if job.info.kind == "causal-lm" else 0,
        "engine": where["engine"],
        "versions": {name: where[name] for name in ("foveate", "code", "torch", "transformers")},
    }


def loading(job: Job) -> str:
    """Lines of Python that make `model` as it was measured."""
    source, kind = job.options.model, job.info.kind
    plain = job.device.type == "cpu" and job.dtype == torch.float32
    if source is None or source in DEMOS or kind == "audio-encoder":
        given = [] if source is None else [repr(source)]
        if not plain:
            given += [f"dtype={job.dtype}", f'device="{job.device}"']
        head = "" if plain else "import torch\n"
        return (
            f"{head}from foveate.hf.load import load_model\n"
            f"model, tokenizer, info = load_model({', '.join(given)})"
        )
    auto = "AutoModelForCausalLM" if kind == "causal-lm" else "AutoModel"
    name = str(job.dtype).removeprefix("torch.")
    move = "" if job.device.type == "cpu" else f'.to("{job.device}")'
    address = job.info.address if job.info.folder is None else str(job.info.folder.resolve())
    return (
        f"from transformers import {auto}\n"
        f'model = {auto}.from_pretrained({address!r}, dtype="{name}"){move}'
    )


def _complete(plan: Plan, done: set[Cell]) -> list[tuple[Entry, int]]:
    return [
        (entry, length)
        for length in plan.lengths
        for entry in plan.entries
        if all(Cell(entry, length, n) in done for n in range(plan.passes))
    ]


def _row(job: Job, plan: Plan, records: Records, entry: Entry, length: int) -> Row:
    keys = [plan.key(Cell(entry, length, n)) for n in range(plan.passes)]
    values = [found for key in keys if (found := records.get(key)) is not None]
    return summarise(entry, length, values, job.dtype)


def _work(cell: Cell) -> float:
    """Expected work of a cell, in no particular unit: linear and quadratic parts of a pass."""
    return cell.length * (1 + cell.length / 8192) + 512


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
