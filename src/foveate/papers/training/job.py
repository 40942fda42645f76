"""The job of `foveate train`: a language model on the bytes of a text, saved for transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.hf.demo_models import quiet
from foveate.ops.errors import InputError, nearest
from foveate.papers.tasks.text import ByteText, text_file
from foveate.papers.training.experts import BALANCE, Experts
from foveate.papers.training.idle import refuse_idle
from foveate.papers.training.language import Sizes, language_model
from foveate.papers.training.loop import Trained, train
from foveate.papers.training.objective import BySegments, evaluate
from foveate.papers.training.regime import Regime
from foveate.papers.training.routing import ROUTING, RoutingWatch, routing_facts
from foveate.runs.records import writable_folder
from foveate.runs.text import default_text

LIKE = ("step3",)
SPECIAL = 3  # ByT5's tokens: padding, end, unknown, then the 256 bytes


@dataclass(frozen=True)
class Job:
    """A training of `foveate train`.

    Attributes:
        projection, attention: as `foveate.Attention` takes them.
        mixer: in attention's place, for all layers or one for each; None is attention everywhere.
        like: the composition and widths of a released model in small, "step3"; None is none. Of
            the sizes its layers, length and vocabulary are taken.
        segment: tokens of the segments in which a sequence is read; None reads it whole.
        experts: how many experts each layer has in the place of a dense feed-forward; None is none.
        options: further fields of `foveate.models.FoveateConfig`: sink_logits, kv_bias, gate,
            registers.
        data: a text file; None is the text that is shipped (WikiText-2).
        sizes: of the model.
        regime: of the training.
        out: folder of the model, in transformers' form, and of checkpoints.
        device: to run on.
        resume: go on from the checkpoints in `out`.

    Raises:
        InputError: an attention or a projection that no layer would have, beside mixers in all.
    """

    projection: str
    attention: str
    data: str | None
    sizes: Sizes
    regime: Regime
    out: Path
    device: torch.device
    resume: bool
    mixer: str | tuple[str | None, ...] | None = None
    like: str | None = None
    segment: int | None = None
    experts: Experts | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_idle(self.mixer, self.projection, self.attention)


def run(job: Job, tell: Callable[[float, str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Train, and save what plain transformers loads after `import foveate`.

    Returns:
        The composition, regime, data, figures on the test split (loss in nats and bits for each
        byte, perplexity, accuracy), a sample and the history.

    Raises:
        FoveateError: bad input, before any work; or the training diverged.
    """
    from transformers import ByT5Tokenizer

    task = _text(job)
    segments = None if job.segment is None else BySegments(job.segment)
    checkpoints = job.out / "checkpoints"
    held = job.out / "config.json"
    if not job.resume and (held.exists() or any(checkpoints.glob("step-*"))):
        raise InputError(
            f"{job.out} holds a training already; give --resume to go on with it, or another --out."
        )
    if job.resume and not any(checkpoints.glob("step-*")):
        say(f"{checkpoints} holds no checkpoint to go on from; the training begins.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.regime.seed)
        model = _model(job)
    _give_reference(model, task)
    writable_folder(job.out)
    model.to(job.device)
    given: dict[str, Any] = {} if segments is None else {"objective": segments}
    watch = RoutingWatch(task, checkpoints) if model.config.moe_layers else None
    if watch is not None:
        given["watch"] = watch
    done = train(model, task, job.regime, folder=checkpoints, tell=tell, **given)
    for note in done.notes:
        say(note)
    with quiet():
        model.save_pretrained(job.out)
        ByT5Tokenizer(extra_ids=0).save_pretrained(job.out)
    facts = _facts(job, task, model, done, segments)
    if watch is not None:
        facts["routing"] = routing_facts(watch, done.history, job.out / ROUTING, say)
    new = job.out / ".training.new"
    new.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(job.out / "training.json")
    return facts


def _model(job: Job) -> Any:
    """The model with fresh weights."""
    ids = {"pad_token_id": 0, "eos_token_id": 1} | dict(job.options)
    if job.like is None:
        mixer = list(job.mixer) if isinstance(job.mixer, tuple) else job.mixer
        more = {} if job.experts is None else job.experts.fields(job.sizes.layers, job.sizes.dim)
        return language_model(job.sizes, job.projection, job.attention, mixer=mixer, **ids, **more)
    if job.like not in LIKE:
        raise InputError(f"--like {job.like} is not known; {nearest(job.like, LIKE)}")
    from foveate.models import step3_config

    if job.sizes.layers < 3:
        raise InputError("--like step3 needs 3 layers or more: dense ones at both ends.")
    made = step3_config(
        vocab_size=job.sizes.vocab, num_hidden_layers=job.sizes.layers, router_balance=BALANCE
    )
    sizes = Sizes(
        job.sizes.layers, made.hidden_size, made.num_attention_heads, job.sizes.length,
        job.sizes.vocab,
    )  # fmt: skip
    rest = {name: getattr(made, name) for name in (
        "head_dim", "intermediate_size", "rope_parameters", "rms_norm_eps", "moe_layers",
        "num_experts", "num_experts_per_tok", "moe_intermediate_size",
        "shared_expert_intermediate_size", "router_score", "router_renormalize", "router_balance",
    )}  # fmt: skip
    return language_model(sizes, str(made.projection), job.attention, **rest, **ids)


def _give_reference(model: Any, task: ByteText) -> None:
    """The beginning of the text, to a model that wants a fixed sequence beside its input."""
    stream = model.model.reference
    if stream is not None and stream.reference.kind == "tokens":
        model.set_reference(task.beginning(stream.reference.length))


def _text(job: Job) -> ByteText:
    if job.data is not None:
        return text_file(job.data, job.sizes.length, offset=SPECIAL)
    shipped = default_text().encode()
    return ByteText(shipped, job.sizes.length, "WikiText-2 test split", (0.9, 0.05), 512, SPECIAL)


def _facts(
    job: Job, task: ByteText, model: Any, done: Trained, segments: BySegments | None
) -> dict[str, Any]:
    found = evaluate(model, task, "test", job.regime.batch, segments=segments)
    return {
        "projection": model.config.of_layer("projection", 0) if job.like else job.projection,
        "attention": job.attention,
        "mixer": job.mixer,
        "like": job.like,
        "segment": job.segment,
        "experts": None if job.experts is None else asdict(job.experts),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": task.describe(),
        "regime": job.regime.as_dict(),
        "steps": done.steps,
        "stopped_early": done.stopped_early,
        "resumed_at": done.resumed_at,
        "seconds": round(done.seconds, 1),
        "test": found | {"bits_per_byte": found["loss"] / math.log(2)},
        "sample": sample(model, task),
        "history": done.history,
        "folder": str(job.out),
    }


@torch.no_grad()
def sample(model: Any, task: ByteText, prompt: int = 48, tokens: int = 96) -> dict[str, str]:
    """What the model writes on from the beginning of the test split, greedily.

    Args:
        model: with transformers' `generate`.
        task: whose text it was trained on.
        prompt: tokens of the beginning, at most the task's length.
        tokens: to write.

    Returns:
        The prompt and what followed; bytes that are no UTF-8 are shown as replaced.
    """
    batch = next(iter(task.held_out("test", 1)))
    stream = model.model.reference
    if stream is not None:  # no longer than the sequence beside the input
        prompt = min(prompt, -(-stream.reference.length // 2))
        tokens = min(tokens, stream.reference.length - prompt)
    ids = batch.inputs[:, :prompt].to(next(model.parameters()).device)
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0]
    parts = (out[: ids.shape[1]], out[ids.shape[1] :])
    texts = [
        bytes(t - task.offset for t in part.tolist() if t >= task.offset).decode("utf-8", "replace")
        for part in parts
    ]
    return {"prompt": texts[0], "followed": texts[1]}
