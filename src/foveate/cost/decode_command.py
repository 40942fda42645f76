"""`foveate cost decode`: options, tables, figure."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cost import hardware
from foveate.cost.curves import draw_decode
from foveate.cost.decode import (
    Setting,
    bound,
    choose,
    dense_batch,
    experts_needed,
    intensity,
    least_sparsity,
    price,
    training_price,
)
from foveate.cost.hardware import Chip
from foveate.cost.layer import Model
from foveate.cost.options import (
    Bf16Option,
    FigureOption,
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
from foveate.ops.errors import InputError


def decode(
    model: ModelOption = None,
    preset: PresetOption = None,
    lengths: Annotated[
        str, typer.Option("--contexts", help="Tokens in the cache: 8K,32K or 1K..128K.")
    ] = "8K,32K",
    chips: Annotated[str, typer.Option(help="Of the table, or all.")] = "all",
    hardware_file: HardwareOption = None,
    bf16: Bf16Option = False,
    kv_bits: KvBitsOption = None,
    mla_values: MlaOption = "entry",
    drafted: Annotated[int, typer.Option(help="Tokens that one pass computes.")] = 1,
    accepted: Annotated[float | None, typer.Option(help="Of them, on average. Default: all.")] = (
        None
    ),
    tp: Annotated[int, typer.Option(help="Ranks that share a sequence's cache.")] = 1,
    latent_groups: Annotated[
        int, typer.Option(help="Into which these ranks cut an MLA's latent (TPLA).")
    ] = 1,
    tpot: Annotated[float, typer.Option(help="Milliseconds for each token, for S.")] = 50.0,
    figure: FigureOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a decoded token costs: bytes, operations, USD, and which chips to take for what.

    Step-3's model (arXiv 2507.19427, section 3): the cache or attention's operations, whichever
    takes longer, and the projections and the feed-forward at the chip's peak. Weights are amortised
    by batching, communication overlaps.
    """
    if not 0 < tpot < math.inf:
        raise InputError(f"--tpot {tpot}: expected milliseconds above 0.")
    given = models(model, preset, mla_values)
    wanted = hardware.choose(hardware.table(hardware_file), chips, bf16=bf16)
    each = [at_bits(one, kv_bits) for one in given]
    settings = [
        [Setting(n, b, drafted, drafted if accepted is None else accepted)
         for n in contexts(lengths)] for _, b in each
    ]  # fmt: skip
    rows = [
        _row(one, at, tp, latent_groups) for (one, _), many in zip(each, settings) for at in many
    ]
    prices = [
        _price(one, chip, at) for (one, _), many in zip(each, settings) for at in many
        for chip in wanted
    ]  # fmt: skip
    choices = [
        {"model": one.name, "context": at.context} | dataclasses.asdict(choose(one, wanted, at))
        for (one, _), many in zip(each, settings) for at in many
    ]  # fmt: skip
    sparsity = [_sparsity(one, chip, tpot / 1e3) for one, _ in each for chip in wanted]
    path = None
    if figure is not None:
        path = draw_decode(rows, choices, wanted, Path(figure).expanduser())
    found = {"models": rows, "prices": prices, "choices": choices, "sparsity": sparsity}
    tables = [_models(rows, tp), _prices(prices, wanted), _choices(choices), _sparse(sparsity)]
    say(found, tables, [warning(model, given)], as_json=as_json, figure=path)


def _row(model: Model, at: Setting, tp: int, groups: int) -> dict[str, Any]:
    found = {
        "model": model.name, "context": at.context,
        "kv_bytes": model.bytes(at.context, at.kv_bytes),
        "attention_flops": model.attention(at.context), "linear_flops": model.linear,
        "ffn_flops": model.feedforward, "intensity": intensity(model, at),
    }  # fmt: skip
    if tp != 1 or groups != 1:
        parts = [one.on_rank(tp, groups if one.kind == "mla" else 1) for one in model.mixing]
        if groups > 1 and not any(one.kind == "mla" for one in model.mixing):
            raise InputError(f"--latent-groups {groups}: {model.name} has no latent to cut.")
        found["kv_bytes_on_rank"] = sum(one.bytes(at.context, at.kv_bytes) for one in parts)
        found["attention_flops_on_rank"] = sum(one.flops(at.context) for one in parts)
    return found


def _price(model: Model, chip: Chip, at: Setting) -> dict[str, Any]:
    found = price(model, chip, at)
    return {
        "model": model.name, "context": at.context, "hardware": chip.name,
        "bound": bound(model, chip, at), "usd_attention": found.attention, "usd_ffn": found.ffn,
        "usd": found.total, "usd_core": found.core, "usd_linear": found.linear,
        "usd_training": training_price(model, chip, at.context),
    }  # fmt: skip


def _sparsity(model: Model, chip: Chip, tpot: float) -> dict[str, Any]:
    least = least_sparsity(model.dim, len(model.layers), chip, tpot=tpot)
    found: dict[str, Any] = {
        "model": model.name, "hardware": chip.name, "sparsity": model.sparsity, "least": least,
        "fits": model.sparsity >= least, "balance": chip.balance, "dense_batch": dense_batch(chip),
        "moe_batch": dense_batch(chip) / model.sparsity, "experts": None, "experts_needed": None,
    }  # fmt: skip
    for layer in model.layers:
        part = layer.feedforward
        if part is not None and part.experts and part.sparsity == model.sparsity:
            found["experts"] = part.top_k
            found["experts_needed"] = experts_needed(part, least)
            break
    return found


def _models(rows: list[dict[str, Any]], tp: int) -> Any:
    more = (f"bytes on each of {tp}", "F_attn there") if "kv_bytes_on_rank" in rows[0] else ()
    made = table("For one token", "model", "context", "cache read", "F_attn", "F_lin", "F_ffn",
                 "FLOPs a byte", *more)  # fmt: skip
    for row in rows:
        cells = [
            row["model"], short(row["context"]), bytes_text(row["kv_bytes"]),
            *(f"{row[name]:.2e}" for name in ("attention_flops", "linear_flops", "ffn_flops")),
            f"{row['intensity']:.3g}",
        ]  # fmt: skip
        if more:
            cells += [bytes_text(row["kv_bytes_on_rank"]), f"{row['attention_flops_on_rank']:.2e}"]
        made.add_row(*cells)
    return made


def _prices(rows: list[dict[str, Any]], chips: list[Chip]) -> Any:
    """A line for each model and context, a column for each chip; memory-bound attention is *."""
    made = table("USD for a million tokens: attention + FFN (* attention is bound by memory)",
                 "model", "context", *(chip.name for chip in chips))  # fmt: skip
    for start in range(0, len(rows), len(chips)):
        mine = rows[start : start + len(chips)]
        made.add_row(
            mine[0]["model"], short(mine[0]["context"]),
            *(f"{_usd(r['usd_attention'])}{'*' if r['bound'] == 'memory' else ''} + "
              f"{_usd(r['usd_ffn'])}" for r in mine),
        )  # fmt: skip
    return made


def _choices(rows: list[dict[str, Any]]) -> Any:
    made = table("Cheapest", "model", "context", "one chip", "USD", "attention + FFN apart", "USD")
    for row in rows:
        made.add_row(row["model"], short(row["context"]), row["alone"], _usd(row["usd_alone"]),
                     f"{row['attention']} + {row['ffn']}", _usd(row["usd"]))  # fmt: skip
    return made


def _sparse(rows: list[dict[str, Any]]) -> Any:
    made = table("Share of experts that a token runs (S), and the least that the network allows",
                 "model", "chip", "X / M", "dense batch", "S", "least S", "experts",
                 "needed", left=2)  # fmt: skip
    for row in rows:
        sparse = row["experts"] is not None
        needed = f"{max(0.0, row['experts_needed']):.1f}" if sparse else ""
        made.add_row(row["model"], row["hardware"], f"{row['balance']:.0f}",
                     f"{row['dense_batch']:.0f}", f"{row['sparsity']:.3f}", f"{row['least']:.3f}",
                     str(row["experts"]) if sparse else "", needed,
                     style=None if row["fits"] else "yellow")  # fmt: skip
    return made


def _usd(value: float) -> str:
    """Three decimals as the report prints them, or two digits of what would be nearly 0 there."""
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"
