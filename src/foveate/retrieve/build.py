"""The job of `foveate index`: documents of a folder become an index, segment by segment.

    read the documents -> the retriever (the index's own, one that is given, or one trained on these
    documents) -> encode what the index lacks -> show it to readers

Stopped at any moment, the same command goes on; run again after documents were added or changed, it
encodes these alone. The index is `foveate.retrieve.writer`'s.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.methods.colberter import Colberter
from foveate.ops.errors import InputError
from foveate.retrieve import model as retrievers
from foveate.retrieve.collection import Passage, read_judged, read_passages
from foveate.retrieve.fit import Plan, fit_on
from foveate.retrieve.model import Retriever
from foveate.retrieve.segment import Row
from foveate.retrieve.storage import facts_of, storage
from foveate.retrieve.writer import Writer
from foveate.runs.records import digest

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Job:
    """An index to be made, or to be gone on with.

    Attributes:
        documents: the folder that is read.
        out: the index.
        recipe: of the retriever that is trained; None is the index's own, or the default.
        encoder: a text encoder that it stands on; None likewise (minilm).
        retriever: a folder with a trained one, instead of training; None trains.
        plan: of the training.
        judged: a folder with judged questions of these documents (its split "train"), to train on
            beside the documents' own; None has none.
        length: most sub-words of a passage; None is the index's own, or 256.
        words: most words of a passage that is cut from a text file.
        prune: forget passages whose documents aren't there any more.
        fresh: begin anew; readers see what is there until all is there anew.
        batch: passages that are encoded together.
        per: passages of a segment.
        device: to encode on.
    """

    documents: Path
    out: Path
    recipe: Colberter | None = None
    encoder: str | None = None
    retriever: Path | None = None
    plan: Plan = field(default_factory=Plan)
    judged: Path | None = None
    length: int | None = None
    words: int = 120
    prune: bool = False
    fresh: bool = False
    batch: int = 32
    per: int = 512
    device: torch.device = torch.device("cpu")


def run(job: Job, tell: Tell, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Make the index, or go on with it.

    Returns:
        What is in it, and its bytes.

    Raises:
        InputError: bad input, before anything is trained or encoded; or another process writes.
        DamagedError: what is there was changed.
    """
    for name in ("batch", "per"):
        if getattr(job, name) < 1:
            raise InputError(f"{name}={getattr(job, name)}: expected 1 or more.")
    if job.retriever is not None and (job.recipe, job.encoder, job.length) != (None,) * 3:
        raise InputError(
            f"{job.retriever} brings its own sizes, encoder and length; leave out the options that "
            "set these."
        )
    passages = read_passages(job.documents, job.words)
    with Writer(job.out, fresh=job.fresh) as writer:
        retriever, settings = _retriever(job, writer, passages, tell, say)
        missing = writer.plan(passages)
        writer.begin(settings, len(passages))
        for state in job.out.glob("training-*.safetensors"):
            state.unlink()
        there = len(passages) - len(missing)
        if there:
            say(f"{there:,} of {len(passages):,} passages are there already.")
        for start in range(0, len(missing), job.per):
            some = missing[start : start + job.per]
            rows, facts = encode(
                retriever, some, job.batch,
                lambda share, at=start, of=some: tell(  # type: ignore[misc]
                    0.5 + 0.5 * (at + share * len(of)) / len(missing), "encoding"
                ),
            )  # fmt: skip
            writer.add(some, rows, facts)
        counts = writer.finish(passages, prune=job.prune)
        recipe = retriever.model.recipe
        return {
            "index": str(job.out), "documents": str(job.documents), **counts,
            "encoded": len(missing), "encoder": retriever.facts["encoder"]["name"],
            "recipe": dataclasses.asdict(recipe), "length": retriever.model.words.length,
            "storage": storage(writer.base, recipe, retriever.model.head.dim),
        }  # fmt: skip


def encode(
    retriever: Retriever,
    passages: Sequence[Passage],
    batch: int = 32,
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[list[Row], dict[str, int]]:
    """Passages as a segment keeps them, and counts of what they were made of."""
    model = retriever.model
    tokens = model.words([p.text for p in passages])
    rows: list[Row | None] = [None] * len(passages)
    done = 0
    for at, found in model.encodings(tokens, passage=True, batch=batch):
        for i, place in enumerate(at):
            kept = found.real[i]
            rows[place] = (
                found.single[i].cpu(), found.vectors[i, kept].cpu(), found.ids[i, kept].cpu(),
            )  # fmt: skip
        done += len(at)
        tell(done / len(passages))
    full = [row for row in rows if row is not None]
    return full, facts_of(passages, tokens)


def _retriever(
    job: Job, writer: Writer, passages: Sequence[Passage], tell: Tell, say: Callable[[str], None]
) -> tuple[Retriever, dict[str, Any]]:
    """The index's own retriever; else the one that is given, or a trained one, put into it."""
    if writer.settings is not None:
        settings = writer.settings
        folder = job.out / settings["model"]
        if retrievers.sums(folder) != settings["files"]:
            raise InputError(
                f"{folder} is damaged: its checksums aren't those that were written. Restore it "
                "from a copy, or build the index anew with --fresh."
            )
        found = retrievers.load(folder, device=job.device, say=say)
        _agree(job, found, settings)
        return found, settings
    if job.retriever is not None:
        found = retrievers.load(job.retriever, device=job.device, say=say)
    else:
        found = fit_on(
            passages, job.recipe, job.plan, job.encoder, job.length or 256, job.out, job.device,
            lambda share, doing: tell(0.5 * share, doing), say, fresh=job.fresh,
            judged=None if job.judged is None else read_judged(job.judged, "train"),
        )  # fmt: skip
    work = job.out / "model-new"
    files = retrievers.save(work, found)
    name = f"model-{digest(files)[:16]}"  # of all files: one head may stand on two encoders
    there = job.out / name
    if there.exists() and retrievers.sums(there) != files:  # half removed when one was killed
        shutil.rmtree(there)
    if not there.exists():
        work.rename(there)
    recipe = found.model.recipe
    settings = {
        "model": name, "files": files, "single": recipe.single, "width": recipe.width,
        "exact": recipe.exact, "dim": found.model.head.dim,
    }  # fmt: skip
    return found, settings


def _agree(job: Job, found: Retriever, settings: dict[str, Any]) -> None:
    """Refuse options that the index in the folder wasn't made with."""
    model = found.model
    asked: list[tuple[str, Any, Any]] = [("recipe", job.recipe, model.recipe)]
    asked.append(("length", job.length, model.words.length))
    if job.encoder is not None:
        fingerprint = retrievers.locate(job.encoder).fingerprint
        asked.append(("encoder", fingerprint, found.facts["encoder"]["fingerprint"]))
    if job.retriever is not None:
        head = retrievers.sums(job.retriever).get(retrievers.HEAD)
        asked.append(("retriever", head, settings["files"][retrievers.HEAD]))
    for name, wanted, there in asked:
        if wanted is not None and wanted != there:
            raise InputError(
                f"The index in {job.out} has {name} {there}, not {wanted}; leave that out to go "
                "on with it, or build it anew with --fresh."
            )
