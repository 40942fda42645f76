"""`foveate train`: a model that plain transformers loads, and that survives a kill."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import foveate
from foveate.cli import main
from foveate.papers.tasks.text import text_file
from foveate.papers.training import job
from foveate.papers.training.objective import evaluate

pytest.importorskip("transformers")
SOURCE = Path(foveate.__file__).resolve().parents[1]
SMALL = ("--steps", "6", "--every", "3", "--layers", "2", "--dim", "32", "--heads", "4",
         "--length", "32", "--batch", "4", "--projection", "mfa(head_dim=8)")  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 60)
    return str(path)


@pytest.fixture
def run(capsys, tmp_path, text):
    def call(*args, out="model", data=text):
        code = main(["train", *args, "--data", data, "--out", str(tmp_path / out)])
        printed, err = capsys.readouterr()
        return code, printed, err

    return call


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_plain_transformers_loads_it_after_import_foveate(run, tmp_path, text):
    code, out, err = run(*SMALL, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["steps"] == 6
    assert facts["projection"] == "mfa(head_dim=8)"
    assert json.loads((tmp_path / "model" / "training.json").read_text()) == facts
    code = (
        "import json, sys, torch, foveate\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer(sys.argv[2], add_special_tokens=False, return_tensors='pt').input_ids\n"
        "out = model.generate(ids, max_new_tokens=96, do_sample=False)[0, ids.shape[1]:]\n"
        "print(json.dumps([type(model).__name__, tokenizer.decode(out, skip_special_tokens=True),"
        " tokenizer.decode(ids[0])]))"
    )
    prompt = facts["sample"]["prompt"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), prompt],
        capture_output=True, text=True, cwd=SOURCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, followed, same = json.loads(done.stdout.splitlines()[-1])
    assert name == "FoveateForCausalLM"
    assert same == prompt
    assert followed == facts["sample"]["followed"].replace("\ufffd", "")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    task = text_file(text, 32, offset=job.SPECIAL)
    found = evaluate(model, task, "test", 4)
    assert found["loss"] == pytest.approx(facts["test"]["loss"], rel=1e-5)


def test_stopped_and_resumed_it_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    assert run(*SMALL, out="whole")[0] == 0
    from foveate.papers.training import loop

    original, calls = loop.next_token, []

    def until(model, batch):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return original(model, batch)

    monkeypatch.setitem(loop.train.__kwdefaults__, "objective", until)
    assert run(*SMALL, out="cut")[0] != 0
    monkeypatch.setitem(loop.train.__kwdefaults__, "objective", original)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    code, _, err = run(*SMALL, out="cut")
    assert code == 2
    assert "give --resume to go on with it" in err
    code, out, _ = run(*SMALL, "--resume", "--json", out="cut")
    assert code == 0
    assert json.loads(out)["resumed_at"] == 3
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_process_that_is_killed_goes_on_and_ends_the_same(run, tmp_path, text):
    many = [*SMALL, "--steps", "60"]
    assert run(*many, out="whole")[0] == 0
    command = [sys.executable, "-m", "foveate.cli", "train", *many, "--data", text]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "cut")], cwd=SOURCE,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    seen = tmp_path / "cut" / "checkpoints"
    while process.poll() is None and not list(seen.glob("step-*")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    code, out, _ = run(*many, "--resume", "--json", out="cut")
    assert code == 0
    assert json.loads(out)["resumed_at"] > 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resume_refuses_another_training(run):
    assert run(*SMALL)[0] == 0
    code, _, err = run(*SMALL, "--resume", "--seed", "7")
    assert code == 2
    assert "is of another training" in err
    code, _, err = run(*SMALL, "--resume", "--length", "16")
    assert code == 2
    assert "is of another training" in err
    code, _, err = run(*SMALL, "--resume", "--attention", "sink-window(sinks=1, window=4)")
    assert code == 2
    assert "is of another training" in err


def test_people_see_the_figures_and_how_to_load_it(run, tmp_path):
    code, out, err = run(*SMALL)
    assert code == 0
    assert "bits for each byte" in out
    assert f"from_pretrained('{tmp_path / 'model'}')" in out
    assert "step 5" in err or "6 of 6" in err
    assert "Writing model shards" not in err


def test_step3_in_small(run, tmp_path):
    """Experts between dense layers, decoded by plain transformers, and gone on with."""
    args = ("--like", "step3", "--layers", "3", "--steps", "4", "--every", "2", "--length", "32",
            "--batch", "4")  # fmt: skip
    code, out, err = run(*args, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["like"], facts["steps"]) == ("step3", 4)
    assert facts["projection"].startswith("mfa(head_dim=16, query_rank=32")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (model.config.moe_layers, model.config.router_renormalize) == ([1], False)
    assert (model.config.vocab_size, model.config.hidden_size) == (259, 112)
    code, out, err = run(*args[:4], "--steps", "6", *args[6:], "--resume", "--json")
    assert code == 2  # another regime: the checkpoints are of 4 steps
    for wrong, said in ((("--like", "step4"), "step3"), (("--like", "step3", "--dim", "64"), "own"),
                        (("--like", "step3", "--layers", "2"), "3 layers")):  # fmt: skip
        code, _, err = run(*wrong, out="other")
        assert code == 2
        assert said in err


def test_mixers_in_attentions_place(run, tmp_path):
    hybrid = "grassmann(rank=8, offsets=[1, 2]),none"
    code, out, err = run(*SMALL, "--mixer", hybrid)
    assert code == 0, err
    assert "grassmann(rank=8, offsets=[1, 2]); mfa(head_dim=8), full" in " ".join(out.split())
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert facts["mixer"] == ["grassmann(rank=8, offsets=[1, 2])", None]
    assert "model.layers.0.attention.mixer.reduce.weight" in weights(tmp_path / "model")
    code, out, err = run(
        *SMALL, "--projection", "mha", "--mixer", "fixed-seq-qk(length=40)", out="other"
    )
    assert code == 0, err
    assert weights(tmp_path / "other")["model.reference.start"][:3].tolist() == [87, 107, 104]


@pytest.mark.parametrize(
    "args",
    [
        ("--projection", "mha", "--attention", "flowformer(clamp=5)"),
        ("--projection", "mha", "--mixer", "gaam"),
        ("--projection", "mha", "--mixer", "gaam(axis='tokens', form='density', heads=1)"),
    ],
)
def test_other_formulas_train_and_decode_from_their_state(run, tmp_path, args):
    code, _, err = run(*SMALL, *args)
    assert code == 0, err
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert len(facts["sample"]["followed"]) > 0  # by generate, with the state


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--mixer", "grassman"), "did you mean 'grassmann'"),
        (("--mixer", "grassman", "--attention", "lucid"), "did you mean 'grassmann'"),
        (("--mixer", "full", "--projection", "mfa"), "give it as attention="),
        (("--mixer", "full"), "give it as attention= (in commands --attention)"),
        (("--mixer", "top-k"), "no mixer"),
        (("--mixer", "grassmann,none"), "2 mixers for 4 layers"),
        (("--mixer", "grassmann", "--attention", "lucid"), "--attention lucid would do nothing"),
        (("--mixer", "gaam,gaam,gaam,gaam", "--projection", "mfa"), "--projection mfa would do"),
        (("--projection", "mfaa"), "did you mean 'mfa'"),
        (("--projection", "full"), "no projection"),
        (("--attention", "mfa"), "no attention"),
        (("--heads", "5"), "the heads don't divide the width"),
        (("--steps", "0"), "steps must be 1 or more, got 0"),
        (("--layers", "0"), "layers must be 1 or more, got 0"),
        (("--lr", "0"), "lr must be above 0"),
        (("--length", "4000"), "too few for a window of 4000"),
        (("--device", "abacus"), "--device abacus is not known"),
    ],
)
def test_bad_input_is_one_message_and_no_work(run, tmp_path, args, said):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("error:") == 1
    assert not (tmp_path / "model").exists()


def test_data_that_is_not_there(run, tmp_path):
    code, _, err = run(*SMALL, data=str(tmp_path / "nowhere"))
    assert code == 2
    assert "there is no such file" in err


def test_without_the_hf_extra_it_says_what_to_install():
    code = (
        "import sys\nsys.modules['transformers'] = None\n"
        "from foveate.cli import main\nsys.exit(main(['train', '--steps', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE)
    assert done.returncode == 2
    assert "pip install 'foveate[hf]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_resume_says_when_there_is_nothing_to_go_on_from(run):
    code, out, err = run(*SMALL, "--resume", "--json")
    assert code == 0
    assert json.loads(out)["resumed_at"] == 0
    assert "holds no checkpoint to go on from; the training begins" in err
    code, out, err = run(*SMALL, "--resume", "--json")
    assert code == 0
    assert json.loads(out)["resumed_at"] == 6
    assert "holds no checkpoint" not in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_trains_and_goes_on_on_a_gpu(run, tmp_path):
    code, out, err = run(*SMALL, "--device", "cuda", "--json")
    assert code == 0, err
    first = json.loads(out)
    code, out, err = run(*SMALL, "--device", "cuda", "--resume", "--json")
    assert code == 0, err
    again = json.loads(out)
    assert again["resumed_at"] == 6
    assert again["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-4)
    code, out, _ = run(*SMALL, "--json", out="cpu")
    assert code == 0
    assert json.loads(out)["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-2)
