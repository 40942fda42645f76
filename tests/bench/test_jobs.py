"""Both jobs: arithmetic of ideal and roofs, the gate, records and resuming, the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from foveate.bench import decode, job, kernels, screen
from foveate.bench.ideal import counts, ideal_seconds, useful_flops
from foveate.bench.roofs import Pool, Product
from foveate.bench.show import decode_summary, decode_table, kernel_tables, summary
from foveate.cli import main
from foveate.ops import causal, cpu
from foveate.ops.errors import InputError
from foveate.ops.types import AttentionOutput
from foveate.parts.longcontext.lengths import distributions, draw_documents
from foveate.runs.records import Records
from foveate.runs.timing import Pace, Samples, paired, race, spread

RESULT = {"group", "backend", "correct", "errors", "seconds", "cpu_seconds", "rounds", "calls",
          "tflops", "of_ideal"}  # fmt: skip


def small(pace, /, **more) -> kernels.Options:
    given = {
        "masks": ("causal",), "lengths": (256,), "head_dims": (16,), "dtypes": ("float32",),
        "passes": ("forward",), "tiles": (64,), "backends": ("sdpa", "blocks"), "pace": pace,
    }  # fmt: skip
    return kernels.Options(**{**given, **more})


def steady(monkeypatch, module, seconds):
    """Make the race of a module give these seconds, whoever takes part."""

    def fake(calls, pace):
        for call in calls.values():
            call()
        return {name: Samples([seconds(name)] * 3, [seconds(name)] * 3) for name in calls}

    monkeypatch.setattr(module, "race", fake)
    if module is kernels:
        told = lambda calls, clock: {name: seconds(name) for name in calls}  # noqa: E731
        monkeypatch.setattr(module, "trial", told)


# -- arithmetic -----------------------------------------------------------------------------------


def test_ideal_is_the_best_dense_time_by_visited_area():
    layout = causal().layout(256, 256, 64)
    assert counts(layout) == {
        "pairs": 256 * 257 / 2, "tile_area": 10 * 64 * 64, "density": 257 / 512,
        "tile_density": 10 / 16, "tiles_per_row": 2.5,
    }  # fmt: skip
    assert ideal_seconds(8.0, layout) == 5.0
    assert useful_flops(layout, 3, 16, "forward") == 4 * 16 * 3 * 256 * 257 / 2
    assert useful_flops(layout, 3, 16, "backward") == 10 * 16 * 3 * 256 * 257 / 2


def test_kernel_ratios(monkeypatch, pace):
    seconds = {"dense sdpa": 4.0, "dense cpu": 2.0, "pattern sdpa": 3.0, "pattern blocks": 5.0,
               "pattern cpu": 2.5}  # fmt: skip
    steady(monkeypatch, kernels, seconds.get)
    monkeypatch.setattr(kernels, "own", lambda: ["blocks"])
    (one,) = kernels.run(small(pace))
    values = one["values"]
    assert values["best_dense"] == {"backend": "sdpa", "seconds": 4.0}
    assert values["ideal_seconds"] == 4.0 * 10 / 16
    blocks = next(r for r in values["results"] if r["backend"] == "blocks")
    assert blocks["of_ideal"]["median"] == 4.0 * 10 / 16 / 5.0
    assert blocks["vs_sdpa"]["median"] == 3.0 / 5.0
    assert blocks["tflops"] == values["flops"] / 5.0 / 1e12


def test_the_best_dense_is_the_faster_of_sdpa_and_the_engine(monkeypatch, pace, spoilt):
    spoilt(lambda right: right, "cpu")
    steady(monkeypatch, kernels, lambda name: 2.0 if name == "dense cpu" else 4.0)
    (one,) = kernels.run(small(pace))
    assert one["values"]["best_dense"] == {"backend": "cpu", "seconds": 2.0}


@pytest.mark.parametrize(("slow", "dropped"), [(2.9, False), (3.1, True)])
def test_a_dense_base_that_is_far_slower_leaves_the_race(monkeypatch, pace, spoilt, slow, dropped):
    spoilt(lambda right: right, "cpu")
    steady(monkeypatch, kernels, lambda name: 2.0 if name == "dense cpu" else slow)
    (one,) = kernels.run(small(pace))
    theirs = next(r for r in one["values"]["dense"] if r["backend"] == "sdpa")
    assert ("dropped" in theirs) == dropped
    assert ("seconds" in theirs) != dropped
    assert one["values"]["best_dense"]["backend"] == "cpu"
    (one,) = kernels.run(small(pace, masks=("full",)))  # there nobody leaves
    assert {r["backend"] for r in one["values"]["results"] if "seconds" in r} == {
        "sdpa", "cpu", "blocks"
    }  # fmt: skip


def test_a_wrong_engine_is_no_dense_base(monkeypatch, pace, spoilt):
    spoilt(lambda right: AttentionOutput(right.out * 1.1, right.lse), "cpu")
    steady(monkeypatch, kernels, lambda name: 2.0 if name == "dense cpu" else 4.0)
    (one,) = kernels.run(small(pace))
    assert one["values"]["best_dense"] == {"backend": "sdpa", "seconds": 4.0}
    wrong = next(r for r in one["values"]["dense"] if r["backend"] == "cpu")
    assert wrong["failed"].startswith("wrong: out is off by")


def test_ratios_are_taken_round_by_round():
    assert paired([2.0, 4.0, 30.0], [1.0, 2.0, 10.0])["median"] == 2.0
    assert paired([2.0, 4.0, 30.0], [1.0, 2.0, 10.0], 0.5)["median"] == 1.0
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}


def test_contestants_take_turns():
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples = race(calls, Pace(repeats=3, sample=0.0))
    assert seen == [*"aabbcc", *"abc", *"bca", *"cab"]
    assert all(len(s.wall) == len(s.cpu) == 3 for s in samples.values())


def test_a_short_call_is_repeated_and_the_budget_ends_rounds():
    count = [0]
    samples = race({"a": lambda: count.__setitem__(0, count[0] + 1)}, Pace(9, 1e-4, budget=0.0))
    assert len(samples["a"].wall) == 3
    assert count[0] == 2 + 3 * samples["a"].calls
    assert samples["a"].calls > 1


def test_decode_roofs(monkeypatch, pace):
    monkeypatch.setattr("foveate.bench.roofs._SIZES", (64,))
    cell = decode.Cell(256, 4, 2, 16, "float32", 1)
    seconds = {"read": 1.0, "product": 3.0, "run sdpa": 4.0, "run matmul": 2.0}
    steady(monkeypatch, decode, seconds.get)
    options = decode.Options(pace=pace, backends=("sdpa", "matmul"), footprint=1)
    values = decode.measure(cell, options)
    assert values["bytes"] == 2 * 2 * 256 * 16 * 4
    assert values["flops"] == cell.flops == 4 * 8 * 256 * 16
    assert values["read_gbps"] == pytest.approx(values["bytes"] / 1e9)
    size = values["product_size"]
    assert size == 64
    assert values["product_gflops"] == pytest.approx(2 * size**3 / 3.0 / 1e9)
    assert values["bound"] == "memory"  # the product would need far less than a second
    one, two = values["results"]
    assert (one["of_roof"]["median"], two["of_roof"]["median"]) == (0.25, 0.5)
    assert two["vs_sdpa"]["median"] == 2.0
    assert two["gbps"] == pytest.approx(values["bytes"] / 2.0 / 1e9)
    seconds["product"] = 3.0 * 2 * size**3 / cell.flops  # now compute needs three seconds
    values = decode.measure(cell, options)
    assert values["bound"] == "compute"
    assert values["results"][1]["of_roof"]["median"] == pytest.approx(1.5)


def test_pool_goes_through_distinct_memory():
    pool = Pool((1, 2, 64, 8), torch.bfloat16, footprint=3 * 4096 + 1)
    assert pool.bytes == 4096
    assert len(pool.pairs) == 4
    assert len({x.data_ptr() for pair in pool.pairs for x in pair}) == 8
    first = pool.next()
    assert pool.next()[0].data_ptr() != first[0].data_ptr()
    assert torch.equal(pool.next()[1], first[1])
    total = pool.key.reshape(-1).view(torch.float32).sum()
    assert pool.read()[0] == total


def test_product_is_a_product():
    product = Product(torch.float32)
    out = product.run()
    assert product.flops == 2 * out.shape[0] ** 3
    assert bool(out.isfinite().all())


# -- the gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_backend_gets_no_speed(pace, spoilt, direction):
    name = spoilt(lambda right: AttentionOutput(right.out * 1.1, right.lse))
    (one,) = kernels.run(small(pace, passes=(direction,), backends=("sdpa", "blocks", name)))
    wrong = next(r for r in one["values"]["results"] if r["backend"] == name)
    assert wrong["correct"] is False
    assert wrong["failed"].startswith("wrong: out is off by")
    assert not {"seconds", "cpu_seconds", "tflops", "of_ideal", "vs_sdpa"} & set(wrong)
    fine = next(r for r in one["values"]["results"] if r["backend"] == "blocks")
    assert fine["correct"] is True
    assert fine["seconds"]["median"] > 0


def test_a_wrong_gradient_gets_no_speed(pace, spoilt):
    def halved(right: AttentionOutput) -> AttentionOutput:
        return AttentionOutput((right.out + right.out.detach()) / 2, right.lse)

    options = small(pace, passes=("forward", "backward"), backends=(spoilt(halved),))
    forward, backward = (one["values"]["results"][0] for one in kernels.run(options))
    assert forward["correct"] is True
    assert "seconds" in forward
    assert backward["correct"] is False
    assert "seconds" not in backward
    assert set(backward["errors"]) >= {"dq", "dk", "dv"}


def test_a_backend_that_breaks_does_not_end_the_job(pace, spoilt):
    def broken(right: AttentionOutput) -> AttentionOutput:
        raise RuntimeError("no such luck")

    (one,) = kernels.run(small(pace, backends=(spoilt(broken), "blocks")))
    first, second = one["values"]["results"]
    assert first["failed"] == "RuntimeError: no such luck"
    assert "seconds" not in first
    assert "seconds" in second


def test_a_refusal_is_told(pace):
    options = small(pace, passes=("backward",), backends=("flex", "blocks"))
    (one,) = kernels.run(options)
    assert one["values"]["results"][0]["declined"] == "FlexAttention has no backward on the CPU"


def test_sdpa_declines_a_mask_too_large_to_hold(monkeypatch, pace):
    monkeypatch.setattr("foveate.bench.contestants._MASK_ELEMENTS", 256 * 255)
    options = small(pace, masks=("sliding", "causal"))
    sliding, plain = (one["values"]["results"][0] for one in kernels.run(options))
    assert "256 x 256" in sliding["declined"]
    assert "seconds" in plain


def test_a_wrong_decoder_gets_no_speed(pace, spoilt):
    name = spoilt(lambda right: AttentionOutput(right.out, right.lse + 1))
    options = decode.Options(
        contexts=(128,), groups=(2,), head_dims=(16,), caches=("whole",), dtypes=("float32",),
        backends=("sdpa-rows", name), footprint=1, pace=pace,
    )  # fmt: skip
    (one,) = decode.run(options)
    fine, wrong = one["values"]["results"]
    assert wrong["failed"].startswith("wrong: lse is off by")
    assert not {"seconds", "gbps", "gflops", "of_roof"} & set(wrong)
    assert fine["of_roof"]["median"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_decoder_is_right(pace, dtype):
    ours = ("cpu",) if cpu.available() else ()
    options = decode.Options(
        contexts=(192, 1088), groups=(1, 3), head_dims=(16,), dtypes=(dtype,),
        caches=("whole", "selected", "latent"),
        backends=(*decode.TORCH, decode.GATHER, "blocks", *ours), footprint=1, pace=pace,
    )  # fmt: skip
    for one in decode.run(options):
        assert not ours or one["values"]["near_gflops"] > 0
        verdicts = {r["backend"]: r["correct"] for r in one["values"]["results"]}
        form = one["cell"]["form"]
        theirs = {"selected": {decode.GATHER}, "latent": {"sdpa-rows", "matmul"}}
        assert set(verdicts) == {"blocks", *ours, *theirs.get(form, decode.TORCH)}
        if dtype == "bfloat16":
            # These round their scores to bf16, which may or may not be too coarse.
            verdicts = {n: v for n, v in verdicts.items() if n not in ("matmul", decode.GATHER)}
        assert all(verdicts.values()), verdicts


# -- records --------------------------------------------------------------------------------------


def test_records_hold_what_they_say(tmp_path, pace):
    options = small(pace, masks=("full", "causal", "vertical-slash@0.2"))
    with Records(tmp_path) as records:
        kernels.run(options, records)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["cell"]["mask"] for line in lines] == list(options.masks)
    assert len({line["key"] for line in lines}) == 3
    for line in lines:
        assert line["cell"]["job"] == "kernels"
        assert {"mask", "length", "head_dim", "dtype", "direction", "threads", "tile", "heads",
                "kv_heads", "documents"} < set(line["cell"])  # fmt: skip
        values = line["values"]
        assert {"pairs", "tile_area", "density", "tile_density", "layout_seconds", "flops",
                "ideal_seconds", "best_dense", "dense", "results", "environment", "load"} <= set(
            values
        )  # fmt: skip
        for result in values["results"]:
            assert set(result) >= RESULT
            assert set(result["seconds"]) == {"median", "q20", "q80"}
            assert result["rounds"] == 3


def test_a_second_run_measures_nothing(tmp_path, pace, monkeypatch):
    options = small(pace, masks=("causal", "sliding"))
    with Records(tmp_path) as records:
        first = kernels.run(options, records)
    monkeypatch.setattr(kernels, "race", None)  # whoever measures now, breaks
    with Records(tmp_path) as records:
        assert kernels.run(options, records) == first
    with Records(tmp_path) as records, pytest.raises(TypeError):
        kernels.run(small(pace, masks=("causal", "sliding"), seed=1), records)


def test_cells_of_another_code_are_measured_anew_and_said_so(tmp_path, pace, monkeypatch):
    here = job.environment()
    with Records(tmp_path) as records:
        kernels.run(small(pace, masks=("causal", "sliding")), records)
        assert not records.notes
    with Records(tmp_path) as records:
        kernels.run(small(pace, masks=("causal", "sliding")), records)
        assert not records.notes
    with Records(tmp_path) as records:
        kernels.run(small(pace, masks=("causal", "full"), seed=1), records)
        (note,) = records.notes
        assert note.startswith("Of 2 cells 1 ")
        assert "with other settings" in note
    monkeypatch.setattr(job, "environment", lambda: {**here, "code": "new"})
    with Records(tmp_path) as records:
        kernels.run(small(pace, masks=("causal", "sliding", "full")), records)
        (note,) = records.notes
        assert note.startswith("Of 3 cells 3 ")
        assert "with another code " in note
        assert len(records) == 7
    with Records(tmp_path) as records:  # causal is there with this code, full with another one too
        kernels.run(small(pace, masks=("causal", "full"), seed=2), records)
        (note,) = records.notes
        assert "with other settings" in note
        assert "another code" not in note


def test_what_a_job_notes_is_printed(tmp_path, capsys):
    def noting(records, begin):
        records.notes.append("one thing")
        begin("cell", 0, 1)
        begin("cell", 0, 1)
        return []

    screen.run_job(noting, str(tmp_path), False)
    assert capsys.readouterr().err.count("one thing") == 1


def test_an_interrupted_run_goes_on(tmp_path, pace, monkeypatch):
    options, seen, real = small(pace, masks=("causal", "sliding", "full")), [], kernels.measure

    def measure(cell, options):
        seen.append(cell.mask)
        if seen == ["causal", "sliding"]:
            raise KeyboardInterrupt
        return real(cell, options)

    monkeypatch.setattr(kernels, "measure", measure)
    with Records(tmp_path) as records, pytest.raises(KeyboardInterrupt):
        kernels.run(options, records)
    with Records(tmp_path) as records:
        found = kernels.run(options, records)
    assert seen == ["causal", "sliding", "sliding", "full"]
    assert [one["cell"]["mask"] for one in found] == ["causal", "sliding", "full"]


def test_threads_are_put_back(pace, monkeypatch):
    seen = []

    def measure(cell, options):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "measure", measure)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        kernels.run(small(pace, threads=(2,)))
    assert seen == [2]
    assert torch.get_num_threads() == before


# -- options, documents, screen -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"masks": ("causl",)}, "did you mean 'causal'"),
        ({"backends": ("blocs",)}, "did you mean 'blocks'"),
        ({"dtypes": ("float31",)}, "'float32'"),
        ({"passes": ("sideways",)}, "forward"),
        ({"documents": "shrt"}, "did you mean 'short'"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
        ({"heads": 3}, "no multiple of 2"),
        ({"tiles": (60,)}, "multiple of 8"),
        ({"pace": Pace(clock="sun")}, "wall or cpu"),
        ({"pace": Pace(clock="cpu"), "threads": (2,)}, "adds up all threads"),
    ],
)
def test_bad_options_are_refused_before_any_work(monkeypatch, pace, more, said):
    monkeypatch.setattr(kernels, "measure", None)
    with pytest.raises(InputError, match=said):
        kernels.run(small(pace, **more))


def test_cells_are_every_combination_but_full_has_no_tiles(pace):
    options = small(
        pace, masks=("full", "causal"), lengths=(64, 128), tiles=(64, 128), threads=(1, 2)
    )
    cells = list(options.cells())
    assert len(cells) == len(set(cells)) == 2 * 2 * (1 + 2)


@pytest.mark.parametrize("name", distributions())
def test_documents_fill_the_sequence(name):
    bounds = draw_documents(100_000, name, seed=2)
    assert bounds[0] == 0
    assert bounds[-1] == 100_000
    assert list(bounds) == sorted(set(bounds))
    assert bounds == draw_documents(100_000, name, seed=2)
    assert bounds != draw_documents(100_000, name, seed=3)


def test_document_lengths_have_the_median_that_the_file_says():
    bounds = torch.tensor(draw_documents(2_000_000, "short"))
    assert float(bounds.diff().double().median()) == pytest.approx(665, rel=0.1)
    long = torch.tensor(draw_documents(20_000_000, "long"))
    assert float(long.diff().double().median()) == pytest.approx(14_765, rel=0.1)


def test_unknown_documents_are_refused():
    with pytest.raises(InputError, match="did you mean 'mix'"):
        draw_documents(10, "mixx")


def test_summary_counts_what_the_targets_count(monkeypatch, pace):
    options = small(
        pace, masks=("causal", "window@0.2", "window@0.05"), lengths=(2048,), tiles=(64,)
    )
    seconds = {"dense sdpa": 8.0, "pattern sdpa": 6.0, "pattern blocks": 3.0}
    monkeypatch.setattr(kernels, "own", lambda: ["blocks"])
    monkeypatch.setattr("foveate.bench.kernels.Judge.of", lambda *a, **k: Sure())
    steady(monkeypatch, kernels, seconds.get)
    found = kernels.run(options)
    share = found[1]["values"]["tile_density"]
    assert summary(found, "blocks") == [
        "blocks, float32 forward, 1 thread(s): 2.00 times SDPA's speed, full and causal "
        "(median of 1, worst 2.00)",
        f"blocks, float32 forward, 1 thread(s): {8 * share / 3:.2f} of the ideal, 10-50% of tiles "
        f"and 8 or more a row (median of 1, worst {8 * share / 3:.2f})",
    ]


class Sure:
    """A judge who lets everyone pass."""

    def forward(self, call):
        from foveate.bench.correct import Verdict

        return Verdict({"out": (0.0, 1.0)})


def test_tables_show_each_contestant_and_why_one_has_no_speed(pace, spoilt):
    from rich.console import Console

    name = spoilt(lambda right: AttentionOutput(right.out * 1.1, right.lse))
    found = kernels.run(small(pace, backends=("sdpa", name)))
    options = decode.Options(
        contexts=(128,), groups=(2,), head_dims=(16,), caches=("whole",), dtypes=("float32",),
        backends=("matmul", name), footprint=1, pace=pace,
    )  # fmt: skip
    steps = decode.run(options)
    console = Console(width=240, file=io.StringIO())
    for table in [*kernel_tables(found), decode_table(steps)]:
        console.print(table)
    text = console.file.getvalue()
    assert text.count("wrong: out is off by") == 2
    assert "50.2%" in text
    assert "matmul" in text
    assert len(decode_summary(steps, "matmul")) == 1
    assert decode_summary(steps, name) == []


def run(*args: str) -> int:
    return main(["bench", *args])


def test_kernels_on_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    args = (
        "kernels", "--quick", "--lengths", "256", "--head-dims", "16", "--masks",
        "full,window@0.2", "--backends", "sdpa,blocks", "--out", str(tmp_path), "--json",
    )  # fmt: skip
    assert run(*args) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["cells"]) == 4
    assert {one["cell"]["direction"] for one in told["cells"]} == {"forward", "backward"}
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4
    assert run(*args) == 0
    assert json.loads(capsys.readouterr().out) == told


def test_decode_on_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "200")
    assert run(
        "decode", "--quick", "--contexts", "256", "--groups", "1,4", "--head-dims", "16",
        "--footprint", "1", "--backends", "sdpa,matmul", "--out", str(tmp_path),
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "read GB/s" in out
    assert "8/2" in out
    assert (tmp_path / "decode.png").exists()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("kernels", "--masks", "causl"), "did you mean 'causal'"),
        (("kernels", "--lengths", "many"), "expected whole numbers"),
        (("decode", "--groups", "0"), "groups must be at least 1"),
        (("decode", "--contexts", "1000"), "multiples of 64"),
        (("decode", "--caches", "hole"), "did you mean 'whole'"),
        (("decode", "--backends", "sdpa-row"), "did you mean 'sdpa-rows'"),
    ],
)
def test_bad_input_is_one_message(args, said, capsys, tmp_path):
    assert run(*args, "--out", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_is_a_notice_and_no_figure(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(
        "decode", "--quick", "--contexts", "128", "--groups", "1", "--head-dims", "16",
        "--footprint", "1", "--backends", "matmul", "--out", str(tmp_path),
    ) == 0  # fmt: skip
    assert "foveate[report]" in capsys.readouterr().err
    assert [p.name for p in Path(tmp_path).glob("*.png")] == []
