"""`foveate compare`: the options, the progress on screen, the closing sentence."""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.syntax import Syntax
from rich.text import Text

from foveate.compare.listener import Listener
from foveate.compare.options import Options

if TYPE_CHECKING:
    from foveate.compare.summary import Row

WIDE = 172


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare")(compare)


def compare(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder with safetensors, a hub id, or smollm2, minilm, whisper-encoder. "
            "Default: SmolLM2-135M-Instruct.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help='Such as "sink-window(window=1024),vertical-slash"; see `foveate methods`.'
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, such as 1024,2048,4096.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A UTF-8 file to measure on. Default: WikiText-2, shipped.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the results.")] = "foveate-report",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16. Default by device.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts per pass.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.")] = None,
    repeats: Annotated[int, typer.Option(help="Paired passes, each on its own text.")] = 3,
    needle_depths: Annotated[
        str, typer.Option(help="Where pass keys are hidden, as shares of the length; or none.")
    ] = "0.1,0.5,0.9",
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded after each pass.")] = 12,
    max_ppl_loss: Annotated[
        float, typer.Option(help="Perplexity loss up to which a method may be recommended.")
    ] = 0.01,
    max_needle_loss: Annotated[
        float, typer.Option(help="Loss of the share of keys found, likewise.")
    ] = 0.0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Each method at several budgets: a curve for each.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on standard output.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Put earlier results aside and measure anew.")
    ] = False,
) -> None:
    """Measure attentions on your model and text, and say which one to use.

    Speed, memory and quality of each method against dense attention (transformers' sdpa), in turn
    in the same run. Writes results.jsonl, table.md and report.html. Stopped at any moment, it goes
    on from there when it's started again.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from foveate.compare.run import compare as run
    from foveate.compare.table import screen_table

    options = Options(
        model=model,
        methods=methods,
        lengths=lengths,
        text=text,
        out=out,
        device=device,
        dtype=dtype,
        batch=batch,
        threads=threads,
        repeats=repeats,
        needle_depths=needle_depths,
        decode_tokens=decode_tokens,
        max_ppl_loss=max_ppl_loss,
        max_needle_loss=max_needle_loss,
        sweep=sweep,
        fresh=fresh,
    )
    with Screen(_console(stderr=True)) as screen:
        result = run(options, screen)
    if as_json:
        sys.stdout.write(json.dumps(result.as_dict(), indent=2, default=str) + "\n")
        return
    console = _console(stderr=False)
    console.print(screen_table(result.rows))
    console.print(Text(f"Limits: {result.recommendation.limits}.", style="dim"))
    console.print(Text("\n" + result.recommendation.sentence, style="bold"), soft_wrap=True)
    code = result.recommendation.code
    console.print()
    if console.is_terminal:
        console.print(Syntax(code, "python", background_color="default", word_wrap=True))
    else:
        console.print(Text(code), soft_wrap=True)
    console.print()
    for kind, path in result.files.items():
        console.print(Text(f"{kind:8} {path}"), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else WIDE)


class _Left(ProgressColumn):
    """The time left, from the screen's own reckoning."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen = screen

    def render(self, task: Task) -> Text:
        """The column's text."""
        return Text(self.screen.left() or "time left: measuring")


class Screen(Listener):
    """The listener that shows a run on a terminal; on a pipe it writes plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._total = self._before = self._done = self._start = 0.0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(Text(text, style="dim"), soft_wrap=True)

    def begin(self, total: float, done: float) -> None:
        """Show the bar."""
        self._total, self._before, self._done = total, done, done
        self._start = perf_counter()
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _Left(self),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
        )
        self._progress.start()
        self._progress.add_task("", total=total, completed=done)  # type: ignore[arg-type]

    def advance(self, work: float, doing: str) -> None:
        """Move the bar and say what comes."""
        self._done += work
        if self._progress is not None:
            task = self._progress.tasks[0]
            self._progress.update(task.id, advance=work, description=doing or task.description)

    def left(self) -> str:
        """The time left, by what this run has done so far; empty while that is nothing."""
        done = self._done - self._before
        if done <= 0:
            return ""
        seconds = round((self._total - self._done) * (perf_counter() - self._start) / done)
        return f"{seconds // 60}:{seconds % 60:02d} left"

    def row(self, row: Row) -> None:
        """A finished row."""
        from foveate.compare.table import line

        text = line(row)
        if self._progress is None and self._total:
            text += f"  [{100 * self._done / self._total:.0f}%, {self.left()}]"
        self.console.print(Text(text), soft_wrap=True)
