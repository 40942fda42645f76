"""`foveate bench parallel`: options, table, figure, and a page that explains them."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from foveate.bench.figure import new_figure, save
from foveate.bench.screen import close, numbers, print_json, run_job, screen, words
from foveate.ops.errors import MissingPackageError

Found = dict[str, Any]


def parallel(
    schemes: Annotated[
        str | None, typer.Option(help='By semicolons: "ring; usp(ulysses=2); magi".')
    ] = None,
    shardings: Annotated[
        str | None, typer.Option(help="contiguous, zigzag, document-zigzag, striped, by-work.")
    ] = None,
    masks: Annotated[str | None, typer.Option(help="Names of the catalogue.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, such as 4096,16384.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Processes, such as 2,4,8.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Of keys and values.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    documents: Annotated[
        str, typer.Option(help="Document lengths: short, medium, long, mix.")
    ] = "short",
    repeats: Annotated[int, typer.Option(help="Rounds in which all take turns.")] = 3,
    seed: Annotated[int, typer.Option(help="Of tensors, documents and tables.")] = 0,
    out: Annotated[
        str, typer.Option(help="Folder for results.jsonl, the figure and the page.")
    ] = "foveate-report/bench",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Put earlier results aside, measure anew.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cells; options still count.")
    ] = False,
) -> None:
    """Attention over many ranks: time, bytes against theory, balance, memory, speed-up.

    Ranks are processes of this machine with one thread each. A speed is printed only if output and
    gradients agreed with one rank's. Stopped at any moment, it goes on from there.
    """
    from foveate.bench import parallel as job

    base = job.Options()
    if quick:
        base = job.Options(
            schemes=("ring", "ulysses", "magi"), shardings=("contiguous", "document-zigzag"),
            masks=("causal", "causal-document"), lengths=(1024,), ranks=(2,), repeats=2,
        )  # fmt: skip
    named = None if schemes is None else tuple(s.strip() for s in schemes.split(";") if s.strip())
    options = job.Options(
        schemes=named or base.schemes,
        shardings=words(shardings) or base.shardings,
        masks=words(masks) or base.masks,
        lengths=numbers("--lengths", lengths) or base.lengths,
        ranks=numbers("--ranks", ranks) or base.ranks,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        documents=documents,
        repeats=min(repeats, base.repeats) if quick else repeats,
        seed=seed,
    )
    options.check()
    found = run_job(lambda *where: job.run_bench(options, *where), out, fresh)
    said = job.lines(found)
    path: Path | None = Path(out) / "parallel.png"
    try:
        figure(found, Path(out) / "parallel.png")
    except MissingPackageError as error:
        said.append(str(error))
        path = None
    written = page(found, said, Path(out) / "parallel.md")
    if as_json:
        print_json(found, said)
        return
    console = screen()
    for table in tables(found):
        console.print(table)
        console.print()
    close(console, said, [Path(out) / "results.jsonl", path, written])


_COLUMNS = ("scheme", "sharding", "busiest", "tiles", "MiB sent", "of theory", "cpu ms", "speed-up",
            "wall ms", "MiB peak")  # fmt: skip


def _cells_of(result: Found) -> list[str]:
    name = [result["scheme"], result["sharding"]]
    if "refused" in result:
        return name + ["-"] * (len(_COLUMNS) - 2)
    sent = sum(sum(result["sent"][d]) for d in ("forward", "backward"))
    theory = sum(sum(result["theory"][d]) for d in ("forward", "backward"))
    peak = result["peak_bytes"]
    row = [
        *name, f"{result['imbalance']:.2f}", f"{result['area_imbalance']:.2f}",
        f"{result['bytes'] / 2**20:.2f}", f"{sent / theory:.4f}" if theory else "-",
    ]  # fmt: skip
    if "speed_up" not in result:
        return [*row, "-", "-", "-", "-"]
    return [
        *row, f"{median(result['cpu']) * 1e3:.1f}", f"{result['speed_up']:.2f}",
        f"{median(result['wall']) * 1e3:.1f}", "-" if peak is None else f"{peak / 2**20:.1f}",
    ]  # fmt: skip


def _remark(result: Found) -> str:
    if "refused" in result:
        return str(result["refused"])
    return "" if result["right"] else f"WRONG by {result['error']:.1e}"


def tables(found: list[Found]) -> list[Table]:
    """A table for each mask, length and number of ranks."""
    made = []
    for one in found:
        cell, values = one["cell"], one["values"]
        title = f"{cell['mask']}, {cell['length']:,} tokens on {cell['ranks']} ranks"
        if "alone" in values:
            title += f"; one rank: {median(values['alone']['cpu']) * 1e3:.1f} ms"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in _COLUMNS:
            text = name in ("scheme", "sharding")
            table.add_column(name, justify="left" if text else "right", no_wrap=True)
        table.add_column("", overflow="fold")
        for result in values["results"]:
            wrong = not result.get("right", True)
            table.add_row(
                *_cells_of(result), Text(_remark(result), style="red" if wrong else "dim")
            )
        made.append(table)
    return made


EXPLAINED = {
    "busiest": "query-key pairs of the busiest rank over the mean: 1.00 is even. It bounds the "
    "speed-up from above.",
    "tiles": "the same for elements of visited tiles, which is what is computed. Striped shares "
    "are even in pairs but visit more tiles.",
    "MiB sent": "most that a rank sent to others in a forward and a backward, counted where it "
    "leaves.",
    "of theory": "numbers that all ranks sent, over those of the formulas (the lse counted in).",
    "cpu ms": "processor time of the busiest rank, forward and backward, gloo's own work included; "
    "median of the rounds.",
    "speed-up": "one rank's processor time over that. On ranks of their own, with links that never "
    "wait, this is what they would gain; links are in `foveate cost context`.",
    "wall ms": "of the slowest rank on this machine, whose cores all ranks share.",
    "MiB peak": "most that a rank's memory grew by in a forward and backward.",
}


def page(found: list[Found], said: list[str], path: Path) -> Path:
    """Write the page that explains each result."""
    text = ["# Context parallelism on this machine", "", *(f"- {line}" for line in said), ""]
    if (path.parent / "parallel.png").exists():
        text += ["![busiest rank and bytes](parallel.png)", ""]
    text += ["| column | what it says |", "| --- | --- |"]
    text += [f"| {name} | {what} |" for name, what in EXPLAINED.items()]
    for one in found:
        cell = one["cell"]
        text += ["", f"## {cell['mask']}, {cell['length']:,} tokens, {cell['ranks']} ranks", ""]
        if "failed" in one["values"]:
            text.append(one["values"]["failed"])
        text += ["| " + " | ".join(_COLUMNS) + " | |", "| --- " * (len(_COLUMNS) + 1) + "|"]
        for result in one["values"]["results"]:
            text.append("| " + " | ".join([*_cells_of(result), _remark(result)]) + " |")
    path.write_text("\n".join(text) + "\n")
    return path


def figure(found: list[Found], path: Path) -> Path:
    """Speed-up over balance, and bytes over the formulas' bytes, a point for each result.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    from foveate.bench.parallel import every_result

    drawn, axes = new_figure(1, 2, (11, 4.6))
    left, right = axes[0]
    for scheme in dict.fromkeys(r["scheme"] for _, r in every_result(found)):
        ran = [(c, r) for c, r in every_result(found) if r["scheme"] == scheme and "speed_up" in r]
        if not ran:
            continue
        left.scatter(
            [1 / r["imbalance"] for _, r in ran],
            [r["speed_up"] / c["ranks"] for c, r in ran], s=18, label=scheme,
        )  # fmt: skip
        sent, theory = (
            [sum(sum(r[what][d]) for d in ("forward", "backward")) for _, r in ran]
            for what in ("sent", "theory")
        )
        right.scatter(theory, sent, s=18, label=scheme)
    left.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    left.set(xlabel="mean over busiest rank, pairs", ylabel="speed-up / ranks (processor time)")
    right.axline((1, 1), slope=1, color="grey", linewidth=0.8)
    right.set(xlabel="numbers sent, by the formulas", ylabel="numbers sent, counted")
    right.set_xscale("symlog")
    right.set_yscale("symlog")
    left.legend(fontsize=7)
    save(drawn, path)
    return path
