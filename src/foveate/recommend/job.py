"""The job of `foveate recommend train`: data, training, figures, a recommender on the disk.

Everything that is needed to go on lies in the output folder; the same command goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.models.recommender import BPRMF
from foveate.ops.errors import InputError
from foveate.recommend import pairwise, sequential
from foveate.recommend.answers import TENSORS, keep
from foveate.recommend.dataset import Dataset
from foveate.recommend.files import read_folder
from foveate.recommend.loop import Done, Plan, train
from foveate.recommend.pairwise import Pairwise, pretraining
from foveate.recommend.sequences import read as read_sequences
from foveate.recommend.sequential import Sequential
from foveate.runs.machine import machine
from foveate.runs.records import writable_folder

KINDS = (*pairwise.KINDS, *sequential.KINDS)
TRAINING, PRETRAINING = "training.safetensors", "pretraining.safetensors"
DEMO = "ml-100k"


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        data: "ml-100k", or a folder: in KGAT's format, or with sequences.txt for KINDS that
            recommend the next item.
        setting: of `pairwise` or `sequential`.
        plan: how long.
        out: folder of the recommender and of all that is needed to go on.
        pretrain: whether KGAT starts from a BPR-MF that is trained first by the same plan.
        fresh: begin anew.
        ks: K of the figures.
    """

    data: str
    setting: pairwise.Setting | sequential.Setting
    plan: Plan = field(default_factory=Plan)
    out: Path = Path("foveate-recommender")
    pretrain: bool = True
    fresh: bool = False
    ks: tuple[int, ...] = (5, 10, 20)


def run(
    job: Job, tell: Callable[[float, str], None], say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Train, judge on the test part, and keep.

    Returns:
        What was trained on what and how well it does; also in `recommender.json`.

    Raises:
        InputError: bad input, or the folder holds another training.
        MissingPackageError: the demo's data isn't installed.
    """
    writable_folder(job.out)
    if job.fresh:
        for name in (TRAINING, PRETRAINING, TENSORS):
            (job.out / name).unlink(missing_ok=True)
    trainee: Pairwise | Sequential
    if isinstance(job.setting, sequential.Setting):
        sequences = read_sequences(job.data)
        say(sequences.describe())
        trainee, first = Sequential(job.setting, sequences, job.plan.seed), None
        described = sequences.describe()
        kind = "sasrec" if job.setting.recipe.alpha == 1 else "mqsa-ted"
    else:
        data = read(job.data, job.plan.seed)
        described, kind = data.describe(), job.setting.kind
        say(described)
        trainee, first = _pairwise(job, job.setting, data, tell, say)
    pretrained = first is not None
    told = (lambda share, doing: tell(0.3 + 0.7 * share, doing)) if pretrained else tell
    done = train(trainee, job.plan, job.out / TRAINING, told)
    facts: dict[str, Any] = {
        "kind": kind,
        "data": described,
        "setting": trainee.setting(),
        "plan": asdict(job.plan),
        "parameters": sum(p.numel() for p in trainee.model.parameters()),
        "pretraining": None if first is None else _short(first),
        "training": _short(done),
        "history": done.history,
        "test": trainee.figures("test", job.ks),
        "by sparsity": trainee.by_sparsity(max(job.ks)) if isinstance(trainee, Pairwise) else [],
        "folder": str(job.out),
        "environment": machine(torch.device("cpu")),
    }
    keep(trainee, facts, job.out)
    return facts


def read(source: str, seed: int = 0) -> Dataset:
    """A data set with a validation part: the demo's, or a folder in KGAT's format."""
    if source == DEMO:
        from foveate.recommend.movielens import movielens

        return movielens()
    data = read_folder(source)
    if not len(data.test):
        raise InputError(f"{source}: test.txt has no pair that isn't in train.txt.")
    return data.held_out(0.1, seed)


def _pairwise(
    job: Job,
    setting: pairwise.Setting,
    data: Dataset,
    tell: Callable[[float, str], None],
    say: Callable[[str], None],
) -> tuple[Pairwise, Done | None]:
    if setting.kind != "kgat" or not job.pretrain:
        return Pairwise(setting, data, job.plan.seed), None
    before = Pairwise(pretraining(setting), data, job.plan.seed)
    done = train(
        before, job.plan, job.out / PRETRAINING,
        lambda share, doing: tell(0.3 * share, f"BPR-MF, {doing}"),
    )  # fmt: skip
    say(f"KGAT starts from a BPR-MF whose {setting.judge} is {done.best:.4f} (validation)")
    assert isinstance(before.model, BPRMF)
    told = {"start": [done.best_epoch, done.best]}
    return Pairwise(setting, data, job.plan.seed, before.model, told), done


def _short(done: Done) -> dict[str, Any]:
    return {
        "best": done.best, "best_epoch": done.best_epoch, "epochs": done.epochs,
        "resumed_at": done.resumed_at, "seconds": round(done.seconds, 1),
    }  # fmt: skip
