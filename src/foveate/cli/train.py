"""`foveate train`: a small language model with any projection and attention."""

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
    app.command("train")(train)


def train(
    projection: Annotated[
        str, typer.Option(help='How heads are made, such as "mfa(head_dim=16)"; foveate methods.')
    ] = "mha",
    attention: Annotated[
        str, typer.Option(help='Such as full, or "sink-window(window=64)"; see foveate methods.')
    ] = "full",
    mixer: Annotated[
        str | None,
        typer.Option(
            help="In attention's place: a mixer such as grassmann; or one for each layer, with "
            '"none" for attention, such as grassmann,none,grassmann,none.'
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(help="Experts of each layer, in the place of a dense feed-forward layer."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts that run for a token.")] = 2,
    router: Annotated[
        str,
        typer.Option(
            help="How tokens choose experts: top-k, similarity-smoe, "
            "\"attention-smoe(heads='learned')\" and others; see foveate methods."
        ),
    ] = "top-k",
    sink_logits: Annotated[
        str | None,
        typer.Option(help='Lets heads attend to nothing: "one" (softmax off by one) or "learned".'),
    ] = None,
    kv_bias: Annotated[
        str | None,
        typer.Option(help="One more key, value or key-value for each head; key-shared for all."),
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="On the heads' outputs: one for each head, or element.")
    ] = None,
    registers: Annotated[int, typer.Option(help="Learned tokens before every sequence.")] = 0,
    like: Annotated[
        str | None,
        typer.Option(
            help="A released model's composition in small, with its own widths and heads: step3 "
            "(MFA, experts beside a shared one, dense layers at both ends)."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A text file. Default: WikiText-2's test split, shipped.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences in each step.")] = 16,
    length: Annotated[int, typer.Option(help="Bytes in each sequence.")] = 128,
    segment: Annotated[
        int | None,
        typer.Option(
            help="Read each sequence in segments of so many bytes, behind what was kept of those "
            'before; for attentions with a memory, such as "rcmha(memory=64)".'
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 4,
    dim: Annotated[int, typer.Option(help="Width.")] = 128,
    heads: Annotated[int, typer.Option(help="Heads, as the projection counts them.")] = 8,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-3,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 100,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better loss.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the data's order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[str, typer.Option(help="Folder for the model and its checkpoints.")] = (
        "foveate-model"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training in --out, bit by bit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a small language model, byte by byte, with any composition of foveate's layers.

    The folder is a transformers model: after `import foveate`, AutoModelForCausalLM and
    AutoTokenizer load it. Stopped at any moment, the same command with --resume goes on.
    """
    from foveate.compare.options import parse_device
    from foveate.papers.training.regime import Regime

    try:
        from foveate.papers.training import job
        from foveate.papers.training.experts import Experts
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    if like is not None and (projection, mixer, dim, heads, experts) != ("mha", None, 128, 8, None):
        raise InputError(
            f"--like {like} brings its own projection, width, heads and experts; leave out "
            "--projection, --mixer, --dim, --heads and --experts."
        )
    if experts is None and (router, top_k) != ("top-k", 2):
        raise InputError("--router and --top-k are for experts; say how many with --experts.")
    mixers = by_layer(mixer, layers)
    made = job.Job(
        projection=projection,
        attention=attention,
        data=data,
        sizes=job.Sizes(layers, dim, heads, length, 256 + job.SPECIAL),
        regime=Regime(
            steps=steps, batch=batch, lr=lr, warmup=warmup, every=every, patience=patience,
            seed=seed,
        ),
        out=Path(out).expanduser(),
        device=parse_device(device),
        resume=resume,
        mixer=mixers,
        like=like,
        segment=segment,
        experts=None if experts is None else Experts(experts, top_k, router),
        options={
            "sink_logits": sink_logits, "kv_bias": kv_bias, "gate": gate, "registers": registers
        },
    )  # fmt: skip
    with Screen() as screen:
        tell = screen.steps(f"training {like or mixer or projection}", steps)
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
    return MissingPackageError(f"foveate train needs {name}: pip install 'foveate[hf]'")


def _experts(facts: dict[str, Any]) -> str:
    given = facts["experts"]
    if given is None:
        return ""
    return f"; {given['top_k']} of {given['count']} experts by {given['router']}"


def _routing(found: dict[str, Any]) -> str:
    """What is told of the experts' use over the training."""
    said = (
        f"entropy {found['routing_entropy']:.3f} nats ({found['routing_entropy_share']:.0%} of an "
        f"even choice), load uneven by {found['load_unevenness']:.2f}"
    )
    moved = list(found["changed_to_the_end"].items())
    if moved:
        step, last = moved[-1]
        said += f"; {last['set']:.1%} of tokens changed experts from step {step} to the end"
    return said if found["figure"] is None else f"{said}; {found['figure']}"


def show(facts: dict[str, Any], screen: Console) -> None:
    """The figures for people, a sample, and the Python that loads the model."""
    test = facts["test"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("model", 
         f"{told(facts)}{_experts(facts)}, {facts['parameters']:,} weights"),
        ("data", facts["data"]),
        ("steps", f"{facts['steps']}{' (stopped early)' if facts['stopped_early'] else ''}"),
        ("test", f"{test['bits_per_byte']:.4g} bits for each byte ({test['loss']:.4g} nats), "
                 f"{test['accuracy']:.1%} of the next bytes right"),
        ("writes", f"{facts['sample']['prompt']}▸{facts['sample']['followed']}"),
    ):  # fmt: skip
        table.add_row(name, Text(value))
    if "routing" in facts:
        table.add_row("routing", Text(_routing(facts["routing"])))
    screen.print(table)
    folder = facts["folder"]
    screen.print(
        Text(
            "\nimport foveate\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
        ),
        soft_wrap=True,
    )
