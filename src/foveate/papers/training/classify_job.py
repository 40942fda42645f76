"""The job of `foveate classify`: a text classifier on labelled texts, and pictures of its heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from foveate.hf.demo_models import quiet
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.papers.tasks.classification import PADDING, SEPARATOR, Classification, words
from foveate.papers.tasks.labelled import load
from foveate.papers.training.classify import Classifier
from foveate.papers.training.experts import Experts
from foveate.papers.training.idle import refuse_idle
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime
from foveate.papers.training.routing import ROUTING, RoutingWatch, routing_facts
from foveate.runs.records import writable_folder

PICTURES = "heads.html"


@dataclass(frozen=True)
class Shape:
    """The model of a `Job`; see `foveate.models.FoveateEncoderConfig`.

    Attributes:
        pooling: "mean", "max", "cls", "ends" or a pooler such as "lama(heads=8)".
        recurrent: bidirectional GRU layers.
        layers: transformer blocks behind them.
        dim: width of both.
        embedding: width of the embeddings before recurrent layers.
        heads: of the blocks.
        projection, attention: of the blocks.
        mixer: in attention's place, for all blocks or one for each; None is attention.
        experts: in the place of the blocks' dense feed-forward layers; None is none.

    Raises:
        InputError: what stands in blocks, and no blocks; or an attention or a projection that no
            block would have, beside mixers in all of them.
    """

    pooling: str = "lama(heads=8)"
    recurrent: int = 1
    layers: int = 0
    dim: int = 128
    embedding: int = 100
    heads: int = 4
    projection: str = "mha"
    attention: str = "full"
    mixer: str | tuple[str | None, ...] | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.layers:
            refuse_idle(self.mixer, self.projection, self.attention)
            return
        if self.experts is not None:
            raise InputError("Experts stand in transformer blocks; say how many with --layers.")
        if (self.projection, self.attention, self.mixer) != ("mha", "full", None):
            raise InputError(
                "--projection, --attention and --mixer are of transformer blocks; say how many of "
                "them with --layers (and --recurrent 0 to have no GRU before them)."
            )


@dataclass(frozen=True)
class Job:
    """A training of `foveate classify`.

    Attributes:
        data: name of the data set, as `foveate.papers.tasks.labelled.load` knows it.
        folder: that holds its files; None is what is shipped.
        shape: of the model.
        regime: of the training.
        out: folder of the model, in transformers' form, of checkpoints and of pictures.
        device: to run on.
        resume: go on from the checkpoints in `out`.
        pictures: texts of the test split to draw, where the pooling has heads.
        length: words of a text, at most.
    """

    data: str
    folder: str | None
    shape: Shape
    regime: Regime
    out: Path
    device: torch.device
    resume: bool = False
    pictures: int = 12
    length: int = 40


def run(job: Job, tell: Callable[[float, str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Train, save, and draw.

    Returns:
        What was trained on what, figures on the test split (loss in nats, accuracy), the history,
        and where model and pictures are.

    Raises:
        FoveateError: bad input, before any work; or the training diverged.
    """
    whole("foveate classify", "pictures", job.pictures, least=0)
    texts = Classification(load(job.data, job.folder), job.length)
    checkpoints = job.out / "checkpoints"
    begun = any(checkpoints.glob("step-*"))
    if not job.resume and (begun or (job.out / "config.json").exists()):
        raise InputError(
            f"{job.out} holds a training already; give --resume to go on with it, or another --out."
        )
    if job.resume and not begun:
        say(f"{checkpoints} holds no checkpoint to go on from; the training begins.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.regime.seed)
        model = model_of(job.shape, texts)
    writable_folder(job.out)
    model.to(job.device)
    watch = None
    if job.shape.experts is not None:
        watch = RoutingWatch(texts, checkpoints, padding=PADDING)
    done = train(model, texts, job.regime, folder=checkpoints, tell=tell, watch=watch)
    for note in done.notes:
        say(note)
    inner: Any = model.model
    with quiet():
        inner.save_pretrained(job.out)
    _write(job.out / "words.json", json.dumps(texts.vocabulary, ensure_ascii=False))
    drawn = None
    if inner.encoder.pooler is not None and job.pictures:
        drawn = job.out / PICTURES
        _write(drawn, picture(model, texts, job.pictures))
    facts = {
        "shape": asdict(job.shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": texts.describe(),
        "regime": job.regime.as_dict(),
        "steps": done.steps,
        "resumed_at": done.resumed_at,
        "seconds": round(done.seconds, 1),
        "test": evaluate(model, texts, "test", job.regime.batch),
        "history": done.history,
        "folder": str(job.out),
        "pictures": None if drawn is None else str(drawn),
    }
    if watch is not None:
        facts["routing"] = routing_facts(watch, done.history, job.out / ROUTING, say)
    _write(job.out / "training.json", json.dumps(facts, indent=1, allow_nan=False))
    return facts


def model_of(shape: Shape, texts: Classification) -> Classifier:
    """A classifier with fresh weights, as torch makes them, from torch's random state."""
    from foveate import models

    labels, experts = texts.data.labels, shape.experts
    config = models.FoveateEncoderConfig(
        vocab_size=texts.vocab,
        hidden_size=shape.dim,
        embedding_size=shape.embedding if shape.recurrent else None,
        recurrent_layers=shape.recurrent,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        projection=shape.projection,
        attention=shape.attention,
        mixer=list(shape.mixer) if isinstance(shape.mixer, tuple) else shape.mixer,
        pooling=shape.pooling,
        pad_token_id=PADDING,
        classifier_dropout=0.2,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **({} if experts is None else experts.fields(shape.layers, shape.dim)),
    )
    model = models.FoveateForSequenceClassification(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
    return Classifier(model)


@torch.no_grad()
def picture(model: Classifier, texts: Classification, count: int) -> str:
    """What each head of the pooler looks at in the first texts of the test split, as HTML."""
    from foveate.models import word_picture

    inner: Any = model.model
    some = texts.data.test[:count]
    rows = [torch.tensor(texts.ids(example.texts)) for example in some]
    ids = pad_sequence(rows, batch_first=True, padding_value=PADDING)
    ids = ids.to(next(model.parameters()).device)
    out = inner(input_ids=ids, attention_mask=(ids != PADDING).long())
    labels = texts.data.labels
    shown, titles = [], []
    for row, example, guess in zip(rows, some, out.logits.argmax(-1).tolist()):
        shown.append(_tokens(row.tolist(), example.texts))
        right = "right" if guess == example.label else f"it is {labels[example.label]}"
        titles.append(f"{labels[guess]} ({right})")
    return word_picture(shown, out.pooler_weights, titles)


def _tokens(ids: list[int], texts: tuple[str, ...]) -> list[str]:
    """What each token of a row stands for, words that are unknown included."""
    spoken = ["(start)"]
    parts = [words(text) for text in texts]
    left = iter(parts[0])
    for token in ids[1:]:
        if token == SEPARATOR:
            left = iter(parts[1])
            spoken.append("(and)")
        else:
            spoken.append(next(left))
    return spoken


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)
