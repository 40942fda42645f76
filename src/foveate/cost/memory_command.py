"""`foveate cost memory`: options and table."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foveate.cost import hardware
from foveate.cost.memory import Fit, Machine
from foveate.cost.options import (
    Bf16Option,
    HardwareOption,
    JsonOption,
    KvBitsOption,
    MlaOption,
    ModelOption,
    PresetOption,
    bytes_text,
    contexts,
    models,
    say,
    short,
    table,
    warning,
)
from foveate.cost.released import at_bits


def memory(
    model: ModelOption = None,
    preset: PresetOption = None,
    lengths: Annotated[
        str, typer.Option("--contexts", help="Tokens of each sequence: 8K,32K or 1K..128K.")
    ] = "8K,32K",
    batch: Annotated[int, typer.Option(help="Sequences, for the longest context.")] = 1,
    chips: Annotated[str, typer.Option(help="Of the table, or all.")] = "H800",
    count: Annotated[int, typer.Option(help="Chips that serve together.")] = 8,
    tp: Annotated[int, typer.Option(help="Of them, ranks that share a sequence's cache.")] = 1,
    latent_groups: Annotated[
        int, typer.Option(help="Into which these ranks cut an MLA's latent (TPLA).")
    ] = 1,
    weight_bits: Annotated[float, typer.Option(help="Of a weight.")] = 8,
    kv_bits: KvBitsOption = None,
    mla_values: MlaOption = "latent",
    chunk: Annotated[int, typer.Option(help="Tokens of a prompt that run at once.")] = 4096,
    reserve: Annotated[float, typer.Option(help="Share of memory that is left alone.")] = 0.1,
    efficiency: Annotated[
        float, typer.Option(help="Share of the roofline that kernels reach, for times.")
    ] = 1.0,
    hardware_file: HardwareOption = None,
    bf16: Bf16Option = False,
    as_json: JsonOption = False,
) -> None:
    """What fits: weights, cache and activations, the largest batch, the longest context; and times.

    Times are the roofline's, without communication: no machine is faster, and with --efficiency
    1.0 none is as fast.
    """
    given = models(model, preset, mla_values)
    wanted = hardware.choose(hardware.table(hardware_file), chips, bf16=bf16)
    rows = []
    for one, each in (at_bits(found, kv_bits) for found in given):
        for chip in wanted:
            machine = Machine(chip, count, tp, latent_groups, weight_bits / 8, each, reserve, chunk,
                              efficiency)  # fmt: skip
            fit = Fit(one, machine)
            longest = fit.longest_context(batch)
            rows += [_row(fit, n, batch, longest) for n in contexts(lengths)]
    say({"machines": rows}, [_table(rows, batch)], [_note(rows), warning(model, given)],
        as_json=as_json, figure=None)  # fmt: skip


def _row(fit: Fit, context: int, batch: int, longest: int | None) -> dict[str, Any]:
    largest = fit.largest_batch(context)
    step = fit.time_per_token(largest, context) if largest else None
    return {
        "model": fit.model.name, "hardware": fit.machine.chip.name, "chips": fit.machine.count,
        "context": context, "parameters": fit.model.parameters, "weights_on_chip": fit.weights,
        "cache_of_sequence": fit.cache(context) * fit.machine.ranks,
        "activations_on_chip": fit.activations(context),
        "memory_of_chip": fit.machine.chip.memory, "largest_batch": largest, "batch": batch,
        "longest_context": longest, "time_to_first": fit.time_to_first(context),
        "time_per_token": step,
        "tokens_per_second": None if step is None else largest / step,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], batch: int) -> Any:
    made = table("", "model", "chips", "context", "weights", "cache", "activations",
                 "largest batch", f"longest at {batch}", "first token", "then, at that batch",
                 "tokens/s", left=2)  # fmt: skip
    for row in rows:
        longest, step = row["longest_context"], row["time_per_token"]
        made.add_row(
            row["model"], f"{row['chips']} {row['hardware']}", short(row["context"]),
            bytes_text(row["weights_on_chip"]), bytes_text(row["cache_of_sequence"]),
            bytes_text(row["activations_on_chip"]), f"{row['largest_batch']:,}",
            "no bound" if longest is None else f"{longest:,}",
            f"{row['time_to_first'] * 1e3:.3g} ms", "" if step is None else f"{step * 1e3:.3g} ms",
            "" if step is None else f"{row['tokens_per_second']:,.0f}",
            style=None if row["largest_batch"] else "yellow",
        )  # fmt: skip
    return made


def _note(rows: list[dict[str, Any]]) -> str | None:
    tight = [row for row in rows if row["weights_on_chip"] > row["memory_of_chip"]]
    if not tight:
        return None
    row = tight[0]
    least = row["weights_on_chip"] * row["chips"] / row["memory_of_chip"]
    return (
        f"{row['model']}: the weights alone, {bytes_text(row['weights_on_chip'])} on each chip, "
        f"don't fit into {bytes_text(row['memory_of_chip'])}; more than {least:.1f} chips hold "
        "them (--count), or fewer bits (--weight-bits)."
    )
