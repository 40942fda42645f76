"""`foveate bench kernels --device cuda` and `decode --device cuda`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from foveate.bench.screen import close, draw, print_json, run_job, screen
from foveate.ops.errors import InputError

_QUICK_MASKS = (
    "full", "causal", "window@0.1", "documents@0.1", "block-random@0.2", "vertical-slash@0.1",
)  # fmt: skip


def kernels(
    device: str,
    masks: tuple[str, ...],
    lengths: tuple[int, ...],
    head_dims: tuple[int, ...],
    heads: int | None,
    kv_heads: int | None,
    dtypes: tuple[str, ...],
    passes: tuple[str, ...],
    backends: tuple[str, ...],
    tiles: tuple[int, ...],
    documents: str,
    repeats: int | None,
    seed: int,
    out: str,
    as_json: bool,
    fresh: bool,
    quick: bool,
    workers: int,
) -> None:
    """Measure prefill and training shapes; print tables and one line for each dtype and pass."""
    from foveate.bench import gpu_kernels as job
    from foveate.bench.gpu import required
    from foveate.bench.gpu_figure import gpu_kernel_figure
    from foveate.bench.gpu_show import kernel_summary, kernel_table

    where = required(device)
    base = job.Options()
    if quick:
        base = replace(base, masks=_QUICK_MASKS, lengths=(8192,))
    if len(tiles) > 1:
        raise InputError("--tile: on a GPU give one size.")
    heads = base.heads if heads is None else heads
    options = job.Options(
        masks=masks or base.masks,
        lengths=lengths or base.lengths,
        head_dims=head_dims or base.head_dims,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        dtypes=dtypes or base.dtypes,
        passes=passes or base.passes,
        backends=backends,
        tile=tiles[0] if tiles else base.tile,
        documents=documents,
        pace=base.pace if repeats is None else replace(base.pace, repeats=repeats),
        seed=seed,
    )
    options.check()
    found = run_job(partial(job.run, options, where, workers=workers), out, fresh)
    lines = kernel_summary(found)
    path = draw(gpu_kernel_figure, found, Path(out) / "kernels.png")
    if as_json:
        print_json(found, lines)
        return
    console = screen()
    console.print(kernel_table(found))
    console.print()
    close(console, lines, [Path(out) / "results.jsonl", path])


def decode(
    device: str,
    contexts: tuple[int, ...],
    groups: tuple[int, ...],
    kv_heads: int | None,
    head_dims: tuple[int, ...],
    caches: tuple[str, ...],
    dtypes: tuple[str, ...],
    backends: tuple[str, ...],
    repeats: int | None,
    seed: int,
    out: str,
    as_json: bool,
    fresh: bool,
    quick: bool,
) -> None:
    """Measure decoding; print a table and what share of a copy's bandwidth is reached."""
    from foveate.bench import gpu_decode as job
    from foveate.bench.gpu import required
    from foveate.bench.gpu_show import decode_summary, decode_table

    where = required(device)
    base = job.Options()
    if quick:
        base = replace(base, contexts=(32768,), head_dims=(128,), groups=(1, 8))
    options = job.Options(
        contexts=contexts or base.contexts,
        groups=groups or base.groups,
        batches=base.batches,
        kv_heads=base.kv_heads if kv_heads is None else kv_heads,
        head_dims=head_dims or base.head_dims,
        caches=caches or base.caches,
        dtypes=dtypes or base.dtypes,
        backends=backends,
        pace=base.pace if repeats is None else replace(base.pace, repeats=repeats),
        seed=seed,
    )
    options.check()
    found = run_job(lambda *more: job.run(options, where, *more), out, fresh)
    lines = decode_summary(found)
    if as_json:
        print_json(found, lines)
        return
    console = screen()
    console.print(decode_table(found))
    console.print()
    close(console, lines, [Path(out) / "results.jsonl"])
