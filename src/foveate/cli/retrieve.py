"""`foveate index` and `foveate search`: documents of a folder, found by what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.cli.progress import Screen, console
from foveate.ops.errors import InputError, MissingPackageError

NEEDS = {"transformers", "safetensors", "tokenizers", "bm25s", "snowballstemmer"}
SHOWN = 300


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("index")(index)
    app.command("search")(search)


@contextmanager
def _needed() -> Iterator[None]:
    """Say what to install where a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in NEEDS:
            raise
        raise MissingPackageError(
            f"Retrieval needs {name}: pip install 'foveate[retrieve]'"
        ) from error


def index(
    documents: Annotated[
        str,
        typer.Argument(help="Folder with *.txt and *.md, or corpus.jsonl (BEIR); or scifact."),
    ],
    out: Annotated[str, typer.Option(help="Folder of the index.")] = "foveate-index",
    encoder: Annotated[
        str | None, typer.Option(help="A text encoder: folder, hub id. Default: minilm.")
    ] = None,
    retriever: Annotated[
        str | None, typer.Option(help="A trained retriever's folder, instead of training one.")
    ] = None,
    single: Annotated[int | None, typer.Option(help="Numbers of a text's vector: 128.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Numbers of a word's vector: 32.")] = None,
    second: Annotated[
        int | None,
        typer.Option(help="Numbers of a word after a second compression; 1 is Uni-ColBERTer."),
    ] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact", help="Match equal words only, by an inverted index.")
    ] = None,
    stopwords: Annotated[
        bool | None, typer.Option("--stopwords/--no-stopwords", help="Drop words by context.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="Where a text's vector comes from: mean, or cls.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Most sub-words of a passage: 256.")] = None,
    words: Annotated[int, typer.Option(help="Most words of a passage of a text file.")] = 120,
    judged: Annotated[
        str | None, typer.Option(help="Folder whose judged train questions are learnt from, too.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of each stage of the training.")] = 1000,
    batch: Annotated[int, typer.Option(help="Triples of a step.")] = 32,
    lr: Annotated[float, typer.Option(help="The head's highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    most: Annotated[int, typer.Option(help="Passages that are trained on, at most.")] = 4000,
    lexical: Annotated[float, typer.Option(help="BM25's weight in the teacher.")] = 1.0,
    train_encoder: Annotated[
        bool, typer.Option("--train-encoder", help="Train the encoder too.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Forget documents that aren't there any more.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; the old index serves until it is done.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Make a folder of documents searchable: one vector for each text, a small one for each word.

    A small head is trained on the documents themselves (ColBERTer; their titles and first sentences
    are the questions, the encoder's own word-by-word scores and BM25 the teacher), then all of them
    are encoded. Stopped at any moment, the same command goes on; later it adds what is new or was
    changed. Readers always see a whole index.

    Don't measure what was learnt with --judged on questions like those: in SciFact, 196 of the 300
    test claims ask for an abstract that a train claim asks for, often in the same words, negated.
    """
    from foveate.compare.options import parse_device

    with _needed():
        from foveate.methods.colberter import Colberter
        from foveate.retrieve import build
        from foveate.retrieve.fit import Plan

        given = {
            "single": single, "tokens": tokens, "second": second, "exact": exact,
            "stopwords": stopwords, "pool": pool,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        recipe = Colberter(**({"pool": "mean"} | given)) if given else None  # type: ignore[arg-type]
        job = build.Job(
            Path(documents).expanduser(), Path(out).expanduser(), recipe, encoder,
            None if retriever is None else Path(retriever).expanduser(),
            Plan(steps, batch, lr, seed, most, lexical=lexical, encoder=train_encoder),
            None if judged is None else Path(judged).expanduser(),
            length, words, prune, fresh, device=parse_device(device),
        )  # fmt: skip
        with Screen() as screen:
            tell = screen.steps("indexing", 100)
            facts = build.run(job, tell, screen.say)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show_index(facts, console())


def search(
    folder: Annotated[str, typer.Argument(help="Of the index.", metavar="INDEX")],
    question: Annotated[str | None, typer.Argument(help="What is asked.")] = None,
    top: Annotated[int, typer.Option(help="How many answers.")] = 5,
    workflow: Annotated[
        str,
        typer.Option(
            help="refine: single vectors find, words rank; or words-first, hybrid, single, words."
        ),
    ] = "refine",
    candidates: Annotated[int, typer.Option(help="Passages that the first stage finds.")] = 1000,
    explain: Annotated[
        bool, typer.Option("--explain/--no-explain", help="Show what each word adds.")
    ] = True,
    judged: Annotated[
        str | None,
        typer.Option(help="Folder with judged questions (or scifact): measure the index."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the judged questions.")] = "test",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare files with their checksums first.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask an index, and see which words the answers were found by.

    With --judged, nDCG@10 and recall@100 of each workflow beside BM25's, and the bytes a passage
    takes at each reduction.
    """
    from foveate.compare.options import parse_device

    if (question is None) == (judged is None):
        raise InputError("Give a question, or --judged FOLDER to measure the index.")
    with _needed():
        from foveate.retrieve.collection import read_judged
        from foveate.retrieve.evaluate import evaluate
        from foveate.retrieve.index import Index

        asked = None if judged is None else read_judged(judged, split)
        opened = Index(folder, check=check, device=parse_device(device))
        if asked is not None:
            with Screen() as screen:
                tell = screen.steps("asking", 10)
                facts = evaluate(opened, asked, candidates, lambda share: tell(share, ""))
            if as_json:
                sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
            else:
                show_measures(facts, console())
            return
        assert question is not None
        hits = opened.search(question, top, workflow, candidates)
        told = [
            {
                "key": hit.passage.key, "title": hit.passage.title, "text": hit.passage.body,
                "score": hit.score, "single": hit.single, "token": hit.token,
                "words": [
                    {"word": m.word, "match": m.match, "score": m.score}
                    for m in (opened.why(question, hit.row) if explain else [])
                ],
            }
            for hit in hits
        ]  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(told, indent=2, allow_nan=False) + "\n")
    else:
        show_hits(told, console())


def show_index(facts: dict[str, Any], screen: Console) -> None:
    """What is indexed, and its bytes."""
    gone = f", {facts['gone']:,} replaced or removed" if facts["gone"] else ""
    screen.print(
        Text(
            f"{facts['passages']:,} passages in {facts['index']} ({facts['encoded']:,} encoded "
            f"now{gone})"
        ),
        soft_wrap=True,
    )
    show_storage(facts["storage"], screen)
    screen.print(Text(f'\nfoveate search {facts["index"]} "..."'), soft_wrap=True)


def show_storage(told: dict[str, Any], screen: Console) -> None:
    """Bytes a passage at each reduction."""
    table = Table(box=None, pad_edge=False)
    table.add_column("kept of a passage", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("of the text", justify="right", no_wrap=True)
    sizes = told["bytes"]
    for name, value in sizes.items():
        if name not in ("measured", "formula"):
            title = {"text": "the text itself", "on_disk": "all files"}.get(name, name)
            table.add_row(title, f"{value:,.0f}", f"{value / max(1, sizes['text']):.2f}x")
    screen.print(table)
    vectors = ", ".join(f"{n:.1f} {name}" for name, n in told["vectors"].items())
    cut = f"; {told['cut']:,} passages were cut at the longest length" if told["cut"] else ""
    screen.print(Text(f"A passage has {vectors} on average{cut}."), soft_wrap=True)


def show_measures(facts: dict[str, Any], screen: Console) -> None:
    """How well judged questions are answered."""
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{facts['questions']:,} questions", no_wrap=True)
    names = list(next(iter(facts["found"].values())))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for workflow, found in facts["found"].items():
        table.add_row(workflow, *(f"{found[name]:.4f}" for name in names))
    screen.print(table)
    screen.print()
    show_storage(facts["storage"], screen)


def show_hits(hits: list[dict[str, Any]], screen: Console) -> None:
    """Answers, each with the words that found it: `question's word > passage's word score`."""
    if not hits:
        screen.print("No passage was found.")
    for number, hit in enumerate(hits, 1):
        parts = [f"{hit['score']:.3f}"]
        parts += [
            f"{name} {hit[name]:.3f}" for name in ("single", "token") if hit[name] is not None
        ]
        head = Text.assemble((f"{number}. {hit['key']}", "bold"), f"  {', '.join(parts)}")
        screen.print(head, soft_wrap=True)
        if hit["title"]:
            screen.print(Text("   " + hit["title"]), soft_wrap=True)
        text = " ".join(hit["text"].split())
        shown = text if len(text) <= SHOWN else text[:SHOWN].rsplit(" ", 1)[0] + " ..."
        screen.print(Text("   " + shown, style="dim"), soft_wrap=True)
        if hit["words"]:
            screen.print(Text("   ").append(_words(hit["words"])), soft_wrap=True)


def _words(words: list[dict[str, Any]]) -> Text:
    most = max((abs(w["score"]) for w in words), default=0.0) or 1.0
    out = Text()
    for word in words:
        share = abs(word["score"]) / most
        style = "bold green" if share > 0.66 else "green" if share > 0.33 else "dim"
        match = "-" if word["match"] is None else word["match"]
        name = word["word"] if match == word["word"] else f"{word['word']} > {match}"
        out.append(f"{name} {word['score']:.2f}", style=style).append("  ")
    return out
