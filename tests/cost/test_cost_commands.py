"""`foveate cost decode`, `memory` and `afd`; hardware tables; what fits."""

from __future__ import annotations

import json

import pytest

from foveate.cli import main
from foveate.cost.hardware import choose, table
from foveate.cost.layer import FeedForward, Layer, Model, grouped, linear
from foveate.cost.memory import Fit, Machine
from foveate.cost.options import contexts, short
from foveate.cost.released import RELEASED
from foveate.ops.errors import InputError

pytest.importorskip("typer")
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip


def run(capsys, *args):
    assert main(["cost", *args]) == 0
    return capsys.readouterr().out


def parsed(capsys, *args):
    return json.loads(run(capsys, *args, "--json"))


def test_decode_of_presets(capsys):
    text = run(capsys, "decode", "--preset", "step-3,deepseek-v3")
    for printed in ("256 MB", "0.040 + 0.040", "H20 + H800", "0.055", "0.058", "13.9"):
        assert printed in text
    found = parsed(capsys, "decode", "--preset", "all", "--contexts", "8K..32K")
    assert len(found["models"]) == 9 * 3
    assert len(found["prices"]) == 9 * 3 * 4
    assert [row["context"] for row in found["models"][:3]] == [8192, 16384, 32768]
    assert found["notes"] == []


def test_decode_of_a_folder_on_a_users_chip(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    own = tmp_path / "own.toml"
    own.write_text("[mine]\nprice = 1\nbf16 = 1e14\nbandwidth = 1e12\nmemory = 24e9\n"
                   "network = 1e10\nchips = 1\n")  # fmt: skip
    found = parsed(capsys, "decode", "--model", str(tmp_path), "--hardware", str(own), "--chips",
                   "mine,H20", "--kv-bits", "16", "--contexts", "4K")  # fmt: skip
    (row,) = found["models"]
    assert row["kv_bytes"] == 30 * 2 * 3 * 64 * 2 * 4096
    assert row["intensity"] == 3  # 9 heads on 3, 16 bit: 2 * 9 / 3 / 2
    mine = found["prices"][0]
    assert mine["hardware"] == "mine"
    assert mine["usd_core"] == pytest.approx(1e6 * row["kv_bytes"] / 3600 / 1e12)
    assert mine["bound"] == "memory"
    assert found["notes"] == []


def test_bf16_leaves_fp8_alone(capsys):
    args = ("--preset", "step-3", "--contexts", "8K", "--bf16")
    rows = parsed(capsys, "decode", *args)["prices"]
    assert rows[0]["usd_ffn"] == pytest.approx(1e6 * 5.33e10 * 2 / 3600 / 9.89e14, rel=1e-3)
    assert rows[2]["usd_ffn"] == pytest.approx(1e6 * 5.33e10 * 0.75 / 3600 / 3.12e14, rel=1e-3)
    slow, fast = (
        parsed(capsys, "memory", *a)["machines"][0]["time_to_first"] for a in (args, args[:-1])
    )
    assert slow / fast == pytest.approx(1.98 / 0.989)
    slow, fast = (
        parsed(capsys, "afd", *a)["pipeline"]["us_of_first_layer"] for a in (args, args[:-1])
    )
    assert slow[2] / fast[2] == pytest.approx(1.98 / 0.989)


def test_decode_warns_of_a_model_that_it_reads_wrongly(capsys, tmp_path, monkeypatch):
    from foveate.cost import options

    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    monkeypatch.setattr(options, "matrices_of_class", lambda folder: 150_000_000)
    (note,) = parsed(capsys, "decode", "--model", str(tmp_path))["notes"]
    assert "150,000,000" in note
    monkeypatch.undo()
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | {"model_type": "never-seen"}))
    (note,) = parsed(capsys, "decode", "--model", str(tmp_path))["notes"]
    assert "fields alone" in note


def test_decode_of_a_model_of_ours(capsys, tmp_path):
    """Step-3 in small, whose own class is what its count is compared with."""
    pytest.importorskip("transformers")
    from foveate.models import step3_config

    step3_config().save_pretrained(tmp_path)
    found = parsed(capsys, "decode", "--model", str(tmp_path))
    assert found["notes"] == []
    assert found["models"][0]["kv_bytes"] == 6 * 2 * 16 * 8192


def test_decode_on_ranks(capsys):
    args = ("decode", "--preset", "deepseek-v3", "--mla-values", "latent", "--tp", "2",
            "--contexts", "32K")  # fmt: skip
    (whole,) = parsed(capsys, *args)["models"]
    (cut,) = parsed(capsys, *args, "--latent-groups", "2")["models"]
    assert whole["kv_bytes_on_rank"] / cut["kv_bytes_on_rank"] == pytest.approx(1.8)
    more = cut["attention_flops_on_rank"] / whole["attention_flops_on_rank"]
    assert more == pytest.approx(1.059, abs=5e-4)


def test_figures(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    first, second, third = (tmp_path / "deep" / name for name in ("a.png", "b.svg", "c.png"))
    run(capsys, "decode", "--preset", "all", "--contexts", "1K..32K", "--figure", str(first))
    run(capsys, "afd", "--preset", "step-3", "--figure", str(second))
    run(capsys, "afd", "--times", "272,91,272,181", "--figure", str(third))
    assert min(path.stat().st_size for path in (first, second, third)) > 5000


def test_afd_by_measured_times(capsys, tmp_path):
    found = parsed(capsys, "afd", "--times", "272,91,272,181")["pipeline"]
    assert found["tpot"] == pytest.approx(49.776e-3)
    assert found["tpot_simulated"] == pytest.approx(49.776e-3)
    assert found["budget_us"] == pytest.approx(273.2, abs=0.1)
    measured = tmp_path / "times.json"
    measured.write_text(json.dumps([[100, 10, 90, 20], [100, 10, 300, 20]] * 3))
    out = parsed(capsys, "afd", "--times", str(measured), "--instances", "2A1F", "--slow",
                 "1,2/1")  # fmt: skip
    assert out["pipeline"]["layers"] == 6
    assert out["pipeline"]["tpot_simulated"] > out["pipeline"]["tpot"] * 1.01
    assert "no schedule passes" in out["notes"][0]


def test_afd_of_a_model(capsys):
    text = run(capsys, "afd", "--preset", "step-3")
    assert "2A2F" in text
    found = parsed(capsys, "afd", "--preset", "step-3", "--contexts", "4K..64K", "--efficiency",
                   "0.5")  # fmt: skip
    counts = [row["attention"] for row in found["contexts"]]
    assert counts == sorted(counts)
    assert all(row["tpot"] <= 0.05 for row in found["contexts"])
    first = found["contexts"][0]
    assert first["usd"] == pytest.approx(1e6 * 2.00 / 3600 / first["per_chip"])
    assert first["per_chip_as_given"] == pytest.approx(6144 / first["tpot_as_given"] / 32)
    never = parsed(capsys, "afd", "--preset", "step-3", "--tpot", "1")["contexts"]
    assert {row["attention"] for row in never} == {None}
    assert "none do" in run(capsys, "afd", "--preset", "step-3", "--tpot", "1")


def test_memory_of_a_model(capsys):
    text = run(capsys, "memory", "--preset", "step-3,minimax-m1")
    assert "39.5 GB" in text
    (row,) = parsed(capsys, "memory", "--preset", "deepseek-v3", "--contexts", "8K")["machines"]
    assert row["largest_batch"] == 0
    (note,) = parsed(capsys, "memory", "--preset", "deepseek-v3", "--contexts", "8K")["notes"]
    assert "8.4 chips" in note


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["decode"], "either --model FOLDER"),
        (["decode", "--preset", "step3"], "step-3"),
        (["decode", "--preset", "step-3", "--chips", "H8000"], "H800"),
        (["decode", "--preset", "step-3", "--contexts", "8Q"], "1K..128K"),
        (["decode", "--preset", "step-3", "--contexts", "8K..4K"], "1K..128K"),
        (["decode", "--preset", "step-3", "--latent-groups", "2"], "no latent"),
        (["decode", "--preset", "step-3", "--tp", "0"], "at least 1"),
        (["decode", "--preset", "deepseek-v3", "--tp", "0", "--latent-groups", "2"], "at least 1"),
        (["decode", "--preset", "step-3", "--tpot", "0"], "--tpot"),
        (["decode", "--preset", "step-3", "--tpot", "nan"], "--tpot"),
        (["decode", "--preset", "step-3", "--kv-bits", "nan"], "above 0"),
        (["decode", "--preset", "step-3", "--accepted", "2"], "drafted"),
        (["decode", "--preset", "step-3", "--kv-bits", "0"], "above 0"),
        (["decode", "--preset", "step-3", "--mla-values", "some"], "entry or latent"),
        (["decode", "--preset", "step-3", "--figure", "x.nope"], ".png"),
        (["decode", "--model", "/nowhere"], "config.json"),
        (["decode", "--preset", "step-3", "--hardware", "/nowhere.toml"], "can't be read"),
        (["memory", "--preset", "step-3", "--tp", "3"], "divide"),
        (["memory", "--preset", "step-3", "--tp", "2", "--latent-groups", "2"], "no latent"),
        (["memory", "--preset", "step-3", "--batch", "0"], "at least 1"),
        (["memory", "--preset", "step-3", "--reserve", "1"], "reserve"),
        (["afd", "--times", "1,2,3"], "four numbers"),
        (["afd", "--times", "1,2,x,3"], "four numbers"),
        (["afd", "--times", "1,2,3,4", "--preset", "step-3"], "one of them"),
        (["afd", "--preset", "all"], "one model at a time"),
        (["afd", "--preset", "step-3", "--instances", "2A"], "2A2F"),
        (["afd", "--preset", "step-3", "--ffn-chip", "all"], "one kind of chip"),
        (["afd", "--preset", "step-3", "--tokens", "0"], "at least 1"),
        (["decode", "--preset", ""], "step-3"),
        (["memory", "--preset", "step-3", "--count", "0"], "at least 1"),
        (["memory", "--preset", "step-3", "--weight-bits", "0"], "more than"),
        (["afd", "--times", "1,2,3,4", "--slow", "1/1"], "2 factors"),
        (["afd", "--times", "/nowhere.json"], "can't be read"),
        (["afd", "--preset", "step-3", "--efficiency", "2"], "efficiency"),
        (["afd", "--preset", "step-3", "--kv-bits", "0"], "more than 0"),
        (["afd", "--preset", "step-3", "--weight-bits", "-8"], "more than 0"),
        (["afd", "--times", "1,2,3,4", "--tpot", "nan"], "--tpot"),
    ],
)
def test_commands_refuse_what_makes_no_sense(capsys, args, says):
    assert main(["cost", *args]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_contexts_are_powers_of_two():
    assert contexts("8K,32k, 100") == [8192, 32768, 100]
    assert contexts("1K..9K") == [1024, 2048, 4096, 8192]
    assert [short(n) for n in (8192, 2**20, 1000)] == ["8K", "1M", "1000"]


def test_hardware_tables(tmp_path):
    own = tmp_path / "own.toml"
    fields = "price = 3\nbf16 = 1e15\nfp8 = 2e15\nbandwidth = 4e12\nmemory = 1e11\nnetwork = 4e11\n"
    own.write_text(f"[H800]\n{fields}[new]\n{fields}")
    found = table(own)
    assert list(found) == ["H800", "H20", "A800", "910B", "new"]
    assert found["H800"].price == 3
    assert found["new"].balance == 500
    assert [c.name for c in choose(found, "new, H20")] == ["new", "H20"]
    for text, says in (
        ("[a]\nprice = 1\n", "bf16, bandwidth"), (f"[a]\n{fields}speed = 1\n", "speed"),
        (f"[a]\n{fields}".replace("4e12", "-1"), "above 0"), ("price = 1\n", "outside"),
        ("[a", "no TOML"), (f"[a]\n{fields}".replace("= 3", "= true"), "above 0"),
    ):  # fmt: skip
        own.write_text(text)
        with pytest.raises(InputError, match=says):
            table(own)


# -- what fits -------------------------------------------------------------------------------------
def small(*parts, vocab=10):
    layer = Layer(parts, FeedForward(64))
    return Model("small", 32, (layer,) * 2, vocab)


def test_largest_batch_and_longest_context_are_the_last_that_fit():
    chip = table()["H20"]
    model = RELEASED["qwen3-32b"]()
    for count, ranks in ((1, 1), (4, 1), (4, 2), (8, 8)):
        fit = Fit(model, Machine(chip, count, ranks))
        batch = fit.largest_batch(8192)
        assert fit.fits(batch, 8192)
        assert not fit.fits(batch + 1, 8192)
        longest = fit.longest_context(16)
        assert fit.fits(16, longest)
        assert not fit.fits(16, longest + 1)
        used = batch / (count // ranks) * fit.cache(8192) + fit.weights
        assert 0.85 * chip.memory < used < 0.9 * chip.memory


def test_memory_by_hand():
    chip = table()["H800"]
    model = small(grouped(32, 4, 2, 8))
    fit = Fit(model, Machine(chip, 2, weight_bytes=2, kv_bytes=2, reserve=0.5, chunk=16))
    assert fit.weights == model.parameters  # two bytes, on two chips
    assert fit.cache(100) == 2 * 32 * 2 * 100
    # of 16 tokens the residual, its norm, and gate and up, in 16 bit; logits of one sequence
    assert fit.activations(100) == 2 * 16 * (2 * 32 + 2 * 64) + 4 * 10
    assert fit.room == 40e9 - fit.weights


def test_states_and_windows_have_no_longest_context():
    chip = table()["H800"]
    kept = linear(3 * 32 * 32, 4 * 8 * 8, 4)
    assert Fit(small(kept), Machine(chip)).longest_context(4) is None
    windowed = small(kept, grouped(32, 4, 2, 8, window=16))
    assert Fit(windowed, Machine(chip)).longest_context(4) is None
    assert Fit(small(kept, grouped(32, 4, 2, 8)), Machine(chip)).longest_context(4) > 10**6


def test_cutting_the_latent_makes_room():
    chip, model = table()["H800"], RELEASED["deepseek-v3"]()
    plain = Fit(model, Machine(chip, 16, 2)).largest_batch(32768)
    cut = Fit(model, Machine(chip, 16, 2, 2)).largest_batch(32768)
    assert cut / plain == pytest.approx(1.8, rel=0.05)


def test_times_against_both_roofs():
    chip, model = table()["H800"], RELEASED["qwen3-32b"]()
    fit = Fit(model, Machine(chip, 4))
    # One sequence decodes at the speed of memory, its cache on one chip; a prompt computes.
    weights = model.parameters - model.dim * model.vocab
    read = weights / 4 + model.bytes(8192)
    assert fit.time_per_token(1, 8192) == pytest.approx(read / chip.bandwidth)
    assert fit.time_per_token(4, 8192) == pytest.approx(read / chip.bandwidth)
    both = Fit(model, Machine(chip, 4, 2)).time_per_token(1, 8192)
    assert both == pytest.approx((weights / 4 + model.bytes(8192) / 2) / chip.bandwidth)
    n = 8192
    flops = n * (model.linear + model.feedforward) + 2 * model.dim * model.vocab
    flops += 64 * 4 * 64 * 128 * n * (n + 1) // 2
    assert fit.time_to_first(n) == pytest.approx(flops / chip.peak / 4)
    half = Fit(model, Machine(chip, 4, efficiency=0.5))
    assert half.time_to_first(n) == pytest.approx(2 * fit.time_to_first(n))


@pytest.mark.parametrize(("window", "chunked"), [(None, False), (5, False), (5, True), (20, True)])
def test_pairs_of_a_prompt_by_brute_force(window, chunked):
    one = grouped(32, 4, 2, 8, window=window, chunked=chunked)
    for n in (1, 4, 5, 6, 13, 20):
        pairs = 0
        for i in range(n):
            first = 0 if window is None else i // window * window if chunked else i - window + 1
            pairs += i - max(first, 0) + 1
        assert one.prefill_flops(n) == 4 * 4 * 8 * pairs


def test_experts_that_a_batch_touches():
    part = FeedForward(dense=10, expert=4, experts=8, top_k=2)
    assert part.touched(1) == pytest.approx(part.activated)
    assert part.touched(10_000) == pytest.approx(part.width)
    draws = [part.touched(n) for n in (1, 2, 4, 8)]
    assert draws == sorted(draws)
