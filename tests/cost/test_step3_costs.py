"""Step-3's cost model against every cell that its report prints (the spec's oracles 6 and 7)."""

from __future__ import annotations

import itertools
import random

import pytest

from foveate.cost.afd import Deployment, budget, fewest, outcome, scaled, stages
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
from foveate.cost.hardware import table
from foveate.cost.layer import mla
from foveate.cost.pipeline import Stages, simulate, steady
from foveate.cost.released import RELEASED, kernel_values
from foveate.ops.errors import InputError
from foveate.papers.system.printed import CHIPS, COUNTS, PRICES

K8, K32 = Setting(8192), Setting(32768)
HARDWARE = table()


def made(key):
    return RELEASED[key]()


def test_step3_oracle_6_all_54_counts_to_three_digits():
    compared = 0
    for key, text in COUNTS.items():
        model = made(key)
        ours = (
            model.bytes(8192), model.attention(8192), model.linear, model.feedforward,
            model.bytes(32768), model.attention(32768),
        )  # fmt: skip
        for mine, printed in zip(ours, text.split(), strict=True):
            assert f"{mine:.2e}" == f"{float(printed):.2e}", (key, mine, printed)
            compared += 1
    assert compared == 54


def test_step3_oracle_6_all_108_prices_to_a_tenth_of_a_cent():
    worst, compared = 0.0, 0
    for key, text in PRICES.items():
        model = made(key)
        chips = [HARDWARE[name] for name in CHIPS]
        ours = [price(model, chip, at).attention for at in (K8, K32) for chip in chips]
        ours += [price(model, chip, K8).ffn for chip in chips]
        for mine, printed in zip(ours, text.split(), strict=True):
            assert round(mine, 3) == float(printed), (key, mine, printed)
            worst = max(worst, abs(mine - float(printed)))
            compared += 1
    assert compared == 108
    assert worst <= 4.955e-4  # as the spec found it, so nothing is right by luck alone


@pytest.mark.parametrize(
    ("key", "at", "usd", "chips"),
    [
        ("step-3", K8, 0.055, ("H20", "H800")), ("deepseek-v3", K8, 0.068, ("H800", "H800")),
        ("qwen3-moe", K8, 0.062, ("H20", "H800")), ("step-3", K32, 0.129, ("H20", "H800")),
        ("deepseek-v3", K32, 0.211, ("H800", "H800")), ("qwen3-moe", K32, 0.193, ("H20", "H800")),
    ],
)  # fmt: skip
def test_step3_oracle_6_quoted_totals_with_the_chips_that_give_them(key, at, usd, chips):
    found = choose(made(key), list(HARDWARE.values()), at)
    assert round(found.usd, 3) == usd
    assert (found.attention, found.ffn) == chips
    assert found.usd <= found.usd_alone


def test_step3_oracle_6_least_sparsity():
    printed = {"H800": 0.058, "H20": 0.007, "A800": 0.031, "910B": 0.034}
    for name, least in printed.items():
        assert least_sparsity(7168, 61, HARDWARE[name]) == pytest.approx(least, abs=1e-3)
    slower = least_sparsity(7168, 61, HARDWARE["H800"], network=8 * 40e9)
    assert slower == pytest.approx(0.073, abs=1e-3)
    batches = [round(dense_batch(HARDWARE[name]) + 1e-9) for name in CHIPS]
    assert batches == [296, 37, 78, 88]
    assert [round(HARDWARE[name].balance) for name in CHIPS] == [591, 74, 156, 175]
    moe = made("deepseek-v3").layers[30].feedforward
    assert round(experts_needed(moe, least_sparsity(7168, 61, HARDWARE["H800"]))) == 14


def test_sparsity_counts_shared_experts_on_both_sides():
    assert made("step-3").sparsity == pytest.approx(4 / 49)
    assert made("deepseek-v3").sparsity == pytest.approx(9 / 257)
    assert made("qwen3-32b").sparsity == 1
    with pytest.raises(InputError, match="no experts"):
        experts_needed(made("qwen3-32b").layers[0].feedforward, 0.1)


def test_figure_4_costs_on_ascend():
    """To 0.001, as the report adds cells that are rounded already (.098 + .016 for .1135)."""
    chip = HARDWARE["910B"]
    for key, k8, k32, training in (
        ("pangu-pro", 0.114, 0.395, 0.076), ("step-3", 0.078, 0.168, 0.213),
    ):  # fmt: skip
        model = made(key)
        assert price(model, chip, K8).total == pytest.approx(k8, abs=1e-3)
        assert price(model, chip, K32).total == pytest.approx(k32, abs=1e-3)
        assert round(training_price(model, chip, 8192), 3) == training


def test_arithmetic_intensity_and_the_side_of_the_roofline():
    for key, expected in (("step-3", 128), ("deepseek-v3", 512), ("qwen3-moe", 32)):
        assert intensity(made(key), K8) == pytest.approx(expected)
    model = made("step-3")
    assert intensity(model, Setting(8192, kv_bytes=0.5)) == pytest.approx(256)
    assert intensity(model, Setting(8192, drafted=2, accepted=2)) == pytest.approx(256)
    assert [bound(model, HARDWARE[n], K8) for n in CHIPS] == [
        "memory", "compute", "memory", "memory",
    ]  # fmt: skip
    assert {bound(made("deepseek-v3"), HARDWARE[n], K8) for n in CHIPS[1:]} == {"compute"}


def test_drafts_cost_what_is_rejected():
    """Memory-bound attention is read once for all drafted tokens, everything else each time."""
    model, chip = made("qwen3-moe"), HARDWARE["H800"]
    one, two = price(model, chip, K8), price(model, chip, Setting(8192, drafted=2, accepted=1.6))
    assert two.core == pytest.approx(one.core / 1.6)
    assert two.ffn == pytest.approx(one.ffn * 2 / 1.6)
    assert two.linear == pytest.approx(one.linear * 2 / 1.6)
    for bad in ({"drafted": 2, "accepted": 3}, {"accepted": 0}, {"drafted": 0}, {"kv_bytes": 0}):
        with pytest.raises(InputError, match="expected"):
            Setting(8192, **bad)


def test_sizes_of_step3():
    """31,232 bytes a token, 256 MB at 8K, 316B weights; 169.3M of them in an MFA layer."""
    model = made("step-3")
    assert model.bytes(1) == 31_232
    assert model.bytes(8192) == pytest.approx(256e6, rel=1e-2)
    assert round(model.layers[0].mixing[0].weights / 1e6, 1) == 169.3
    assert round(model.parameters / 1e9, 1) == 316.3
    active = model.linear / 2 + model.feedforward / 2 + 2 * model.dim * model.vocab
    assert round(active / 1e9, 1) == 38.8


@pytest.mark.parametrize(
    ("key", "billions"),
    [("deepseek-v3", 671), ("kimi-k2", 1026), ("qwen3-moe", 235), ("qwen3-32b", 32.8),
     ("llama4-maverick", 400), ("minimax-m1", 456), ("ernie-4.5", 300), ("pangu-pro", 72)],
)  # fmt: skip
def test_presets_have_the_sizes_that_their_makers_name(key, billions):
    assert made(key).parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_kernels_need_fewer_operations_for_mla_than_the_report_counts():
    assert mla(7168, 128, 1536).pair == 4 * 128 * 576
    assert mla(7168, 128, 1536, value="latent").pair == 2 * 128 * (576 + 512)
    assert kernel_values(made("deepseek-v3")).attention(1) == 61 * 2 * 128 * (576 + 512)


# -- several ranks (spec of tpla) -----------------------------------------------------------------
def test_tpla_costs_on_ranks():
    """Numbers cached on a device and operations for each cached token, DeepSeek-V3 (cost table)."""
    layer = mla(7168, 128, 1536, value="latent")
    assert layer.on_rank(2).kv == layer.on_rank(8).kv == 576
    assert [layer.on_rank(g, g).kv for g in (2, 4, 8)] == [320, 192, 128]
    assert layer.on_rank(2).pair == 139_264
    assert layer.on_rank(2, 2).pair == 147_456
    four = layer.on_rank(4, 2)  # two devices for each half share the heads
    assert (four.kv, four.heads, four.pair) == (320, 64, 147_456 // 2)
    gqa = made("qwen3-32b").layers[0].mixing[0]
    assert [gqa.on_rank(k).kv for k in (1, 2, 8, 16)] == [2048, 1024, 256, 256]
    assert made("step-3").layers[0].mixing[0].on_rank(8).kv == 512
    for bad in ((3, 3), (4, 3)):
        with pytest.raises(InputError, match="divide"):
            layer.on_rank(*bad)
    with pytest.raises(InputError, match="no|none"):
        gqa.on_rank(2, 2)


# -- the pipeline ----------------------------------------------------------------------------------
CASES = [
    ((272, 272, 91, 181), 3, 49.776, "attention"),
    ((100, 100, 500, 500), 3, 91.5, "network to FFN"),
    ((200, 200, 200, 200), 4, 48.8, "attention"),
    ((272, 272, 91, 181), 2, 49.776, "round trip"),
]  # fmt: skip


def of_sheet(times):
    a, f, there, back = (t * 1e-6 for t in times)
    return Stages(a, there, f, back)


@pytest.mark.parametrize(("times", "batches", "ms", "by"), CASES)
def test_step3_oracle_7_worked_cases_in_closed_form_and_simulated(times, batches, ms, by):
    layers = [of_sheet(times)] * 61
    found = steady(layers, batches)
    assert found.tpot * 1e3 == pytest.approx(ms, abs=1e-9)
    assert found.bottleneck == by
    assert simulate(layers, batches).tpot * 1e3 == pytest.approx(ms, abs=1e-9)


def test_closed_form_and_simulation_agree_wherever_layers_are_equal():
    draw = random.Random(0)
    for _ in range(120):
        one = Stages(*(draw.random() for _ in range(4)))
        layers, batches = [one] * draw.randint(1, 7), draw.randint(1, 6)
        played = simulate(layers, batches, tokens=40).tpot
        assert played == pytest.approx(steady(layers, batches).tpot, rel=1e-9)


def test_no_schedule_passes_the_bound_where_layers_differ():
    draw = random.Random(1)
    slower = 0
    for _ in range(80):
        layers = [Stages(*(draw.random() for _ in range(4))) for _ in range(draw.randint(2, 7))]
        batches = draw.randint(1, 5)
        least = steady(layers, batches).tpot
        played = simulate(layers, batches, tokens=40).tpot
        assert played >= least * (1 - 1e-9)
        slower += played > least * 1.01
    assert slower  # else there would be no need to simulate


def test_nothing_works_on_two_micro_batches_at_once_and_order_is_kept():
    draw = random.Random(2)
    layers = [Stages(*(draw.random() for _ in range(4))) for _ in range(5)]
    played = simulate(layers, 3, 4, attention=(1.0, 1.3), ffn=(1.0, 0.7, 2.0))
    lanes = {}
    for event in played.events:
        lanes.setdefault((event.stage, event.instance), []).append(event)
    assert len(lanes) == 2 * 2 + 2 * 3
    for lane in lanes.values():
        for before, after in itertools.pairwise(lane):
            assert after.start >= before.end - 1e-12
    ends, starts = {}, {}
    for e in played.events:
        key = (e.micro_batch, e.token * 5 + e.layer, e.stage)
        ends[key] = max(ends.get(key, 0), e.end)
        starts[key] = min(starts.get(key, 1e9), e.start)
    for (micro, number, stage), start in starts.items():
        before = (micro, number - (stage == 0), (stage - 1) % 4)
        if stage == 2 or (stage == 0 and number):
            assert start >= ends[before] - 1e-12  # waits for every instance of the other side
    assert len(played.events) == 3 * 4 * 5 * (2 * 2 + 2 * 3)


def test_one_slow_attention_worker_stalls_all():
    even = [Stages(1.0, 0.2, 1.0, 0.2)] * 6
    alone = simulate(even, 3, 12).tpot
    stalled = simulate(even, 3, 12, attention=(1.0, 1.0, 1.5)).tpot
    assert alone == pytest.approx(18)
    assert stalled == pytest.approx(27)


def test_three_micro_batches_against_one():
    """With t_A = t_F = c_AF + c_FA three in flight are three times as fast as one."""
    layers = [Stages(2.0, 1.0, 2.0, 1.0)] * 4
    assert [steady(layers, b).tpot for b in (1, 2, 3)] == [24, 24, 24]
    assert steady(layers, 1).tpot / 1 / (steady(layers, 3).tpot / 3) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stages(-1.0, 0, 1, 0), lambda: Stages(0, 0, 0, 0), lambda: steady([], 3),
        lambda: steady([Stages(1, 1, 1, 1)], 0), lambda: simulate([], 3),
        lambda: simulate([Stages(1, 1, 1, 1)], 1, 1),
        lambda: simulate([Stages(1, 1, 1, 1)], 1, ffn=(0.0,)),
    ],
)  # fmt: skip
def test_pipelines_that_make_no_sense(make):
    with pytest.raises(InputError, match="expected|at least"):
        make()


def test_budget_of_a_stage():
    assert budget(50e-3, 61) * 1e6 == pytest.approx(273, abs=0.5)
    assert budget(50e-3, 61, pipeline=4) * 61 == pytest.approx(12.5e-3)


def test_network_of_an_ffn_gpu():
    """G3, 2A2F, 128 tokens on each GPU: 896 KiB there, 1.75 MiB back, 161.3 Gb/s for each GPU."""
    h800 = HARDWARE["H800"]
    at = Deployment(h800, h800, 2, 2, 2048)
    assert at.tokens_on_chip == 128
    assert 128 * 7168 == 896 * 1024
    one = stages(made("step-3"), at, 4096)[10]
    assert one.back == 2 * one.to_ffn
    bits = 8 * (one.to_ffn + one.back) * h800.network / h800.chips
    assert bits / 273e-6 == pytest.approx(161.3e9, rel=1e-3)


def test_more_attention_instances_as_the_context_grows():
    """G4: the report's own estimates from 4039 tokens/s a GPU at 2A2F and 4K."""
    assert scaled(4039, 2, 2, 4) == pytest.approx(2693, abs=0.5)
    assert scaled(4039, 2, 2, 16) == pytest.approx(898, abs=0.5)
    h800, model = HARDWARE["H800"], made("step-3")
    at = Deployment(h800, h800, 2, 2, 2048)
    counts = []
    for context in (4096, 16384, 65536):
        best = fewest(model, at, context, 50e-3)
        assert best.steady.tpot <= 50e-3
        counts.append(best.at.attention)
        if best.at.attention > 1:
            fewer = Deployment(h800, h800, best.at.attention - 1, 2, 2048)
            assert outcome(model, fewer, context).steady.tpot > 50e-3
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert fewest(model, at, 4096, 1e-3) is None  # the FFN side alone takes longer


def test_modelled_times_of_one_layer_by_hand():
    """Step-3 on H800, 128 tokens on each attention GPU at 8K, 16 FFN GPUs."""
    h800 = HARDWARE["H800"]
    model, at = made("step-3"), Deployment(h800, h800, 2, 2, 2048)
    cache = 128 * 8192 * 512 / 3.35e12  # memory-bound: 128 FLOPs a byte against 591
    weights = 7168 * 2048 + 2048 * 64 * 256 + 2 * 7168 * 256 + 64 * 256 * 7168
    linear = max(2 * 128 * weights / 1.98e15, weights / 3.35e12)
    everyone = 3 * 7168 * 5120 * (49 - 48 * (45 / 48) ** 2048) / 3.35e12 / 16
    flops = 2 * 3 * 7168 * 5120 * 4 * 2048 / 1.98e15 / 16
    moe = stages(model, at, 8192)[10]
    assert moe.attention == pytest.approx(cache + linear)
    assert moe.ffn == pytest.approx(max(everyone, flops))
    assert stages(model, at, 8192)[0].ffn == pytest.approx(
        max(2 * 2048 / 1.98e15, 1 / 3.35e12) * 3 * 7168 * 18432 / 16
    )
    half = Deployment(h800, h800, 2, 2, 2048, efficiency=0.5)
    assert stages(model, half, 8192)[10].attention == pytest.approx(2 * moe.attention)


def test_weak_hardware_check():
    """G5: an L20 (864 GB/s) in 272 us: 235 MB, 67 MB of weights with W_o over 8, 328K tokens."""
    read = 864e9 * 272e-6
    assert read == pytest.approx(235e6, rel=2e-3)
    layer = made("step-3").layers[0].mixing[0]
    w_o = 64 * 256 * 7168
    weights = layer.weights - w_o * 7 / 8
    assert weights == pytest.approx(67e6, rel=1e-2)
    assert (read - weights) / layer.bytes(1, 1.0) == pytest.approx(328e3, rel=5e-3)
    ffn = 0.5 * read * 61 * 8  # half the bandwidth, a server of 8
    assert ffn == pytest.approx(56.8e9, rel=2e-2)
    model = made("step-3")
    experts = model.parameters - model.linear / 2 - 2 * model.dim * model.vocab
    assert -(-experts // ffn) == 6
