"""`foveate recommend`: train a recommender on one's own files, and ask it, with reasons."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.cli.progress import Screen, console
from foveate.ops.errors import InputError, MissingPackageError


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    recommend = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    recommend.callback()(_about)
    recommend.command("train")(train)
    recommend.command("query")(query)
    app.add_typer(recommend, name="recommend")


def _about() -> None:
    """Recommenders with attention: train on your files, judge by full ranking, ask with reasons."""


def train(
    model: Annotated[
        str,
        typer.Option(help="kgat, bpr-mf or fm; or for the next item mqsa-ted or sasrec."),
    ] = "kgat",
    data: Annotated[
        str,
        typer.Option(
            help="ml-100k, or a folder: train.txt, test.txt and kg_final.txt as KGAT's authors "
            "publish them; sequences.txt (user item item ... by time) for the next item."
        ),
    ] = "ml-100k",
    epochs: Annotated[int, typer.Option(help="At most.")] = 100,
    every: Annotated[int, typer.Option(help="Epochs between evaluations and checkpoints.")] = 5,
    patience: Annotated[
        int, typer.Option(help="Stop after so many evaluations without a better figure.")
    ] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    batch: Annotated[
        int | None, typer.Option(help="Pairs (1,024) or sequences (256) of a step.")
    ] = None,
    dim: Annotated[int, typer.Option(help="Width of the vectors.")] = 64,
    decay: Annotated[
        float | None,
        typer.Option(
            help="Weight decay; 1e-5, or 1e-4 for the next item. On small data far more is better: "
            "0.1 on ml-100k."
        ),
    ] = None,
    triple_decay: Annotated[
        float, typer.Option(help="kgat: weight decay of TransR's steps.")
    ] = 1e-5,
    dropout: Annotated[
        float | None, typer.Option(help="0.1 for kgat, 0.5 for the next item.")
    ] = None,
    layers: Annotated[str, typer.Option(help="kgat: widths of its layers.")] = "64,32,16",
    aggregator: Annotated[
        str, typer.Option(help="kgat: bi-interaction, gcn or graphsage.")
    ] = "bi-interaction",
    attention: Annotated[
        bool, typer.Option(help="kgat: learn edges' weights, or weigh all alike.")
    ] = True,
    knowledge: Annotated[
        bool, typer.Option(help="kgat: use the knowledge graph, or users and items alone.")
    ] = True,
    translation: Annotated[bool, typer.Option(help="kgat: train TransR by turns.")] = True,
    pretrain: Annotated[
        bool, typer.Option(help="kgat: start from a BPR-MF that is trained first.")
    ] = True,
    field: Annotated[
        bool,
        typer.Option(help="kgat: compute only what a batch reaches; for very large graphs."),
    ] = False,
    length: Annotated[int, typer.Option(help="Next item: items that are looked at.")] = 50,
    window: Annotated[int, typer.Option(help="mqsa-ted: items in the long query.")] = 3,
    alpha: Annotated[float, typer.Option(help="mqsa-ted: share of the short query.")] = 0.5,
    distil: Annotated[float, typer.Option(help="mqsa-ted: weight of the transitions.")] = 0.1,
    tau: Annotated[float, typer.Option(help="mqsa-ted: temperature of the transitions.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, order, negatives and dropout.")] = 0,
    out: Annotated[str, typer.Option(help="Folder for the recommender.")] = "foveate-recommender",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a recommender and judge it by ranking all items that a user hasn't had.

    kgat is a graph network over users, items and what is known of items (KGAT), with bpr-mf and fm
    to compare with; mqsa-ted recommends the next item of a sequence, with sasrec to compare with.
    A tenth of the training pairs decides when to stop, unless there is a valid.txt. Stopped at any
    moment, the same command goes on.
    """
    job = _job()
    from foveate.methods.kgat import KGAT
    from foveate.methods.mqsa_ted import MQSATED
    from foveate.recommend import pairwise, sequential
    from foveate.recommend.loop import Plan

    if model not in job.KINDS:
        raise InputError(f"--model {model}: expected one of {', '.join(job.KINDS)}.")
    setting: pairwise.Setting | sequential.Setting
    if model in sequential.KINDS:
        recipe = MQSATED(
            dim=dim, length=length, window=window, alpha=alpha, distil=distil, tau=tau,
            dropout=0.5 if dropout is None else dropout,
        )  # fmt: skip
        setting = sequential.Setting(
            recipe if model == "mqsa-ted" else recipe.self_attention(), lr, batch or 256,
            1e-4 if decay is None else decay,
        )  # fmt: skip
    else:
        network = KGAT(
            dim=dim, relation_dim=dim, layers=_widths(layers), aggregator=aggregator,
            dropout=0.1 if dropout is None else dropout, attention=attention,
        )  # fmt: skip
        setting = pairwise.Setting(
            model, dim, lr, batch or 1024, decay=1e-5 if decay is None else decay,
            triple_decay=triple_decay, recipe=network,
            knowledge=knowledge, translation=translation, field=field,
        )  # fmt: skip
    made = job.Job(
        data, setting, Plan(epochs, every, patience, seed), Path(out).expanduser(), pretrain, fresh
    )
    with Screen() as screen:
        facts = job.run(made, screen.steps(f"training {model}", epochs), screen.say)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, console())


def query(
    folder: Annotated[str, typer.Argument(help="That foveate recommend train wrote.")],
    user: Annotated[str | None, typer.Argument(help="A user of kgat, bpr-mf or fm.")] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(help="Next item: what was chosen so far, once for each, in order of time."),
    ] = None,
    top: Annotated[int, typer.Option(help="Items.")] = 10,
    reasons: Annotated[int, typer.Option(help="Of each item.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """What a user would like, or what comes next, and why.

    A reason of kgat's is a path from the user to the item with the product of its attention; one of
    the next item's is what each query looked at, and how often the item followed the last one.
    """
    _job()
    from foveate.recommend.answers import Kept

    kept = Kept(Path(folder).expanduser())
    if kept.sequential:
        if user is not None or not after:
            raise InputError(
                f"{folder} recommends the next item: give --after ITEM, once for each."
            )
        found = kept.after(after, top, reasons)
    else:
        if user is None or after:
            raise InputError(f"{folder} recommends for a user: foveate recommend query FOLDER USER")
        found = kept.for_user(user, top, reasons)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
    else:
        show_answer(found, console())


def _job() -> Any:
    try:
        from foveate.recommend import job
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name != "safetensors":
            raise
        raise MissingPackageError(
            "foveate recommend needs safetensors: pip install 'foveate[hf]'"
        ) from error
    return job


def _widths(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--layers {text}: expected widths, such as 64,32,16.")
    return tuple(int(word) for word in words)


def show(facts: dict[str, Any], screen: Console) -> None:
    """The figures for people, and how to ask."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    training, before = facts["training"], facts["pretraining"]
    told = f"best after {training['best_epoch']} of {training['epochs']} epochs"
    if before is not None:
        told += f", behind {before['epochs']} of BPR-MF"
    named = {k: v for k, v in facts["test"].items() if "@" in k}
    sparse = ", ".join(
        f"up to {one['most']:.0f} items {one[name]:.4f}"
        for one in facts["by sparsity"] for name in one if name.startswith("recall@")
    )  # fmt: skip
    for name, value in (
        ("model", f"{facts['kind']}, {facts['parameters']:,} weights"),
        ("data", facts["data"]),
        ("training", told),
        ("test", ", ".join(f"{k} {v:.4f}" for k, v in named.items())),
        ("recall by user", sparse),
    ):
        if value:
            table.add_row(name, Text(value))
    screen.print(table)
    ask = "--after ITEM" if facts["kind"] in ("mqsa-ted", "sasrec") else "USER"
    screen.print(Text(f"\nfoveate recommend query {facts['folder']} {ask}"), soft_wrap=True)


def show_answer(found: list[dict[str, Any]], screen: Console) -> None:
    """Items, and what speaks for them."""
    for place, one in enumerate(found, 1):
        screen.print(Text.assemble((f"{place:>3}  ", "dim"), (one["item"], "bold"),
                                   (f"  {one['score']:.3f}", "dim")), soft_wrap=True)  # fmt: skip
        for reason in one.get("because", ()):
            chain = " → ".join(reason["path"])
            screen.print(Text(f"       {reason['weight']:.2e}  {chain}"), soft_wrap=True)
        if one.get("times followed the last"):
            times = one["times followed the last"]
            screen.print(Text(f"       followed the last item {times} times"), soft_wrap=True)
    if found and "looked at" in found[0]:
        for branch, looked in found[0]["looked at"].items():
            said = ", ".join(f"{x['item']} {x['weight']:.0%}" for x in looked)
            screen.print(Text(f"{branch} query looked at {said}", style="dim"), soft_wrap=True)
