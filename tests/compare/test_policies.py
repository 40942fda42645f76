"""compare on methods that drop keys, that were searched, and that visit keys by several layouts."""

import json

import pytest
import torch

from foveate import Context, causal
from foveate.compare.measure import Log, Machine, Recorder, cache_bytes
from foveate.compare.options import Options
from foveate.compare.plan import entries_of
from foveate.compare.run import compare
from foveate.compare.summary import summarise
from foveate.compare.table import cells, columns_for
from foveate.hf.fit.artefacts import Shelf, fingerprint, place, save
from foveate.hf.load import load_model
from foveate.methods import make
from foveate.ops.errors import FoveateError
from foveate.parts.fitting import Artefact

LAYERS = {
    "0": {"a-shape(sinks=4, local=64)": [0, 2], "full": [1, 3]},
    "1": {"vertical-slash(verticals=30, slashes=60, forced_slashes=20)": [0, 1, 2, 3]},
}
HYPER = "hyperattention(min_seq_len=64, block_size=32, sample_size=16)"


@pytest.fixture
def model(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return load_model(str(tiny))[0]


def searched(model, layers=LAYERS):
    """An artefact of the search, put where it is looked for."""
    path = place(fingerprint(model), "mminference", ".json")
    save(Artefact("mminference", {"layers": layers}), fingerprint(model), path)
    return path


def run(tiny, prose, out, methods, **more):
    return compare(
        Options(model=str(tiny), text=str(prose), lengths="384", out=str(out), threads=1,
                methods=methods, **({"repeats": 1, "needle_depths": "0.2"} | more))
    )  # fmt: skip


def test_the_whole_command_on_all_of_them(tiny, prose, model, tmp_path):
    searched(model)
    result = run(
        tiny, prose, tmp_path / "out",
        f"snapkv(budget=48), h2o(heavy=24, recent=24), snapkv(budget=400), mminference, {HYPER}",
    )  # fmt: skip
    rows = {row.entry.name: row for row in result.rows}
    assert all(row.passed for row in result.rows), [row.said for row in result.rows]
    names = ("snapkv(budget=48)", "h2o(heavy=24, recent=24)", "snapkv(budget=400)")
    snap, heavy, whole = (rows[name] for name in names)
    # 16 numbers of keys and of values for a token, and its position and score.
    assert snap.cache == pytest.approx(48 / 384 * 34 / 32)
    assert heavy.cache == pytest.approx(48 / 384 * 34 / 32)
    assert snap.kl > 0.01 < heavy.kl
    assert abs(whole.kl) < 1e-6
    assert whole.cache == pytest.approx(34 / 32)
    assert snap.area == snap.pairs == 1.0
    for name in ("mminference", HYPER):
        row = rows[name]
        assert 0 < row.pairs < row.area < 1
        assert row.realised.middle > row.realised_counted.middle > 0
        assert row.attention.middle > row.attention_counted.middle
        assert row.ideal_attention == pytest.approx(1 / row.area)
    assert "cache" in columns_for(result.rows, full=False)
    assert "For a smaller cache" in result.recommendation.sentence or (
        "No method that drops keys" in result.recommendation.sentence
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "read one by" in page
    records = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    tokens = {r["cell"]["method"]: r["values"]["quality"]["tokens"] for r in records}
    assert tokens["snapkv(budget=48)"] < 128 < tokens[HYPER]


def test_another_artefact_is_another_run(tiny, prose, model, tmp_path):
    with pytest.raises(FoveateError, match="foveate fit MODEL --method mminference"):
        run(tiny, prose, tmp_path / "out", "mminference")
    searched(model)
    more = {"needle_depths": "none", "decode_tokens": 0}
    first = run(tiny, prose, tmp_path / "out", "mminference", **more)
    again = run(tiny, prose, tmp_path / "out", "mminference", **more)
    searched(model, {"0": {"a-shape(sinks=4, local=64)": [0, 1, 2, 3]}})
    other = run(tiny, prose, tmp_path / "out", "mminference", **more)
    assert [(r.measured, r.found) for r in (first, again, other)] == [(1, 0), (0, 1), (1, 0)]


@torch.inference_mode()
def test_decoding_a_text_sees_what_is_kept_and_nothing_else(model):
    machine, ids = Machine(model, "causal-lm"), torch.randint(256, (2, 200))
    dense = machine.run(ids, None, inspect=False)
    same = machine.follow(make("snapkv(budget=300)"), ids, 40)
    torch.testing.assert_close(same, dense.hidden, atol=1e-4, rtol=1e-4)
    cut = machine.follow(make("snapkv(budget=40)"), ids, 40)
    torch.testing.assert_close(cut[:, :160], dense.hidden[:, :160], atol=1e-4, rtol=1e-4)
    # Keys that were dropped may be anything: the texts differ, and what is kept is the same.
    assert (cut[:, 160:] - dense.hidden[:, 160:]).abs().max() > 1e-2
    assert cache_bytes(dense.cache) == 2 * 2 * 2 * 2 * 200 * 16 * 4


def test_a_recorded_method_is_asked_what_it_is_asked_otherwise(model):
    """Flux must be told how its queries were turned; a policy must get its cache."""
    for text, names in (("flux(route='full')", ("wants_query_rope",)), ("h2o", ("evicts",))):
        recorder = Recorder(make(text), Log(), False)
        assert all(getattr(recorder, name) for name in names)
    assert not Recorder(make("full"), Log(), False).wants_query_rope
    searched(model)
    method = Shelf(model).bind("mminference", make("mminference"))
    log = Log(keep=frozenset({0}))
    machine = Machine(model, "causal-lm")
    ids = torch.randint(256, (1, 200))
    with torch.inference_mode():
        plain = machine.run(ids, method, inspect=False)
        done = machine.run(ids, method, inspect=True, keep=frozenset({0}))
    torch.testing.assert_close(done.hidden, plain.hidden)
    log = done.log
    a_shape = make("a-shape(sinks=4, local=64)").layout(
        *torch.randn(3, 1, 1, 200, 16), Context(mask=causal())
    )
    assert log.pairs[0] == pytest.approx((a_shape.pairs + 200 * 201 / 2) / 2)
    assert log.mask_pairs == {0: 200 * 201 / 2, 1: 200 * 201 / 2}
    assert [s.q.shape[1] for s in log.samples] == [2, 2]


def test_hyperattention_tells_its_work():
    q, k, v = torch.randn(3, 2, 4, 300, 16)
    told = []
    method = make(HYPER)
    ctx = Context(mask=causal(), stats=lambda **facts: told.append(facts), layer=3)
    method(q, k, v, ctx)
    heavy, light = method.layouts(q, k, v, Context(mask=causal(), layer=3))
    (facts,) = told
    assert facts["layer"] == 3
    assert facts["layout"].pairs == pytest.approx(heavy.pairs + light.pairs)
    assert facts["layout"].tile_area == pytest.approx(heavy.tile_area + light.tile_area)
    assert facts["build_seconds"] > 0 < facts["attend_seconds"]
    method(q[:, :, :50], k[:, :, :50], v[:, :, :50], ctx)  # too short to estimate
    assert told[1]["layout"].pairs == 50 * 51 / 2


def test_counted_speed_holds_the_time_of_choosing():
    (entry,) = entries_of(["vertical-slash"])
    values = {
        "seconds": 2.0, "dense_seconds": 4.0, "dense_attention_seconds": 2.0,
        "attention_seconds": 0.5, "build_seconds": 0.3, "area": 25.0, "mask_area": 100.0,
        "pairs": 20.0, "mask_pairs": 100.0, "check": {"error": 0.0, "problems": []},
    }  # fmt: skip
    row = summarise(entry, 64, [values], torch.float32)
    assert row.attention.middle == pytest.approx(4.0)
    assert row.attention_counted.middle == pytest.approx(2.0 / 0.8)
    assert row.realised.middle == pytest.approx(1.0)
    assert row.realised_counted.middle == pytest.approx(0.5 / 0.8)
    shown = dict(zip(("attention", "realised"), cells(row, ["attention", "realised"])))
    assert shown["realised"] == "100% (62%)"
    assert shown["attention"].startswith("2.50")


def test_a_sweep_leaves_out_what_would_not_fit():
    names = [
        e.name for e in entries_of(["snapkv(budget=64)", "h2o(heavy=4, recent=8)"], sweep=True)
    ]
    assert names == [
        "snapkv(budget=32)", "snapkv(budget=64)", "snapkv(budget=128)",
        "h2o(heavy=1, recent=2)", "h2o(heavy=2, recent=4)", "h2o(heavy=4, recent=8)",
        "h2o(heavy=8, recent=16)",
    ]  # fmt: skip
    assert [e.name for e in entries_of(["mminference"], sweep=True)] == [
        "mminference(budget=0.25)", "mminference(budget=0.5)", "mminference",
        "mminference(budget=2.0)",
    ]  # fmt: skip
