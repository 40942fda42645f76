"""`foveate inspect` on a tiny model: figures, resuming, the report, and a suggestion to compare."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from foveate import Context, attention, causal
from foveate.cli import main
from foveate.compare.options import Options
from foveate.compare.run import compare
from foveate.hf.load import load_model
from foveate.lens import job as lens
from foveate.lens import trials
from foveate.lens.trials import Trial
from foveate.methods import make
from foveate.ops.errors import InputError
from foveate.runs.heads import Wanted
from foveate.runs.text import load_text

CANDIDATES = "sink-window(sinks=1, window=16), sink-window(sinks=4, window=64), a-shape(local=40)"
WANTED = Wanted(rows=8, cells=12, near=16)


@pytest.fixture
def asked(tiny, prose, tmp_path):
    return lens.Job(
        str(tiny), load_text(prose), tmp_path / "out", 384, 2, CANDIDATES, 0.8, WANTED, threads=1
    )


def silent(*said):
    pass


def test_the_whole_command(tiny, prose, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(
        ["inspect", str(tiny), "--text", str(prose), "--length", "384", "--out", str(out),
         "--candidates", CANDIDATES, "--budget", "0.8", "--threads", "1", "--json"]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    facts = json.loads(said.out)
    layers = [str(n) for n in facts["layers"]]
    assert all(len(facts["figures"]["entropy"][n]) == facts["heads"] for n in layers)
    assert 0 < facts["suggestion"]["cost"] <= 0.8
    assert facts["suggestion"]["harm"] <= facts["suggestion"]["uniform_harm"]
    kept = json.loads((out / "inspect.json").read_text())
    assert kept["figures"] == facts["figures"]
    html = (out / "report.html").read_text()
    assert html.count("<img ") == len(layers) * facts["heads"]
    assert html.count("<svg") >= 10
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "by-head(file=" in html
    # what is shown to people
    assert main(["inspect", str(tiny), "--text", str(prose), "--length", "384", "--out", str(out),
                 "--candidates", CANDIDATES, "--budget", "0.8", "--threads", "1"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "Sink rate of the first token" in shown
    assert "foveate compare" in shown


def test_figures_are_those_of_eager_attention(asked, tiny):
    facts = lens.run(asked, silent)
    model, tokenizer, _ = load_model(str(tiny))
    ids = torch.tensor(tokenizer(asked.text.content, add_special_tokens=False).input_ids)
    starts = (0, len(ids) - 384)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model(
            torch.stack([ids[s : s + 384] for s in starts]), output_attentions=True,
            output_hidden_states=True,
        )  # fmt: skip
        counts = torch.arange(384, 0, -1)
        for layer, a in enumerate(seen.attentions):
            got = {k: torch.tensor(v[str(layer)]) for k, v in facts["figures"].items()}
            alpha = (a.sum(2) / counts).mean(0)
            torch.testing.assert_close(got["importance"], alpha[:, 0], atol=1e-5, rtol=1e-4)
            entropy = torch.special.entr(a).sum(-1).mean((0, 2))
            torch.testing.assert_close(got["entropy"], entropy, atol=1e-4, rtol=1e-4)
            largest = float(seen.hidden_states[layer][0].abs().max())
            assert facts["states"][str(layer)]["largest"] == pytest.approx(largest, rel=1e-4)
        rows = torch.linspace(0, 383, 8).round().long()
        maps = torch.stack([a.mean(1)[:, rows] for a in seen.attentions])
        maps = maps / maps.norm(dim=-1, keepdim=True)
        alike = torch.einsum("abnl,cbnl->ac", maps, maps) / 16
    torch.testing.assert_close(
        torch.tensor(facts["similarity"]["maps"]), alike, atol=1e-4, rtol=1e-4
    )
    segments = facts["segments"]
    with torch.no_grad():
        cut = torch.linspace(0, len(ids) - 64, segments["count"]).long()
        short = model(
            torch.stack([ids[s : s + 64] for s in cut.tolist()]), output_attentions=True
        ).attentions
    alpha = torch.stack([a.sum(2)[..., :2] / torch.tensor([64, 63]) for a in short])
    for eps in (0.2, 0.3, 0.4):
        expected = (alpha > eps).float().mean((0, 1, 2)).tolist()
        assert segments["rates"][str(eps)] == pytest.approx(expected, abs=1e-6)


def test_it_goes_on_where_it_stopped(asked, tmp_path):
    whole = lens.run(asked, silent)
    again = lens.Job(**{**vars(asked), "out": tmp_path / "again"})
    seen = []

    def stop(share, doing):
        seen.append(doing)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lens.run(again, stop)
    said = []
    resumed = lens.run(again, silent, said.append)
    assert any("were measured before" in line for line in said)
    for name in ("figures", "density", "states", "similarity", "segments"):
        assert resumed[name] == whole[name], name
    assert resumed["suggestion"]["heads"] == whole["suggestion"]["heads"]
    said.clear()
    third = lens.run(again, silent, said.append)
    assert not any("Loading" in line for line in said)
    assert third["figures"] == resumed["figures"]


def test_compare_takes_the_suggestion(asked, tiny, prose, tmp_path):
    facts = lens.run(asked, silent)
    method = facts["suggestion"]["method"]
    parts = make(method).split(0)
    named = sorted(h for heads, _ in parts for h in heads or range(facts["heads"]))
    assert named == list(range(facts["heads"]))
    result = compare(
        Options(
            model=str(tiny), methods=f"{method},full", lengths="384", text=str(prose),
            out=str(tmp_path / "compared"), threads=1, repeats=1, needle_depths="none",
            decode_tokens=2,
        )
    )  # fmt: skip
    row = next(r for r in result.rows if r.entry.key == "by-head")
    assert row.passed
    assert row.kl is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 5000}, "positions"),
        ({"length": 4}, "8 or more"),
        ({"budget": 0.0}, "above 0"),
        ({"candidates": "snapkv"}, "layout"),
        ({"candidates": "act"}, "layout"),
        ({"budget": 0.01}, "larger budget"),
    ],
)
def test_bad_input_is_refused(asked, change, words):
    with pytest.raises(InputError, match=words):
        lens.run(lens.Job(**{**vars(asked), **change}), silent)


def test_encoders_are_refused(asked, tiny_bert):
    with pytest.raises(InputError, match="no causal"):
        lens.run(lens.Job(**{**vars(asked), "model": str(tiny_bert)}), silent)


# -- trials --------------------------------------------------------------------------------------
def test_harm_is_the_change_of_the_stream_by_its_definition():
    q, k, v = (torch.randn(2, h, 70, 8) for h in (4, 2, 2))
    weight, stream = torch.randn(20, 32), torch.rand(2, 70) + 0.5
    ctx, name = Context(mask=causal()), "sink-window(sinks=1, window=8)"
    dense = attention(q, k, v, causal())
    got = trials.tried([name, "full"], q, k, v, ctx, dense, weight, stream)
    off = make(name)(q, k, v, ctx).out - dense.out
    for h in range(4):
        one = torch.zeros_like(off)
        one[:, h] = off[:, h]
        change = one.transpose(1, 2).flatten(2) @ weight.T
        expected = float((change.square().sum(-1) / stream).mean())
        assert got[name].harm[h] == pytest.approx(expected, rel=1e-4)
    whole = make("full").layout(q, k, v, ctx).tile_area
    expected = make(name).layout(q, k, v, ctx).tile_area / whole
    assert got[name].cost == pytest.approx([expected] * 4)
    assert got["full"] == Trial([1.0] * 4, [0.0] * 4)


@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_is_nearly_the_best_there_is(seed):
    random = torch.Generator().manual_seed(seed)
    costs = (0.1, 0.2, 0.4, 1.0)
    table = {
        layer: {
            str(c): Trial([c] * 3, h.tolist())
            for c, h in zip(
                costs,
                torch.rand(4, 3, generator=random).cumsum(0).flip(0) * torch.tensor([1, 5, 0.1]),
            )
        }
        for layer in range(2)
    }
    for budget in (0.15, 0.3, 0.55):
        got = trials.assigned(table, budget)
        best = min(
            sum(table[i // 3][str(c)].harm[i % 3] for i, c in enumerate(picks))
            for picks in itertools.product(costs, repeat=6)
            if sum(picks) / 6 <= budget + 1e-12
        )
        assert got.cost <= budget
        assert best - 1e-9 <= got.harm <= 1.25 * best
        alike = trials.best_uniform(table, budget)
        assert got.harm <= trials.uniform(table, alike).harm + 1e-9
    assert trials.assigned(table, 1.0).harm == pytest.approx(
        sum(min(t.harm[h] for t in of.values()) for of in table.values() for h in range(3))
    )


def test_the_assignment_as_a_file():
    made = trials.as_assignment({0: ["a-shape", "full", "a-shape"], 2: ["full"] * 3})
    assert made["layers"] == {"0": {"0,2": "a-shape", "1": "full"}, "2": "full"}
