"""`foveate bench scaling`: what is counted is right, exponents are fitted, wrong ones get none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import foveate
from foveate import attention, catalog, causal
from foveate.bench import scaling as job
from foveate.cli import main
from foveate.ops.backends.cpu import Cpu
from foveate.ops.errors import InputError
from foveate.runs.growth import SETTINGS, at_length
from foveate.runs.work import Work


def test_attention_is_counted_by_its_pairs():
    q = torch.randn(2, 4, 100, 16, requires_grad=True)
    k, v = torch.randn(2, 2, 100, 16), torch.randn(2, 2, 100, 24)
    pairs = 2 * 4 * 100 * 101 / 2
    for call in ({"mask": causal()}, {"layout": causal().layout(100, 100, 32)}):
        with Work() as work:
            out = attention(q, k, v, **call).out
        assert work.flops == 2 * pairs * (16 + 24)
        with Work() as work:
            out.backward(torch.ones_like(out))
        assert work.flops == 2 * pairs * (3 * 16 + 2 * 24)


def test_products_and_numbers_are_counted():
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    with Work() as work:
        (a @ b).relu().t()
    assert work.flops == 2 * 5 * 6 * 7
    assert work.numbers == 5 * 7  # a view writes nothing


def test_slopes():
    lengths = (64, 128, 512, 1024)
    assert job.slope(lengths, [3e-9 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert job.slope((64,), [1.0]) is None


def test_names_in_braces():
    text = "routing-transformer(clusters={root}, window={rest})"
    assert at_length(text, 2048) == "routing-transformer(clusters=64, window=32)"
    assert at_length("full", 7) == "full"
    with pytest.raises(InputError, match="root"):
        at_length("full(x={m})", 64)


def test_exponents_of_dense_and_clustered_attention(pace):
    methods = ("full", "sink-window(sinks=0, window=32)", "routing-transformer")
    lengths = (1024, 4096)
    found = job.run(job.Options(methods, lengths, dim=16, heads=1, pace=pace, check=128))
    fits = {fit["method"]: fit for fit in job.fits(found)}
    assert all("failed" not in one["values"] for one in found), found
    assert fits["full"]["flops"]["exponent"] == pytest.approx(2, abs=0.01)
    assert fits[methods[1]]["flops"]["exponent"] == pytest.approx(1, abs=0.02)
    assert fits["routing-transformer"]["flops"]["exponent"] == pytest.approx(1.5, abs=0.03)
    assert fits["routing-transformer"]["theory"] == 1.5
    assert all(one["values"]["seconds"]["median"] > 0 for one in found)


def test_what_counts_is_linear_where_theory_says_so(pace):
    keys = ("grassmann", "deconstructed-mlp", "deconstructed-approximate(chunk=64)",
            "deconstructed-nonapproximate(chunk=64)")  # fmt: skip
    found = job.run(job.Options(keys, (512, 2048), dim=16, heads=1, pace=pace, check=96))
    for fit in job.fits(found):  # the first chunk has no sums before it
        assert fit["flops"]["exponent"] == pytest.approx(1, abs=0.03), fit
        assert SETTINGS[fit["method"].partition("(")[0]].exponent == 1.0
    assert len(job.fits(found)) == len(keys)


@pytest.mark.parametrize("key", [key for key in SETTINGS if key in catalog.keys()])  # noqa: SIM118
def test_every_method_with_a_setting_is_measured(pace, key):
    options = job.Options((key,), (96,), dim=32, heads=2, pace=pace, check=48)
    if key == "hsa":  # whose rows are tied: not causal
        assert "ties='columns'" in job.run(options)[0]["values"]["failed"]
        options = replace(options, both_ways=True)
    (one,) = job.run(options)
    assert "failed" not in one["values"], one["values"]
    assert one["values"]["flops"] + one["values"]["numbers"] > 0


def test_a_wrong_method_gets_no_figure(pace, monkeypatch):
    right = Cpu.forward

    def wrong(self, inputs):
        found = right(self, inputs)
        return found._replace(out=found.out * 1.01)

    monkeypatch.setattr(Cpu, "forward", wrong)
    found = job.run(job.Options(("full",), (64, 128), dim=16, heads=1, pace=pace, check=32))
    assert found[0]["values"]["failed"].startswith("wrong")
    assert "seconds" not in found[0]["values"]
    assert found[1]["values"] == {"skipped": "shorter ones failed"}
    assert job.fits(found) == []


def test_a_slow_method_stops(pace):
    options = job.Options(("full",), (64, 128), dim=16, heads=1, pace=pace, check=32, limit=1e-9)
    first, second = job.run(options)
    assert "seconds" in first["values"]
    assert second["values"]["skipped"].startswith("about")


def test_what_is_refused():
    for options in (
        job.Options(("nosuch",)), job.Options(("mha",)), job.Options(()), job.Options(limit=0.0),
        job.Options(("full",), (0,)),
    ):  # fmt: skip
        with pytest.raises(foveate.ops.errors.FoveateError):
            options.check_all()


def test_command_goes_on_and_draws(tmp_path, capsys):
    given = [
        "bench", "scaling", "--methods", "full,routing-transformer(clusters={root}, window={rest})",
        "--lengths", "64,128", "--dim", "16", "--heads", "2", "--json", "--out", str(tmp_path),
    ]  # fmt: skip
    assert main(given) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["summary"]) == 2
    assert (tmp_path / "scaling.png").exists()
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == first["cells"]
