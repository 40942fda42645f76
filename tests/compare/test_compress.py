"""`foveate compress`: from a trained model's layers to a smaller model that loads again."""

from __future__ import annotations

import json

import pytest
import torch

import foveate
from conftest import make_llama
from foveate.cli.app import run
from foveate.methods.echoatt.choice import similarity
from foveate.methods.echoatt.fit import Profiler
from foveate.models import FoveateForCausalLM, config_from, echo_student, weights_from

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A random Llama of five layers."""
    return make_llama(
        tmp_path_factory.mktemp("five"), num_hidden_layers=5, tie_word_embeddings=True
    )


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def rebuilt(original):
    made = FoveateForCausalLM(config_from(original.config)).eval()
    return weights_from(made, "llama", original.state_dict().items())


def tokens(length=40):
    return torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(1))


def test_a_llama_is_rebuilt_exactly(five):
    original = loaded(five)
    made, ids = rebuilt(original), tokens()
    torch.testing.assert_close(made(ids).logits, original(ids).logits, atol=1e-4, rtol=1e-4)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_in_use_on_transformers_it_computes_what_the_student_does(five):
    original = loaded(five)
    student, ids = echo_student(rebuilt(original), (1, 3, 4)), tokens()
    dense = original(ids).logits
    with foveate.use(original, "echoatt(followers=(1, 3, 4))"), torch.no_grad():
        got = original(ids).logits
        torch.testing.assert_close(got, student(ids).logits, atol=1e-4, rtol=1e-4)
        one = original.generate(ids[:, :9], max_new_tokens=5, do_sample=False, pad_token_id=0)
    two = student.generate(ids[:, :9], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(one, two)
    assert (got - dense).abs().max() > 1e-2


def test_the_profiler_sees_the_maps(five):
    original, ids = loaded(five), tokens(200)
    profiler = Profiler()
    with foveate.use(original, profiler), torch.no_grad():
        original(ids)
    got = profiler.similarity().mean
    original.set_attn_implementation("eager")
    with torch.no_grad():
        maps = original(ids, output_attentions=True).attentions
    each = [similarity(torch.stack([m[b] for m in maps])) for b in range(2)]
    torch.testing.assert_close(got.float(), torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)
    cut = [similarity(torch.stack([m[b] for m in maps]), skip=1) for b in range(2)]
    found = profiler.similarity(1).mean.float()
    torch.testing.assert_close(found, torch.stack(cut).mean(0), atol=1e-5, rtol=1e-5)


SMALL = [
    "--first", "4", "--second", "2", "--length", "64", "--batch", "2", "--judged", "4", "--prompt",
    "48", "--decode", "3", "--rounds", "2", "--lr", "0.001", "--json",
]  # fmt: skip


def test_the_whole_command(five, prose, tmp_path, capsys, monkeypatch):
    args = ["compress", str(five), "--text", str(prose), "--out", str(tmp_path / "out"), *SMALL]
    assert run([*args, "--share", "0.4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    followers = facts["followers"]
    assert len(followers) == 2
    lost = facts["parameters"]["original"] - facts["parameters"]["student"]
    assert lost == 2 * 64 * 16 * (4 + 2)
    assert facts["cache_numbers_per_token"] == {"original": 5 * 64, "student": 5 * 64 - 2 * 32}
    assert set(facts["perplexity"]) == {
        "original", "before distillation", "after distillation", "original, second stage",
    }  # fmt: skip
    assert all(v["perplexity"] > 1 for v in facts["perplexity"].values())
    speed = facts["speed"]
    assert speed["original"]["decode_times_faster"]["median"] == 1
    assert speed["student"]["prefill_tokens_per_second"] > 0
    assert speed["student"]["cache_bytes"] < speed["original"]["cache_bytes"]
    student = transformers.AutoModelForCausalLM.from_pretrained(facts["folder"])
    assert isinstance(student, FoveateForCausalLM)
    windows_loss = facts["perplexity"]["after distillation"]["loss"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(facts["folder"])
    ids = torch.tensor(tokenizer(prose.read_text()).input_ids)
    held = ids[int(len(ids) * 0.8) :][: 4 * 64].reshape(4, 64)
    with torch.no_grad():
        logits = student(held).logits[:, :-1].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, held[:, 1:].flatten())
    assert windows_loss == pytest.approx(float(want), rel=1e-4)
    assert run([*args, "--share", "0.4"]) == 0  # it was there already
    assert json.loads(capsys.readouterr().out)["found"]
    assert run([*args[:-1], "--share", "0.4"]) == 0  # for people
    said = capsys.readouterr().out
    assert "shared, distilled" in said
    (row,) = [line for line in said.splitlines() if line.startswith("original, second stage alone")]
    assert row.endswith(f"{facts['perplexity']['original, second stage']['perplexity']:.2f}")
    assert "6 steps" in said

    def never(*given, **more):
        raise AssertionError("the student is there")

    monkeypatch.setattr("foveate.compress.job.adjust", never)
    assert run([*args, "--share", "0.4", "--prompt", "32"]) == 0  # timed again, not trained
    again = json.loads(capsys.readouterr().out)
    assert not again["found"]
    assert again["speed"]["prompt"] == 32
    assert again["perplexity"] == facts["perplexity"]


def test_it_goes_on_after_a_kill(five, prose, tmp_path, capsys, monkeypatch):
    from foveate.compress import job

    def out(name):
        return [
            "compress", str(five), "--text", str(prose), "--out", str(tmp_path / name),
            "--followers", "1,3", *SMALL, "--first", "14",
        ]  # fmt: skip

    assert run(out("whole")) == 0
    want = json.loads(capsys.readouterr().out)
    once = job.adjust

    def killed(student, teacher, batch, *args, **more):
        def some(number):
            if number == 12:
                raise KeyboardInterrupt
            return batch(number)

        return once(student, teacher, some, *args, **more)

    monkeypatch.setattr(job, "adjust", killed)
    with pytest.raises(KeyboardInterrupt):
        job.run(
            job.Job(
                str(five), job.Text("file prose.txt", prose.read_text(), want_sha(prose)),
                tmp_path / "cut", (1, 3), stages=job.Stages(14, 2, 1e-3), length=64, batch=2,
                judged=4, prompt=48, decode=3, rounds=2, every=10,
            ),
            lambda share, doing: None,
        )  # fmt: skip
    assert (tmp_path / "cut" / job.TRAINING).is_file()
    numbers = []

    def rest(student, teacher, batch, *args, **more):
        return once(student, teacher, lambda n: (numbers.append(n), batch(n))[1], *args, **more)

    monkeypatch.setattr(job, "adjust", rest)
    assert run(out("cut")) == 0
    got = json.loads(capsys.readouterr().out)
    assert numbers == [10, 11, 12, 13, 14, 15, 0, 1]  # the original's second stage is the last
    assert got["perplexity"] == want["perplexity"]
    assert not (tmp_path / "cut" / job.TRAINING).exists()
    assert not (tmp_path / "cut" / job.CONTROL).exists()


@pytest.mark.parametrize("where", ["speeds", "control"])
def test_no_stop_after_the_students_training_loses_it(
    five, prose, tmp_path, capsys, monkeypatch, where
):
    from foveate.compress import job

    args = ["compress", str(five), "--text", str(prose), "--out", str(tmp_path), *SMALL]
    args += ["--second", "12"]  # the control is kept after its tenth step
    once, trained = job.adjust, []
    stops = [16 + 11] if where == "control" else []

    def stopped(*given, **more):
        raise KeyboardInterrupt

    def some(model, teacher, batch, stages, **more):
        def counted(number):
            if stops and len(trained) == stops[0]:
                stops.clear()
                raise KeyboardInterrupt
            trained.append((stages.first, number))
            return batch(number)

        return once(model, teacher, counted, stages, **more)

    monkeypatch.setattr(job, "adjust", some)
    if where == "speeds":
        with monkeypatch.context() as patch:
            patch.setattr(job.measure, "speeds", stopped)
            assert run(args) != 0
        assert len(trained) == 16
    else:
        assert run(args) != 0
        assert json.loads((tmp_path / job.REPORT).read_text())["speed"]  # before the control
        assert len(trained) == 16 + 11
    capsys.readouterr()
    before = len(trained)
    assert run(args) == 0
    facts = json.loads(capsys.readouterr().out)
    assert job.ADJUSTED in facts["perplexity"]
    again = trained[before:]
    wanted = range(12) if where == "speeds" else (10, 11)
    assert again == [(0, number) for number in wanted]


def test_a_report_whose_model_moved_still_gets_its_control(five, prose, tmp_path, capsys):
    from foveate.compress import job

    args = ["compress", str(five), "--text", str(prose), "--out", str(tmp_path), *SMALL]
    assert run(args) == 0
    facts = json.loads(capsys.readouterr().out)
    wanted = facts["perplexity"].pop(job.ADJUSTED)
    (tmp_path / job.REPORT).write_text(json.dumps(facts))
    (tmp_path / job.MODEL).rename(tmp_path / "elsewhere")
    assert run(args) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"][job.ADJUSTED] == wanted
    assert not (tmp_path / job.MODEL).exists()


def test_the_original_is_trained_as_the_students_second_stage_is(
    five, prose, tmp_path, capsys, monkeypatch
):
    from foveate.compress import job

    args = ["compress", str(five), "--text", str(prose), "--out", str(tmp_path), *SMALL]
    assert run(args) == 0
    facts = json.loads(capsys.readouterr().out)
    less = dict(facts["perplexity"])
    wanted = less.pop(job.ADJUSTED)
    assert wanted["perplexity"] < less["original"]["perplexity"]
    (tmp_path / job.REPORT).write_text(json.dumps(facts | {"perplexity": less}))
    seen, once = [], job.adjust

    def noted(model, teacher, batch, stages, **more):
        last = range(stages.first, stages.first + stages.second)
        seen.append((stages, torch.stack([batch(n) for n in last])))
        return once(model, teacher, batch, stages, **more)

    monkeypatch.setattr(job, "adjust", noted)
    assert run(args) == 0  # a report without it gets it, and nothing else is done
    again = json.loads(capsys.readouterr().out)
    assert again["perplexity"] == less | {job.ADJUSTED: wanted}
    assert again["speed"] == facts["speed"]
    assert len(seen) == 1
    assert run([*args, "--fresh"]) == 0
    (student, batches), (control, others) = seen[1:]
    assert control == student._replace(first=0)
    assert torch.equal(batches, others)


def want_sha(path):
    from foveate.runs.text import load_text

    return load_text(path).sha256


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--followers", "0,2"], "layer 0 can't follow"),
        (["--followers", "9"], "layer 9 of a model of 5"),
        (["--followers", "a"], "expected indices"),
        (["--share", "1.5"], "share"),
        (["--mode", "copy"], "unknown"),
        (["--length", "0"], "--length 0"),
        (["--prompt", "100000"], "too few"),
    ],
)
def test_bad_input_is_one_message(five, prose, tmp_path, capsys, more, said):
    args = ["compress", str(five), "--text", str(prose), "--out", str(tmp_path / "out"), *more]
    assert run(args) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_other_families_are_refused(tiny_bert, prose, tmp_path, capsys):
    assert run(["compress", str(tiny_bert), "--text", str(prose), "--out", str(tmp_path)]) == 2
    assert "bert" in capsys.readouterr().err


def test_fit_finds_followers_that_use_takes(five, prose, tmp_path, capsys):
    where = tmp_path / "layers.json"
    args = ["fit", str(five), "--method", "echoatt(share=0.4)", "--text", str(prose), "--length",
            "128", "--out", str(where)]  # fmt: skip
    assert run(args) == 0
    capsys.readouterr()
    facts = json.loads(where.read_text())["facts"]
    assert len(facts["followers"]) == 2
    original, ids = loaded(five), tokens()
    with foveate.use(original, "echoatt", fitted=where), torch.no_grad():
        got = original(ids).logits
    with foveate.use(original, f"echoatt(followers={tuple(facts['followers'])})"), torch.no_grad():
        torch.testing.assert_close(got, original(ids).logits)
