"""The counted cells of `foveate reproduce step3` and `tpla`: nothing here is trained or timed."""

from __future__ import annotations

import random

from foveate.cost.decode import Setting, choose, price
from foveate.cost.hardware import table
from foveate.cost.layer import Mixing, mla
from foveate.cost.pipeline import Stages, simulate, steady
from foveate.cost.released import RELEASED
from foveate.papers.harness import Check, Found, at_least, at_most, ratio
from foveate.papers.system.printed import CHIPS, COUNTS, PRICES

# t_A, t_F, c_AF, c_FA in microseconds, micro-batches, and TPOT in ms, at 61 layers.
CASES = (
    ((272, 272, 91, 181), 3, 49.776), ((100, 100, 500, 500), 3, 91.5),
    ((200, 200, 200, 200), 4, 48.8), ((272, 272, 91, 181), 2, 49.776),
)  # fmt: skip
STEP3_ARMS = ("Step-3 costs", "DeepSeek-V3 costs", "Qwen3-235B costs", "cost model", "pipeline")
STEP3_CHECKS: tuple[Check, ...] = (
    at_least(
        "cells of table 6 that are equal to a tenth of a cent",
        lambda at: at["cost model"]["prices"], 108, exact=True,
    ),
    at_least(
        "cells of tables 2 and 3 that are equal to three digits",
        lambda at: at["cost model"]["counts"], 54, exact=True,
    ),
    at_most(
        "milliseconds by which a worked case of the pipeline is missed",
        lambda at: at["pipeline"]["worked cases"], 1e-6, exact=True,
    ),
    at_most(
        "part by which simulation and closed form differ",
        lambda at: at["pipeline"]["simulated"], 1e-9, exact=True,
    ),
    ratio("DeepSeek-V3 costs", "Step-3 costs", 1.2, "USD at 8K", exact=True),
    ratio("Qwen3-235B costs", "Step-3 costs", 1.1, "USD at 8K", exact=True),
    ratio("DeepSeek-V3 costs", "Step-3 costs", 1.6, "USD at 32K", exact=True),
    ratio("Qwen3-235B costs", "Step-3 costs", 1.45, "USD at 32K", exact=True),
)  # fmt: skip
TPLA_ARMS = ("MLA on 2 H800", "TPLA on 2 H800")
TPLA_CHECKS: tuple[Check, ...] = (
    ratio("MLA on 2 H800", "TPLA on 2 H800", 1.79, "roofline us at 32K", exact=True),
)  # fmt: skip


def step3_costs() -> Found:
    """USD for a million tokens by the report's model, its tables, and the pipeline."""
    chips = table()
    counts = prices = 0
    for key, text in COUNTS.items():
        model = RELEASED[key]()
        ours = (model.bytes(8192), model.attention(8192), model.linear, model.feedforward,
                model.bytes(32768), model.attention(32768))  # fmt: skip
        counts += sum(
            f"{mine:.2e}" == f"{float(theirs):.2e}" for mine, theirs in zip(ours, text.split())
        )
    for key, text in PRICES.items():
        model = RELEASED[key]()
        four = [chips[name] for name in CHIPS]
        usd = [price(model, chip, Setting(n)).attention for n in (8192, 32768) for chip in four]
        usd += [price(model, chip, Setting(8192)).ffn for chip in four]
        prices += sum(round(mine, 3) == float(theirs) for mine, theirs in zip(usd, text.split()))
    found: dict[str, dict[str, float]] = {
        "cost model": {"prices": float(prices), "counts": float(counts)},
        "pipeline": {"worked cases": _worked_cases(), "simulated": _simulated()},
    }
    named = zip(STEP3_ARMS, ("step-3", "deepseek-v3", "qwen3-moe"))
    for arm, key in named:
        model = RELEASED[key]()
        found[arm] = {
            f"USD at {n // 1024}K": choose(model, list(chips.values()), Setting(n)).usd
            for n in (8192, 32768)
        }
    return found


def _worked_cases() -> float:
    """The largest difference to the worked cases, closed form and simulation, in ms."""
    missed = 0.0
    for (a, f, there, back), batches, ms in CASES:
        layers = [Stages(a * 1e-6, there * 1e-6, f * 1e-6, back * 1e-6)] * 61
        for tpot in (steady(layers, batches).tpot, simulate(layers, batches).tpot):
            missed = max(missed, abs(tpot * 1e3 - ms))
    return missed


def _simulated() -> float:
    """The largest relative difference of simulation and closed form over drawn pipelines."""
    draw, most = random.Random(0), 0.0
    for _ in range(100):
        layers = [Stages(*(draw.random() for _ in range(4)))] * draw.randint(1, 7)
        batches = draw.randint(1, 6)
        closed = steady(layers, batches).tpot
        most = max(most, abs(simulate(layers, batches, 40).tpot / closed - 1))
    return most


def tpla_costs() -> Found:
    """DeepSeek-V3's attention over a cached 32K in BF16 on two H800: one sequence, one layer.

    By the roofline: what a rank reads at its bandwidth, or what it computes at its BF16 peak.
    """
    layer = mla(7168, 128, 1536, value="latent")
    return dict(zip(TPLA_ARMS, (_on_h800(layer.on_rank(2)), _on_h800(layer.on_rank(2, 2)))))


def _on_h800(layer: Mixing, context: int = 32768) -> dict[str, float]:
    chip = table()["H800"]
    read, flops = layer.bytes(context, 2.0), layer.flops(context)
    return {
        "bytes for each token": layer.kv * 2.0,
        "roofline us at 32K": 1e6 * max(read / chip.bandwidth, flops / chip.bf16),
    }
