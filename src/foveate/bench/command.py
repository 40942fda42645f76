"""The commands of `foveate bench`: options, progress, tables, files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.bench import gpu_command as gpu
from foveate.bench.parallel_command import parallel
from foveate.bench.scaling_command import scaling
from foveate.bench.screen import close, draw, numbers, print_json, run_job, screen, words
from foveate.bench.video_command import video

OUT = "foveate-report/bench"

Out = Annotated[str, typer.Option(help="Folder for results.jsonl and the figure.")]
Repeats = Annotated[int | None, typer.Option(help="Paired rounds of each cell.")]
Budget = Annotated[
    float, typer.Option(help="Seconds after which a cell begins no further round (3 are run).")
]
Clock = Annotated[
    str, typer.Option(help="wall, or cpu: processor time, steadier on a busy machine.")
]
Threads = Annotated[
    str | None, typer.Option(help="Threads of torch, such as 1,2. Default: 1 and all.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Put earlier results aside, measure anew.")]
Seed = Annotated[int, typer.Option(help="Of tensors, documents and random patterns.")]
Device = Annotated[
    str, typer.Option(help="cpu, or cuda: the GPU has contestants and defaults of its own.")
]
Dtypes = Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")]
Backends = Annotated[
    str | None, typer.Option(help="Who takes part, such as sdpa,cpu,blocks. Default: these.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    bench.command("kernels")(kernels)
    bench.command("decode")(decode)
    bench.command("projections")(projections)
    bench.command("neighborhood")(neighborhood)
    bench.command("scaling")(scaling)
    bench.command("parallel")(parallel)
    bench.command("video")(video)
    app.add_typer(bench, name="bench", help="How fast the kernels are on this machine.")


def kernels(
    masks: Annotated[
        str | None,
        typer.Option(
            help="Names, or groups: targets, density, catalogue, all. NAME@SHARE sets a density: "
            "window@0.1, block-random@0.2."
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, such as 2048,4096.")] = None,
    head_dims: Annotated[str | None, typer.Option(help="Head sizes, such as 64,128.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads; 2, on a GPU 16.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; default as many.")] = None,
    dtypes: Dtypes = None,
    passes: Annotated[str | None, typer.Option(help="forward, backward.")] = None,
    backends: Backends = None,
    flex: Annotated[
        bool, typer.Option("--flex", help="FlexAttention too: it compiles for every mask.")
    ] = False,
    threads: Threads = None,
    tile: Annotated[str | None, typer.Option(help="Sizes of tiles, such as 64,128.")] = None,
    documents: Annotated[
        str, typer.Option(help="Document lengths: short, medium, long, mix.")
    ] = "short",
    repeats: Repeats = None,
    budget: Budget = 60.0,
    clock: Clock = "wall",
    seed: Seed = 0,
    out: Out = OUT,
    as_json: AsJson = False,
    fresh: Fresh = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cells, in a minute; options still count.")
    ] = False,
    device: Device = "cpu",
    workers: Annotated[
        int, typer.Option(help="On a GPU: processes that compile; one at a time measures.")
    ] = 1,
) -> None:
    """Prefill and training: every backend on every mask, against SDPA and against the ideal.

    The ideal of a sparse mask is the best dense time times the share of tiles that it visits. A
    speed is printed only if the same run's output and gradients agreed with float64. Stopped at
    any moment, it goes on from there when it's started again.
    """
    if device != "cpu":
        gpu.kernels(
            device, words(masks), numbers("--lengths", lengths),
            numbers("--head-dims", head_dims), heads, kv_heads, words(dtypes), words(passes),
            words(backends), numbers("--tile", tile), documents, repeats, seed, out, as_json,
            fresh, quick, workers,
        )  # fmt: skip
        return
    heads = 2 if heads is None else heads
    from foveate.bench import kernels as job
    from foveate.bench.figure import kernel_figure
    from foveate.bench.show import kernel_tables, summary

    base = job.Options()
    if quick:
        base = job.Options(
            masks=("full", "causal", "window@0.2", "block-random@0.2", "vertical-slash@0.2"),
            lengths=(1024,), head_dims=(64,), dtypes=("float32",), tiles=(64,),
        )  # fmt: skip
    options = job.Options(
        masks=words(masks) or base.masks,
        lengths=numbers("--lengths", lengths) or base.lengths,
        head_dims=numbers("--head-dims", head_dims) or base.head_dims,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        dtypes=words(dtypes) or base.dtypes,
        passes=words(passes) or base.passes,
        backends=words(backends),
        flex=flex,
        threads=numbers("--threads", threads) or _threads(quick, clock),
        tiles=numbers("--tile", tile) or base.tiles,
        documents=documents,
        pace=_pace(repeats, budget, clock, quick),
        seed=seed,
    )
    options.check()
    found = run_job(lambda *where: job.run(options, *where), out, fresh)
    names = [name for name in options.names() if name not in ("sdpa", "flex")]
    lines = [line for name in names for line in summary(found, name)]
    path = draw(kernel_figure, found, Path(out) / "kernels.png")
    if as_json:
        print_json(found, lines)
        return
    console = screen()
    for table in kernel_tables(found):
        console.print(table)
        console.print()
    close(console, lines, [Path(out) / "results.jsonl", path])


def decode(
    contexts: Annotated[
        str | None, typer.Option(help="Keys in the cache, such as 8192,65536.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Query heads on each key head, such as 1,8,64.")
    ] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; 2, on a GPU 8.")] = None,
    head_dims: Annotated[str | None, typer.Option(help="Head sizes, such as 64,128.")] = None,
    caches: Annotated[
        str | None,
        typer.Option(
            help="whole, mfa (64 query heads on one key head of 256), selected (one tile in eight "
            "is read), latent (values are the first part of the keys)."
        ),
    ] = None,
    dtypes: Dtypes = None,
    backends: Backends = None,
    threads: Threads = None,
    footprint: Annotated[
        int, typer.Option(help="MiB of caches gone through in turn: several times the L3.")
    ] = 256,
    repeats: Repeats = None,
    budget: Budget = 60.0,
    clock: Clock = "wall",
    seed: Seed = 0,
    out: Out = OUT,
    as_json: AsJson = False,
    fresh: Fresh = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cells, in a minute; options still count.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Decoding one token against a long cache, as a share of what memory and compute allow.

    Both limits are measured in the same rounds: reading the keys and values once, and the fastest
    square matrix product. "in cache" holds the speed against the engine's own rate on keys that
    stay in the processor's cache, in place of the matrix product's.
    """
    if device != "cpu":
        gpu.decode(
            device, numbers("--contexts", contexts), numbers("--groups", groups), kv_heads,
            numbers("--head-dims", head_dims), words(caches), words(dtypes), words(backends),
            repeats, seed, out, as_json, fresh, quick,
        )  # fmt: skip
        return
    kv_heads = 2 if kv_heads is None else kv_heads
    from foveate.bench import decode as job
    from foveate.bench.figure import decode_figure
    from foveate.bench.show import decode_summary, decode_table

    base = job.Options()
    if quick:
        base = job.Options(
            contexts=(8192,), groups=(1, 8, 64), head_dims=(64,), dtypes=("float32",),
            caches=("whole",),
        )  # fmt: skip
    options = job.Options(
        contexts=numbers("--contexts", contexts) or base.contexts,
        groups=numbers("--groups", groups) or base.groups,
        kv_heads=kv_heads,
        head_dims=numbers("--head-dims", head_dims) or base.head_dims,
        caches=words(caches) or base.caches,
        dtypes=words(dtypes) or base.dtypes,
        threads=numbers("--threads", threads) or _threads(quick, clock),
        backends=words(backends),
        footprint=footprint << 20,
        pace=_pace(repeats, budget, clock, quick),
        seed=seed,
    )
    options.check()
    found = run_job(lambda *where: job.run(options, *where), out, fresh)
    names = [name for name in options.names() if name not in (*job.TORCH, job.GATHER)]
    lines = [line for name in names for line in decode_summary(found, name)]
    path = draw(decode_figure, found, Path(out) / "decode.png")
    if as_json:
        print_json(found, lines)
        return
    console = screen()
    console.print(decode_table(found))
    console.print()
    close(console, lines, [Path(out) / "results.jsonl", path])


def projections(
    names: Annotated[
        str | None,
        typer.Argument(
            help='Projections, such as "mha,mfa(head_dim=64),mla". The first is the base. Default: '
            "all, against multi-head.",
        ),
    ] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens in the cache, such as 8192.")] = None,
    dim: Annotated[int, typer.Option(help="Width of the layer.")] = 1024,
    heads: Annotated[int, typer.Option(help="Heads of the model.")] = 16,
    dtypes: Dtypes = None,
    threads: Threads = None,
    footprint: Annotated[
        int, typer.Option(help="MiB of caches gone through in turn: several times the L3.")
    ] = 256,
    repeats: Repeats = None,
    budget: Budget = 60.0,
    clock: Clock = "wall",
    seed: Seed = 0,
    out: Out = OUT,
    as_json: AsJson = False,
    fresh: Fresh = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A short cache, in a minute; options still count.")
    ] = False,
) -> None:
    """Decoding one token by every projection: what its cache holds, and how fast a step is.

    "of read" holds the attention of a step against plain reading of the same bytes, in the same
    rounds: 100% is the limit of memory. A speed is printed only if the step agreed with float64.
    """
    from foveate.bench import projections as job
    from foveate.bench.show import projection_table
    from foveate.methods import split

    base = job.Options()
    if quick:
        base = job.Options(contexts=(2048,))
    options = job.Options(
        projections=tuple(split(names)) if names else base.projections,
        contexts=numbers("--contexts", contexts) or base.contexts,
        dim=dim,
        heads=heads,
        dtypes=words(dtypes) or base.dtypes,
        threads=numbers("--threads", threads) or _threads(quick, clock),
        footprint=footprint << 20,
        pace=_pace(repeats, budget, clock, quick),
        seed=seed,
    )
    options.check()
    found = run_job(lambda *where: job.run(options, *where), out, fresh)
    if as_json:
        print_json(found, [])
        return
    console = screen()
    console.print(projection_table(found))
    console.print()
    close(console, [], [Path(out) / "results.jsonl"])


def neighborhood(
    settings: Annotated[
        str | None,
        typer.Option(
            help="GRID:WINDOW or GRID:WINDOW:STRIDE, such as 4096:255,64x64:13x13. Default: these, "
            "and four strides of 128x128:48x48."
        ),
    ] = None,
    heads: Annotated[int, typer.Option(help="Heads.")] = 1,
    head_dims: Annotated[str | None, typer.Option(help="Head sizes, such as 32,64.")] = None,
    dtypes: Dtypes = None,
    threads: Threads = None,
    repeats: Repeats = None,
    budget: Budget = 60.0,
    clock: Clock = "wall",
    seed: Seed = 0,
    out: Out = OUT,
    as_json: AsJson = False,
    fresh: Fresh = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cells, in a minute; options still count.")
    ] = False,
) -> None:
    """Neighborhood attention, naive, unfused and fused, against dense and its tiles' bound.

    "of bound" holds the fused form against dense time x visited tiles / all tiles. A speed is
    printed only if the same run's output agreed with float64.
    """
    from foveate.bench import neighborhood as job
    from foveate.bench.show import neighborhood_table

    base = job.Options()
    if quick:
        base = job.Options(settings=(
            job.Setting((1024,), (63,), (1,)), job.Setting((32, 32), (7, 7), (1, 1)),
            *(job.Setting((64, 64), (24, 24), s, (8, 16), (8, 8), ("fused",))
              for s in ((1, 1), (8, 16))),
        ))  # fmt: skip
    options = job.Options(
        settings=base.settings if settings is None else job.parse(settings),
        heads=heads,
        head_dims=numbers("--head-dims", head_dims) or base.head_dims,
        dtypes=words(dtypes) or base.dtypes,
        threads=numbers("--threads", threads) or _threads(quick, clock),
        pace=_pace(repeats, budget, clock, quick),
        seed=seed,
    )
    options.check()
    found = run_job(lambda *where: job.run(options, *where), out, fresh)
    if as_json:
        print_json(found, [])
        return
    console = screen()
    console.print(neighborhood_table(found))
    console.print()
    close(console, [], [Path(out) / "results.jsonl"])


def _pace(repeats: int | None, budget: float, clock: str, quick: bool) -> Any:
    from foveate.runs.timing import Pace

    if repeats is None:
        repeats = 3 if quick else 7
    return Pace(repeats=repeats, sample=0.005 if quick else 0.01, budget=budget, clock=clock)


def _threads(quick: bool, clock: str) -> tuple[int, ...]:
    import torch

    return (1,) if quick or clock == "cpu" else tuple(sorted({1, torch.get_num_threads()}))
