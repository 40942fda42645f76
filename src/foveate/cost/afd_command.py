"""`foveate cost afd`: options, tables, figure."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cost import hardware
from foveate.cost.afd import Deployment, Outcome, budget, fewest, outcome, stages
from foveate.cost.curves import draw_pipeline
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
    contexts,
    models,
    say,
    short,
    table,
    warning,
)
from foveate.cost.pipeline import NAMES, Stages, simulate, steady
from foveate.cost.released import at_bits
from foveate.ops.errors import InputError


def afd(
    model: ModelOption = None,
    preset: PresetOption = None,
    times: Annotated[
        str | None,
        typer.Option(
            help="In place of a model: microseconds of one layer on the attention side, to the "
            "FFN, there, and back, such as 272,91,272,181; or a JSON file with a list of "
            "such lists, one for each layer, as measured."
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="Of the model, for --times with four numbers.")] = 61,
    micro_batches: Annotated[int, typer.Option(help="In flight.")] = 3,
    instances: Annotated[str, typer.Option(help="Servers of attention and FFN.")] = "2A2F",
    tokens: Annotated[int, typer.Option(help="Of a micro-batch, over all attention chips.")] = 2048,
    lengths: Annotated[
        str, typer.Option("--contexts", help="Tokens in every cache: 4K,32K or 1K..128K.")
    ] = "4K,8K,16K,32K",
    tpot: Annotated[float, typer.Option(help="Milliseconds for each token, at most.")] = 50.0,
    attention_chip: Annotated[str, typer.Option(help="Of the table.")] = "H800",
    ffn_chip: Annotated[str, typer.Option(help="Of the table.")] = "H800",
    efficiency: Annotated[
        float, typer.Option(help="Share of the roofline and network that is reached.")
    ] = 1.0,
    weight_bits: Annotated[float, typer.Option(help="Of a weight.")] = 8,
    kv_bits: KvBitsOption = None,
    mla_values: MlaOption = "latent",
    slow: Annotated[
        str | None,
        typer.Option(
            help="How many times as long each instance takes, attention / FFN: 1,1.2/1,1. The "
            "simulation alone knows it."
        ),
    ] = None,
    hardware_file: HardwareOption = None,
    bf16: Bf16Option = False,
    figure: FigureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attention and FFN on different machines: TPOT, throughput for each chip, what bounds it.

    The closed form stands beside a simulation, event by event; with a model also the fewest
    attention instances that keep within --tpot as the context grows.
    """
    if not 0 < tpot < math.inf:
        raise InputError(f"--tpot {tpot}: expected milliseconds above 0.")
    count_a, count_f = _instances(instances)
    rows: list[dict[str, Any]] = []
    per_chip = note = None
    if times is not None:
        if model is not None or preset is not None:
            raise InputError("--times takes the place of a model; give one of them.")
        given = _times(times, layers)
    else:
        found = models(model, preset, mla_values)
        if len(found) > 1:
            raise InputError(f"--preset {preset}: cost afd takes one model at a time.")
        one, kv = at_bits(found[0], kv_bits)
        chips = hardware.table(hardware_file)
        a, f = (_chip(chips, name, bf16) for name in (attention_chip, ffn_chip))
        at = Deployment(a, f, count_a, count_f, tokens, micro_batches, kv, weight_bits / 8,
                        efficiency)  # fmt: skip
        swept = contexts(lengths)
        given = stages(one, at, swept[0])
        per_chip = outcome(one, at, swept[0]).per_chip
        rows = [_context(one, at, n, tpot / 1e3) for n in swept]
        note = warning(model, found)
    factors = _slow(slow, count_a, count_f)
    closed = steady(given, micro_batches)
    played = simulate(given, micro_batches, attention=factors[0], ffn=factors[1])
    path = None if figure is None else draw_pipeline(played, rows, Path(figure).expanduser())
    pipeline = {
        "layers": len(given), "micro_batches": micro_batches,
        "us_of_first_layer": [t * 1e6 for t in given[0].each], "tpot": closed.tpot,
        "tpot_simulated": played.tpot, "bottleneck": closed.bottleneck, "busy": closed.busy,
        "budget_us": budget(tpot / 1e3, len(given)) * 1e6, "tokens_per_chip": per_chip,
        "equal_layers": len(set(given)) == 1,
    }  # fmt: skip
    notes = [note]
    if not pipeline["equal_layers"]:
        notes.append("Layers differ: the closed form is what no schedule passes, see simulated.")
    say({"pipeline": pipeline, "contexts": rows}, _tables(pipeline, rows, tpot), notes,
        as_json=as_json, figure=path)  # fmt: skip


def _context(model: Model, at: Deployment, context: int, tpot: float) -> dict[str, Any]:
    """At this context: the deployment as given, and with the fewest attention instances."""
    here, best = outcome(model, at, context), fewest(model, at, context, tpot)
    found: dict[str, Any] = {
        "context": context, "tpot_as_given": here.steady.tpot, "per_chip_as_given": here.per_chip,
        "bottleneck_as_given": here.steady.bottleneck, "attention": None, "ffn": at.ffn,
        "ratio": None, "tpot": None, "per_chip": None, "usd": None, "bottleneck": None,
    }  # fmt: skip
    return found if best is None else found | _fewest(best)


def _fewest(best: Outcome) -> dict[str, Any]:
    return {
        "attention": best.at.attention, "ratio": best.ratio, "tpot": best.steady.tpot,
        "per_chip": best.per_chip, "usd": best.usd, "bottleneck": best.steady.bottleneck,
    }  # fmt: skip


def _tables(pipeline: dict[str, Any], rows: list[dict[str, Any]], tpot: float) -> list[Any]:
    made = table("The pipeline", "stage", "µs in the first layer", "busy")
    for name, time in zip(NAMES, pipeline["us_of_first_layer"]):
        made.add_row(name, f"{time:.1f}", f"{pipeline['busy'][name]:.0%}")
    steady_state = table("", "micro-batches", "layers", "TPOT", "simulated", "set by",
                         "budget of a stage", left=0)  # fmt: skip
    steady_state.add_row(
        str(pipeline["micro_batches"]), str(pipeline["layers"]), f"{pipeline['tpot'] * 1e3:.4g} ms",
        f"{pipeline['tpot_simulated'] * 1e3:.4g} ms", pipeline["bottleneck"],
        f"{pipeline['budget_us']:.0f} µs",
    )  # fmt: skip
    found = [made, steady_state]
    if rows:
        swept = table(f"As the context grows, within {tpot:g} ms: the fewest attention instances",
                      "context", "as given", "tokens/s a chip", "instances", "A : F", "TPOT",
                      "tokens/s a chip", "USD for 1M", "set by")  # fmt: skip
        for row in rows:
            given = (short(row["context"]), f"{row['tpot_as_given'] * 1e3:.3g} ms",
                     f"{row['per_chip_as_given']:,.0f}")  # fmt: skip
            if row["attention"] is None:
                swept.add_row(*given, "none do", "", "", "", "", row["bottleneck_as_given"])
                continue
            swept.add_row(
                *given, f"{row['attention']}A{row['ffn']}F", f"{row['ratio']:.2g}",
                f"{row['tpot'] * 1e3:.3g} ms", f"{row['per_chip']:,.0f}", f"{row['usd']:.3f}",
                row["bottleneck"],
            )  # fmt: skip
        found.append(swept)
    return found


def _chip(chips: dict[str, hardware.Chip], name: str, bf16: bool) -> hardware.Chip:
    found = hardware.choose(chips, name, bf16=bf16)
    if len(found) > 1:
        raise InputError(f"{name!r}: each side is made of one kind of chip; name one.")
    return found[0]


def _instances(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*[aA]\s*(\d+)\s*[fF]\s*", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise InputError(f"--instances {text!r}: expected such as 2A2F.")
    return int(match[1]), int(match[2])


def _times(text: str, layers: int) -> list[Stages]:
    """Four numbers for every layer, or a JSON file of them by layer; microseconds."""
    listed: Any
    if layers < 1:
        raise InputError(f"--layers {layers}: expected at least 1.")
    path = Path(text).expanduser()
    if path.suffix == ".json":
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--times {path} can't be read ({error.strerror}).") from error
        except ValueError as error:
            raise InputError(f"--times {path} is no JSON ({error}).") from error
    else:
        try:
            listed = [[float(part) for part in text.split(",")]] * layers
        except ValueError as error:
            raise InputError(
                f"--times {text!r}: expected four numbers such as 272,91,272,181, or a .json file."
            ) from error
    good = isinstance(listed, list) and listed and all(
        isinstance(one, list) and len(one) == 4
        and all(isinstance(t, int | float) and not isinstance(t, bool) for t in one)
        for one in listed
    )  # fmt: skip
    if not good:
        raise InputError(
            f"--times {text!r}: expected four numbers for each layer: attention, to the FFN, FFN, "
            "back, in microseconds."
        )
    return [Stages(*(t * 1e-6 for t in one)) for one in listed]


def _slow(text: str | None, attention: int, ffn: int) -> tuple[list[float], list[float]]:
    """Factors of each instance; one of each side where nothing is said, as they are all alike."""
    if text is None:
        return [1.0], [1.0]
    try:
        sides = [[float(part) for part in side.split(",")] for side in text.split("/")]
    except ValueError as error:
        raise InputError(f"--slow {text!r}: expected factors such as 1,1.2/1,1.") from error
    if [len(side) for side in sides] != [attention, ffn]:
        raise InputError(
            f"--slow {text!r}: expected {attention} factors, a slash, and {ffn} factors, as "
            "--instances has them."
        )
    return sides[0], sides[1]
