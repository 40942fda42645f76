"""`foveate classify`: a text classifier with any pooling, and pictures of its heads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.cli.composition import by_layer, told
from foveate.cli.progress import Screen, console
from foveate.ops.errors import InputError, MissingPackageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("classify")(classify)


def classify(
    pooling: Annotated[
        str,
        typer.Option(help='mean, max, cls, ends, or a pooler such as "lama(heads=8)".'),
    ] = "lama(heads=8)",
    data: Annotated[
        str, typer.Option(help="banking77 is shipped; goemotions, sentiment, ... with --folder.")
    ] = "banking77",
    folder: Annotated[str | None, typer.Option(help="That holds the data's files.")] = None,
    recurrent: Annotated[int, typer.Option(help="Bidirectional GRU layers.")] = 1,
    layers: Annotated[int, typer.Option(help="Transformer blocks behind them.")] = 0,
    dim: Annotated[int, typer.Option(help="Width of both.")] = 128,
    embedding: Annotated[int, typer.Option(help="Width of the embeddings before a GRU.")] = 100,
    heads: Annotated[int, typer.Option(help="Of the blocks.")] = 4,
    projection: Annotated[str, typer.Option(help="Of the blocks.")] = "mha",
    attention: Annotated[str, typer.Option(help="Of the blocks.")] = "full",
    mixer: Annotated[
        str | None,
        typer.Option(
            help="In attention's place: a mixer such as gaam; or one for each block, with "
            '"none" for attention.'
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Of each block, in the place of a dense feed-forward layer.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts that run for a token.")] = 2,
    router: Annotated[
        str, typer.Option(help="How tokens choose experts: top-k, similarity-smoe ...")
    ] = "top-k",
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 900,
    batch: Annotated[int, typer.Option(help="Texts in each step.")] = 64,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-3,
    every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 150,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the data's order.")] = 0,
    pictures: Annotated[int, typer.Option(help="Texts whose words are shaded by weight.")] = 12,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[
        str, typer.Option(help="Folder for the model, its checkpoints and pictures.")
    ] = ("foveate-classifier"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training in --out, bit by bit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a small text classifier and draw what each head of its pooling looks at.

    By default a bidirectional GRU whose states are pooled by low-rank attention (LAMA), on
    questions of a bank's customers with 77 intents. The folder is a transformers model: after
    `import foveate`, AutoModelForSequenceClassification loads it.
    """
    from foveate.compare.options import parse_device
    from foveate.papers.training.regime import Regime

    if experts is None and (router, top_k) != ("top-k", 2):
        raise InputError("--router and --top-k are for experts; say how many with --experts.")
    try:
        from foveate.papers.training import classify_job as job
        from foveate.papers.training.experts import Experts
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    mixers = by_layer(mixer, layers) if layers else mixer
    made = job.Job(
        data=data,
        folder=folder,
        shape=job.Shape(
            pooling, recurrent, layers, dim, embedding, heads, projection, attention,
            mixers,
            None if experts is None else Experts(experts, top_k, router),
        ),
        regime=Regime(
            steps=steps, batch=batch, lr=lr, every=every, seed=seed, weight_decay=0.01
        ),
        out=Path(out).expanduser(),
        device=parse_device(device),
        resume=resume,
        pictures=pictures,
    )  # fmt: skip
    with Screen() as screen:
        tell = screen.steps(f"training {pooling}", steps)
        try:
            facts = job.run(made, tell, screen.say)
        except ModuleNotFoundError as error:
            raise _missing(error) from error
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, console())


def _missing(error: ModuleNotFoundError) -> Exception:
    name = (error.name or "").partition(".")[0]
    if name not in {"transformers", "safetensors"}:
        return error
    return MissingPackageError(f"foveate classify needs {name}: pip install 'foveate[hf]'")


def _model(shape: dict[str, Any]) -> str:
    parts = [f"GRU x {shape['recurrent']}"] if shape["recurrent"] else []
    if shape["layers"]:
        by_block = isinstance(shape["mixer"], list | tuple)  # names each block itself
        parts.append(told(shape) if by_block else f"{told(shape)} x {shape['layers']}")
    return " -> ".join([*parts, shape["pooling"]])


def show(facts: dict[str, Any], screen: Console) -> None:
    """The figures for people, and the Python that loads the model."""
    test = facts["test"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("model", f"{_model(facts['shape'])}, {facts['parameters']:,} weights"),
        ("data", facts["data"]),
        ("steps", str(facts["steps"])),
        ("test", f"{test['accuracy']:.1%} right, {test['loss']:.4g} nats for each text"),
        ("pictures", facts["pictures"] or "none; the pooling has no heads"),
    ):
        table.add_row(name, Text(value))
    screen.print(table)
    screen.print(
        Text(
            "\nimport foveate\nfrom transformers import AutoModelForSequenceClassification\n"
            f"model = AutoModelForSequenceClassification.from_pretrained({facts['folder']!r})"
        ),
        soft_wrap=True,
    )
