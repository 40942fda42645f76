"""The job of `foveate compress`: EchoAtt on a trained model, from its weights to a smaller model.

    look at real text -> choose followers -> build the student -> distil, then adjust -> measure,
    save, load again

Training on the user's text makes any model better at it. So that this isn't taken for what sharing
does, the original goes through the second stage as well, and its perplexity stands beside the
student's.

What was found out and trained so far lies in the output folder; the same command goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.compress import measure
from foveate.hf.fit.frozen import FrozenModel
from foveate.hf.fit.job import FileState
from foveate.hf.fit.texts import TextBatches
from foveate.hf.load import ModelInfo, load_tokenizer, load_weights, locate
from foveate.methods.echoatt import EchoAtt, leader_map
from foveate.methods.echoatt.fit import fit
from foveate.models.causal_lm import FoveateForCausalLM
from foveate.models.echo import Stages, adjust, echo_student
from foveate.models.layouts import LAYOUTS, config_from, weights_from
from foveate.ops.errors import InputError
from foveate.runs.machine import machine
from foveate.runs.records import digest, writable_folder
from foveate.runs.text import Text

Tell = Callable[[float, str], None]
HELD_OUT = 0.2
REPORT, PROFILE, TRAINING, MODEL = "report.json", "layers.json", "training.safetensors", "model"
CONTROL, ADJUSTED = "control.safetensors", "original, second stage"


@dataclass(frozen=True)
class Job:
    """A compression.

    Attributes:
        model: as `foveate.hf.load.load_model` takes it; of a family in `foveate.models.layouts`
            whose heads are multi-head or grouped-query (Llama's).
        text: to look at, train on (its first four fifths) and judge by (the rest).
        out: folder of the student and of all that was found.
        followers: layers that copy; None chooses `share` of all, or blocks of `block`.
        share, block, mode: as `EchoAtt`.
        stages: of the training.
        length: tokens of a training sequence.
        batch: sequences of a step.
        judged: held-out windows of `length` tokens.
        prompt: tokens of the prompt whose speed is measured.
        decode: tokens decoded.
        rounds: of the measurement.
        device: to run on.
        fresh: begin anew.
        every: steps between savings of the training, three times the weights' size each.
    """

    model: str | None
    text: Text = field(repr=False)
    out: Path = Path("foveate-compressed")
    followers: tuple[int, ...] | None = None
    share: float = 0.33
    block: int | None = None
    mode: str = "auto"
    stages: Stages = Stages(80, 20)
    length: int = 256
    batch: int = 4
    judged: int = 48
    prompt: int = 1024
    decode: int = 32
    rounds: int = 5
    device: torch.device = torch.device("cpu")
    fresh: bool = False
    every: int = 25

    def setting(self, fingerprint: str) -> dict[str, Any]:
        """What decides the figures, but for the machine."""
        return {
            "model": fingerprint, "text": self.text.sha256, "followers": self.followers,
            "share": self.share, "block": self.block, "mode": self.mode,
            "stages": [*self.stages[:6], list(self.stages.weights), self.stages.kl],
            "length": self.length, "batch": self.batch, "judged": self.judged,
        }  # fmt: skip

    def timing(self) -> dict[str, Any]:
        """What decides the speeds."""
        return {
            "prompt": self.prompt, "decode": self.decode, "rounds": self.rounds,
            "device": str(self.device),
        }  # fmt: skip


def run(job: Job, tell: Tell, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Compress, measure and save.

    Returns:
        The figures; also in `report.json`.

    Raises:
        InputError: bad input, before any weights are read.
    """
    EchoAtt(followers=job.followers, share=job.share, block=job.block, mode=job.mode)
    info = locate(job.model, progress=say)
    family = getattr(info.config, "model_type", "")
    if info.kind != "causal-lm" or family not in LAYOUTS:
        raise InputError(
            f"{info.name} is a {family} model; compress rebuilds models of {', '.join(LAYOUTS)}."
        )
    writable_folder(job.out)
    key = digest(job.setting(info.fingerprint))
    done = _found(job.out / REPORT, key)
    timed = done is not None and all(done["speed"].get(n) == v for n, v in job.timing().items())
    if done is not None and timed and ADJUSTED in done["perplexity"] and not job.fresh:
        return done | {"found": True}
    tokenizer = load_tokenizer(info)
    windows = _windows(job, tokenizer)
    there = done is not None and (timed or Path(done["folder"], "config.json").is_file())
    if done is not None and there and not job.fresh:
        return _completed(job, info, done, windows, timed, tell)
    say(f"Loading {info.name}")
    original = load_weights(info, device=job.device)
    profile = _profile(job, info, original, tokenizer, tell)
    followers = tuple(profile["followers"])
    teacher = as_foveate(original, info)
    student = echo_student(teacher, followers, job.mode)
    student.generation_config = original.generation_config
    say(f"{len(followers)} of {len(teacher.model.layers)} layers copy: {followers}")
    quality = {"original": measure.perplexity(teacher, windows["judged"])}
    quality["before distillation"] = measure.perplexity(student, windows["judged"])
    say(
        f"perplexity {quality['original']['perplexity']:.2f}, "
        f"{quality['before distillation']['perplexity']:.2f} before distillation"
    )
    state = FileState(job.out / TRAINING, key, "echoatt")
    if job.fresh:
        state.clear()
        FileState(job.out / CONTROL, key, "echoatt").clear()

    history = adjust(
        student, teacher, _batches(job, windows), job.stages,
        progress=lambda share, doing: tell(0.1 + 0.7 * share, doing),
        state=state, every=job.every, setting={"key": key},
    )  # fmt: skip
    quality["after distillation"] = measure.perplexity(student, windows["judged"])
    folder = _save(job, student, tokenizer)
    again = FoveateForCausalLM.from_pretrained(folder).to(job.device).eval()
    probe = windows["judged"][:1].to(job.device)
    with torch.no_grad():
        same = torch.equal(again(probe).logits, student(probe).logits)
    if not same:
        raise InputError(f"{folder}: the saved student gives other logits than the trained one.")
    facts = {
        "key": key, "found": False, "model": info.name, "text": job.text.title,
        "folder": str(folder), "followers": list(followers),
        "leaders": {str(f): l for f, l in leader_map(followers).items()},
        "layers": len(teacher.model.layers),
        "similarity": profile["held_out"], "unchanged_by_the_gap": profile["unchanged"],
        "parameters": {"original": measure.parameters(teacher),
                       "student": measure.parameters(again)},
        "cache_numbers_per_token": {"original": teacher.new_cache().elements_per_token,
                                    "student": again.new_cache().elements_per_token},
        "perplexity": quality,
        "training": {"first": job.stages.first, "second": job.stages.second,
                     "tokens": (job.stages.first + job.stages.second) * job.batch * job.length,
                     "seconds": history[-1]["seconds"] if history else 0.0,
                     "last": history[-1] if history else {}},
        "speed": _speed(job, original, teacher, again, windows, tell),
        "environment": machine(job.device),
    }  # fmt: skip
    _report(job, facts)
    state.clear()
    del student, again, original  # the control's optimizer needs the room
    return _with_control(job, info, facts, teacher, windows, tell)


def _batches(job: Job, windows: dict[str, Tensor], skipped: int = 0) -> Callable[[int], Tensor]:
    """Token ids (B, L) by the number of a step, which alone decides them."""

    def batch(number: int) -> Tensor:
        random = torch.Generator().manual_seed(number + skipped)
        starts = torch.randint(len(windows["train"]) - job.length, (job.batch,), generator=random)
        return torch.stack([windows["train"][s : s + job.length] for s in starts.tolist()])

    return batch


def _with_control(
    job: Job,
    info: ModelInfo,
    facts: dict[str, Any],
    teacher: FoveateForCausalLM,
    windows: dict[str, Tensor],
    tell: Tell,
) -> dict[str, Any]:
    """The figures with the original's perplexity after a second stage like the student's.

    It has the student's steps, tokens and rates of that stage, and a fresh optimizer.
    """
    copy = deepcopy(teacher)
    state = FileState(job.out / CONTROL, facts["key"], "echoatt")
    adjust(
        copy, teacher, _batches(job, windows, job.stages.first), job.stages._replace(first=0),
        progress=lambda share, doing: tell(0.85 + 0.15 * share, f"original: {doing}"),
        state=state, every=min(job.every, 10), setting={"key": facts["key"], "of": info.name},
    )  # fmt: skip
    found = measure.perplexity(copy, windows["judged"])
    facts = facts | {"perplexity": facts["perplexity"] | {ADJUSTED: found}}
    _report(job, facts)
    state.clear()
    return facts


def _report(job: Job, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=2, allow_nan=False)
    (job.out / REPORT).write_text(text, encoding="utf-8")


def as_foveate(original: Any, info: ModelInfo) -> FoveateForCausalLM:
    """A transformers model's weights in foveate's layers, checked against it on a few tokens.

    Raises:
        InputError: its logits differ, so that this family's layout isn't right for it.
    """
    like = next(original.parameters())
    made = FoveateForCausalLM(config_from(info.config)).to(like.device, like.dtype)
    with torch.no_grad():
        weights_from(made, info.config.model_type, original.state_dict().items())
        made.eval()
        ids = torch.arange(1, 17, device=like.device)[None]
        ours, theirs = made(ids).logits.float(), original(ids).logits.float()
    worst = float((ours - theirs).abs().max())
    if not worst <= 2e-3 * max(1.0, float(theirs.abs().max())):
        raise InputError(
            f"{info.name} has other logits ({worst:.2g}) once it is rebuilt; it isn't what "
            f"{info.config.model_type} models are made of."
        )
    return made


def _windows(job: Job, tokenizer: Any) -> dict[str, Tensor]:
    ids = torch.tensor(
        tokenizer(job.text.content, add_special_tokens=False, verbose=False).input_ids
    )
    cut = int(len(ids) * (1 - HELD_OUT))
    judged = ids[cut:]
    count = min(job.judged, len(judged) // job.length)
    if count < 1 or cut <= max(job.length, job.prompt):
        raise InputError(
            f"The text has {len(ids):,} tokens, too few for sequences of {job.length:,} and a "
            f"prompt of {job.prompt:,}; give a longer text, or shorter ones."
        )
    return {
        "train": ids[:cut],
        "judged": judged[: count * job.length].reshape(count, job.length),
    }


def _profile(
    job: Job, info: ModelInfo, original: Any, tokenizer: Any, tell: Tell
) -> dict[str, Any]:
    """The layers' similarity and the choice of followers, kept in the folder."""
    key = digest([info.fingerprint, job.text.sha256, job.share, job.block, job.followers])
    path = job.out / PROFILE
    kept = None if job.fresh else _found(path, key)
    if kept is not None:
        return kept
    ids = tokenizer(job.text.content, add_special_tokens=False, verbose=False).input_ids
    length = min(512, len(ids) // 12)
    batches = TextBatches(tokenizer, torch.tensor(ids), max(64, length), 1, title=job.text.title)
    method = EchoAtt(share=job.share, block=job.block)
    state = FileState(path.with_suffix(".fit"), info.fingerprint, "echoatt")
    frozen = FrozenModel(original)
    artefact = fit(
        method, frozen, batches, lambda share, doing: tell(0.1 * share, f"layers: {doing}"), state
    )
    original.requires_grad_(True)
    found = artefact.facts | {"key": key}
    if job.followers is not None:
        found["followers"] = list(job.followers)
    path.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    return found


def _found(path: Path, key: str) -> dict[str, Any] | None:
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if held.get("key") == key else None


def _save(job: Job, student: FoveateForCausalLM, tokenizer: Any) -> Path:
    folder = job.out / MODEL
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _speed(
    job: Job,
    original: Any,
    teacher: FoveateForCausalLM,
    student: FoveateForCausalLM,
    windows: dict[str, Tensor],
    tell: Tell,
) -> dict[str, Any]:
    ids = windows["train"][None, : job.prompt].to(job.device)
    models = {"transformers": original, "original": teacher, "student": student}
    found = measure.speeds(
        models, "original", ids, job.decode, job.rounds,
        lambda share, doing: tell(0.8 + 0.05 * share, f"speed: {doing}"),
    )  # fmt: skip
    return job.timing() | found


def _completed(
    job: Job,
    info: ModelInfo,
    done: dict[str, Any],
    windows: dict[str, Tensor],
    timed: bool,
    tell: Tell,
) -> dict[str, Any]:
    """The figures of a student that is there, with those that are asked for now and lack yet."""
    original = load_weights(info, device=job.device)
    teacher = as_foveate(original, info)
    facts = done
    if not timed:
        student = FoveateForCausalLM.from_pretrained(done["folder"]).to(job.device).eval()
        facts = facts | {
            "speed": _speed(job, original, teacher, student, windows, tell),
            "environment": machine(job.device),
        }
        _report(job, facts)
        del student
    if ADJUSTED in facts["perplexity"]:
        return facts
    del original
    return _with_control(job, info, facts, teacher, windows, tell)
