"""`foveate circuits`: prompts, what a look into a model tells, and the command."""

from __future__ import annotations

import json
import re

import pytest
import torch

from foveate.lens.attention_only import AttentionOnly
from foveate.lens.circuits_job import Circuits
from foveate.lens.ioi import NAMES, ioi
from foveate.lens.laundry import laundry
from foveate.lens.prompts import Answers, ask, best_factor, movers
from foveate.lens.reading import Reading
from foveate.lens.watching import watched
from foveate.ops.errors import InputError


class Words:
    """A tokenizer whose tokens are words and marks."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True):
        parts = re.findall(r"\w+|[^\w\s]", text)
        return {"input_ids": [self.ids.setdefault(part, len(self.ids)) for part in parts]}

    def text(self, ids):
        names = {number: word for word, number in self.ids.items()}
        return [names[int(number)] for number in ids]


def test_ioi_asks_for_the_name_that_doesnt_act():
    words = Words()
    for batch in ioi(words, 16, seed=1):
        assert len(batch.ids) == 4
        orders = set()
        for ids, answer, others, at, places in zip(*batch):
            told = words.text(ids)
            named = [w for w in told if w in NAMES]
            assert len(named) == 3
            (other,) = words.text(others)
            assert named.count(other) == 2
            assert named[2] == other
            assert [told[int(at)]] == words.text([answer])
            assert {told[int(p)] for p in places} == {other}
            orders.add(named.index(other))
        assert orders == {0, 1}


@pytest.mark.parametrize("shuffled", [False, True])
def test_laundry_lists_all_and_repeats_all_but_the_answer(shuffled):
    words, lists = Words(), {}
    for split in ("train", "test"):
        batch = laundry(words, 24, 5, split=split, shuffled=shuffled)
        lists[split] = set()
        for ids, answer, others, at, _ in zip(*batch):
            told = words.text(ids)
            listed = [w for w in told[4:13] if w not in (",", "and")]
            bought = [w for w in told[18:25] if w not in (",", "and")]
            assert len(listed) == 5
            assert len(bought) == 4
            (left,) = set(listed) - set(bought)
            assert words.text([answer]) == [left] == [told[int(at)]]
            assert sorted(words.text(others)) == sorted(bought)
            in_order = [w for w in listed if w != left]
            assert shuffled or bought == in_order
            lists[split].add(tuple(listed))
    assert not lists["train"] & lists["test"]
    with pytest.raises(InputError, match="2 to 20"):
        laundry(words, 4, 21)
    with pytest.raises(InputError, match="'dev'"):
        laundry(words, 4, 5, split="dev")
    letters = type("Letters", (), {"__call__": lambda self, text, **_: {"input_ids": list(text)}})
    with pytest.raises(InputError, match="single|one token"):
        laundry(letters(), 4, 5)


def small(vocab, seed=0):
    torch.manual_seed(seed)
    made = AttentionOnly(vocab, 32, 4, 3, length=64)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.eval()


@torch.no_grad()
def test_answers_are_counted_as_the_model_gives_them():
    words = Words()
    batch = laundry(words, 9, 4)
    model = small(len(words.ids))
    found = ask(model, [batch], heads=None, size=4)
    logits = model(batch.ids)[:, -1]
    own = logits.gather(1, batch.answer[:, None])[:, 0]
    above = own - logits.gather(1, batch.others).amax(1)
    assert found.accuracy == pytest.approx(float((above > 0).double().mean()))
    assert found.margin == pytest.approx(float(above.mean()), rel=1e-5)
    with watched(model) as watch:
        model(batch.ids)
        seen = watch.weights(1)[:, 2, -1]
    to_answer = sum(float(row[at]) for row, at in zip(seen, batch.answer_at)) / 9
    to_others = sum(float(row[at].sum()) for row, at in zip(seen, batch.others_at)) / 9 / 3
    assert found.looks[1, 2] == pytest.approx((to_answer, to_others), rel=1e-4)
    assert len(found.looks) == 12
    assert found.inhibition((1, 2)) == pytest.approx(to_answer - to_others, rel=1e-3)


def test_movers_look_at_the_answer():
    looks = {(0, 0): (0.9, 0.0), (1, 0): (0.5, 0.3), (1, 1): (0.4, 0.0), (2, 0): (0.1, 0.5)}
    assert movers(Answers(1.0, 1.0, looks), 2) == [(1, 1), (1, 0)]
    assert best_factor(lambda f: -abs(f - 2), (0.0, 1.5, 3.0)) == (1.5, {0: -2, 1.5: -0.5, 3: -1})
    assert best_factor(lambda f: 1.0, (0.0, 1.5, 3.0))[0] == 1.5


def test_a_look_without_a_task_reads_weights_alone():
    model = small(30)
    model.forward = None  # no token may run
    found = Circuits(top=3, kinds="qv", into=("2.1",))(model)
    assert list(found["channels"]) == ["q", "v"]
    for kind, told in found["channels"].items():
        assert len(told) == 3
        for one in told:
            assert one["late"] == [2, 1]
            assert one["kind"] == kind
            assert one["unfolded"] == pytest.approx(one["score"], abs=1e-5)  # there is no norm
            assert one["effect"] == pytest.approx(one["score"] * one["singular"])
    assert found["chance"] == pytest.approx(32**-0.5)
    assert len(found["maps"]["q"]["whole"]) == 12
    assert found["maps"]["q"]["component"][0][0] is None
    assert "task" not in found
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("task", ["ioi", "laundry"])
def test_a_task_takes_channels_away(task):
    words = Words()
    ioi(words, 64), laundry(words, 64, 6)
    model = small(len(words.ids) + 40)
    told = []
    job = Circuits(task=task, items=6, prompts=8, movers=2, tried=3, kinds="k")
    found = job(model, words, lambda share, doing: told.append(share))
    assert told == sorted(told)
    assert list(found["channels"]) == ["k"]
    figures = found["task"]
    prompts = ioi(words, 8) if task == "ioi" else [laundry(words, 8, 6)]
    base = ask(model, prompts, heads=None)
    assert (figures["accuracy"], figures["prompts"]) == (base.accuracy, 8)
    chosen = [f"{a}.{b}" for a, b in movers(base, 2)]
    assert [mover["head"] for mover in figures["movers"]] == chosen
    mover = figures["movers"][0]
    assert mover["inhibition"] == pytest.approx(base.inhibition(movers(base, 1)[0]))
    assert len(mover["components"]) == 3
    from foveate.lens.interventions import END, Edit, Path

    one = mover["components"][0]
    heads = Reading()(model)
    v = heads.ov().svd().v[heads.at(*one["early"])][:, one["component"], None]
    edit = Edit(*one["early"], v, positions=[END])
    late = movers(base, 1)[0]
    alone = ask(model, prompts, Path(edit, *late, "q"), heads=[late])
    assert one["inhibition_without"] == pytest.approx(alone.inhibition(late), abs=1e-6)
    assert one["margin_without"] == pytest.approx(ask(model, prompts, edit).margin, abs=1e-5)
    assert mover["control"]["inhibition_without"] != mover["all"]["inhibition_without"]
    assert len(mover["steered"]["attention"]) == 7
    assert len(mover["steered"]["attention"][0]) == (2 if task == "ioi" else 6)
    if task == "laundry":
        assert list(figures["by_items"]) == ["3", "5", "6"]
        assert 1 <= len(figures["rescaled"]["components"]) <= 3
        assert figures["rescaled"]["train"] >= 0
    json.dumps(found, allow_nan=False)


@torch.no_grad()
@pytest.mark.parametrize("alone", [True, False])
def test_steering_sets_what_a_component_tells(alone):
    """Times 1 with a coefficient of its own size, at the last token; against a path by hand."""
    from foveate.lens.interventions import Edit, Path, coefficients, edited
    from foveate.lens.steering import sweep

    words = Words()
    batch = laundry(words, 1, 4)
    model = small(len(words.ids))
    heads = Reading()(model)
    v = heads.ov().svd().v[heads.at(0, 1)][:, :2].float()
    c = coefficients(model, 0, 1, v, lambda: model(batch.ids))[0, -1]
    points = torch.tensor([[1.0, 1.0], [-2.0, 0.5]])
    found = sweep(model, [batch], (0, 1), v, (2, 3), points, alone=alone)
    torch.testing.assert_close(found.scale.float(), c.abs())
    first = batch.ids[0, batch.listed_at[0]]
    assert sorted(first.tolist()) == sorted([int(batch.answer), *batch.others[0].tolist()])
    assert batch.listed_at[0].tolist() == sorted(batch.listed_at[0].tolist())
    for point, got in zip(points, found.attention):
        factor = point.tolist()  # one prompt: its coefficient is its own scale
        edit = Edit(0, 1, v, factor=factor, positions=[-1])
        with watched(model) as watch, edited(model, Path(edit, 2, 3) if alone else edit):
            model(batch.ids)
            want = watch.weights(2)[0, 3, -1, batch.listed_at[0]]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"\(P, 2\)"):
        sweep(model, [batch], (0, 1), v, (2, 3), points[:, :1])


@pytest.mark.parametrize("task", ["ioi", "laundry"])
def test_a_look_that_was_stopped_goes_on(task, monkeypatch):
    from foveate.lens import circuits_look

    words = Words()
    ioi(words, 64), laundry(words, 64, 5)
    model = small(len(words.ids) + 40)
    kept: dict[str, str] = {}

    def keep(what, how):
        key = json.dumps(what, sort_keys=True)
        if key not in kept:
            kept[key] = json.dumps(how())
        return json.loads(kept[key])

    job = Circuits(task=task, items=5, prompts=4, movers=2, tried=2)
    found = job(model, words, keep=keep)
    assert json.dumps(found) == json.dumps(job(model, words))
    monkeypatch.setattr(circuits_look, "ask", None)
    monkeypatch.setattr(circuits_look, "sweep", None)
    assert json.dumps(job(model, words, keep=keep)) == json.dumps(found)


def test_what_isnt_known_is_refused():
    for more, said in (
        ({"kinds": "qx"}, "letters out of qkv"),
        ({"task": "poem"}, "task=.poem."),
        ({"into": ("9",)}, r"layer\.head"),
        ({"top": 0}, "top"),
        ({"items": 2}, "items"),
        ({"offset": -3}, "offset"),
    ):
        with pytest.raises(InputError, match=said):
            Circuits(**more)
    with pytest.raises(InputError, match="need a tokenizer"):
        Circuits(task="ioi")(small(30))
    with pytest.raises(InputError, match="one layer"):
        Circuits()(AttentionOnly(30, layers=1))
    with pytest.raises(InputError, match=r"no head 7\.0"):
        Circuits(into=("7.0",))(small(30))


def test_the_command_reads_a_folder(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from foveate.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    assert main(["circuits", folder, "--json", "--offset", "1", "--out", str(tmp_path / "o")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rotary"]
    assert found["offset"] == 1
    assert [len(found["channels"][kind]) for kind in "qkv"] == [10] * 3
    assert (tmp_path / "o" / "composition.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "o" / "circuits.json").read_text())["dim"] == 32
    assert (tmp_path / "o" / "results.jsonl").is_file()
    assert main(["circuits", folder, "--kinds", "k", "--top", "2", "--into", "2.3", "--raw"]) == 0
    out = capsys.readouterr().out
    assert out.count("-> 2.3 key") == 2
    assert "without the norms' gain" in out
    assert main(["circuits", folder, "--task", "poetry"]) == 2
    assert "poetry" in capsys.readouterr().err


def test_the_figure_of_a_task_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from rich.console import Console

    from foveate.cli.circuits import show
    from foveate.lens.circuits_figure import draw

    words = Words()
    laundry(words, 64, 5)
    model = small(len(words.ids) + 40)
    found = Circuits(task="laundry", items=5, prompts=4, movers=1, tried=2)(model, words)
    files = draw(found, tmp_path)
    assert [f.name for f in files] == ["composition.png", "task.png"]
    screen = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show({"model": "small"} | found | {"files": []}, screen)
    told = screen.export_text()
    assert "all of these" in told
    assert "Right by objects listed: 3:" in told
