"""`foveate classify`: a classifier that plain transformers loads, with pictures of its heads."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.cli import main

pytest.importorskip("transformers")
SMALL = ("--steps", "4", "--every", "2", "--dim", "16", "--embedding", "8", "--batch", "8",
         "--pooling", "lama(heads=3)", "--data", "goemotions")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A data set in GoEmotions' form, small enough to train on in a second."""
    made = tmp_path / "data"
    made.mkdir()
    rows = [("what a lovely day", 0), ("this is a sad, sad story", 1)] * 12
    for name in ("train", "dev", "test"):
        lines = [f"{text}\t{label}\tid{i}" for i, (text, label) in enumerate(rows)]
        (made / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (made / "labels.txt").write_text("joy\nsadness\n")
    return made


@pytest.fixture
def run(capsys, tmp_path, folder):
    def call(*args, out="model"):
        code = main(["classify", *SMALL, *args, "--folder", str(folder), "--out",
                     str(tmp_path / out)])  # fmt: skip
        printed, err = capsys.readouterr()
        return code, printed, err

    return call


def test_it_trains_saves_and_draws(run, tmp_path):
    from transformers import AutoModelForSequenceClassification

    code, printed, err = run("--json", "--pictures", "2")
    assert code == 0, err
    facts = json.loads(printed)
    assert facts["steps"] == 4
    assert set(facts["test"]) == {"loss", "perplexity", "accuracy"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "joy", 1: "sadness"}
    assert model.encoder.pooler.recipe.heads == 3
    vocabulary = json.loads((tmp_path / "model" / "words.json").read_text())
    ids = [1, *(4 + vocabulary.index(word) for word in ("what", "a", "lovely", "day"))]
    out = model.eval()(torch.tensor([ids]))
    page = (tmp_path / "model" / "heads.html").read_text()
    assert page.count("<h2>") == 2
    assert page.count("<p>") == 2 * 4
    weight = out.pooler_weights[0, 0, 3].item()
    assert f'title="{weight:.3f}"' in page.split("head 1")[1].split("</p>")[0].split("lovely")[0]


def test_it_goes_on_and_refuses_to_overwrite(run, tmp_path):
    assert run()[0] == 0
    code, _, err = run()
    assert code == 2
    assert "--resume" in err
    code, printed, err = run("--resume", "--json")
    assert code == 0, err
    assert json.loads(printed)["resumed_at"] == 4
    code, printed, err = run("--pooling", "mean", out="other")
    assert code == 0, err
    assert "no heads" in printed
    assert not (tmp_path / "other" / "heads.html").exists()
    code, _, err = run("--pooling", "max", "--resume", out="other")
    assert code == 2
    assert "is of another training" in err


def test_bad_input_is_refused_before_any_work(run, tmp_path):
    code, _, err = run("--pooling", "lamma")
    assert code == 2
    assert "did you mean 'lama'" in err
    code, _, err = run("--pictures", "-1")
    assert code == 2
    assert "pictures" in err
    assert not (tmp_path / "model").exists()


MIXING = {
    "flowformer": ("--attention", "flowformer"),
    "hsa": ("--attention", "hsa(branch=4)"),
    "gaam": ("--mixer", "gaam(axis='tokens', heads=1)"),
    "grassmann": ("--mixer", "grassmann(rank=4, offsets=[1, 4])"),
    "tensor-attention": ("--attention", "tensor-attention"),
    "deconstructed-mlp": ("--mixer", "deconstructed-mlp"),
    "deconstructed-approximate": ("--attention", "deconstructed-approximate"),
    "deconstructed-nonapproximate": ("--attention", "deconstructed-nonapproximate"),
    "a hybrid": ("--mixer", "gaam(axis='tokens', heads=1),none"),
}


@pytest.mark.parametrize("name", MIXING)
def test_blocks_mix_tokens_by_any_bidirectional_formula(run, tmp_path, name):
    from transformers import AutoModelForSequenceClassification

    blocks = ("--recurrent", "0", "--layers", "2", "--pooling", "mean", *MIXING[name])
    code, printed, err = run(*blocks, "--json")
    assert code == 0, err
    facts = json.loads(printed)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    mixers = [block.attention for block in model.encoder.blocks]
    assert len(mixers) == 2
    assert (facts["shape"]["mixer"] is None) == ("--attention" in MIXING[name])
    if name == "a hybrid":
        assert [model.config.mixer_of(i) for i in (0, 1)] == ["gaam(axis='tokens', heads=1)", None]
    ids = torch.randint(4, model.config.vocab_size, (1, 6))
    later = ids.clone()
    later[0, 5] = 4 + (ids[0, 5] - 3) % (model.config.vocab_size - 4)
    first, other = (model.encoder(input_ids=x).last_hidden_state[0, 0] for x in (ids, later))
    seen = not torch.equal(first, other)
    assert seen == (name != "deconstructed-mlp")  # the one that mixes nothing


def test_the_model_is_named_by_what_it_is_made_of(run):
    blocks = ("--layers", "2", "--pooling", "mean")
    hybrid = ("--mixer", "gaam(axis='tokens', heads=1),none")
    code, printed, err = run("--recurrent", "0", *blocks, *hybrid)
    assert code == 0, err
    assert "gaam(axis='tokens', heads=1); mha, full -> mean" in " ".join(printed.split())
    code, printed, err = run(*blocks, "--attention", "flowformer", out="other")
    assert code == 0, err
    assert "GRU x 1 -> mha, flowformer x 2 -> mean" in " ".join(printed.split())


def test_what_stands_in_blocks_needs_blocks(run, tmp_path):
    for given in (("--attention", "flowformer"), ("--mixer", "gaam(axis='tokens', heads=1)")):
        code, _, err = run(*given)
        assert code == 2
        assert "--layers" in err
    for given, said in ((("gaam,none,gaam",), "3 mixers for 2 layers"),
                        (("flowformer",), "give it as attention"),
                        (("gaam", "--attention", "lucid"), "would do nothing")):  # fmt: skip
        code, _, err = run("--layers", "2", "--mixer", *given)
        assert code == 2
        assert said in err
    assert not (tmp_path / "model").exists()


def test_segments_are_trained_behind_their_memory():
    """With a detached memory the objective is the mean over segments behind the tokens before."""
    from foveate.ops.errors import InputError
    from foveate.papers.tasks.base import Batch
    from foveate.papers.training.language import Sizes, language_model
    from foveate.papers.training.objective import BySegments, next_token

    torch.manual_seed(0)
    sizes = Sizes(layers=2, dim=16, heads=2, length=12, vocab=20)
    ids = torch.randint(20, (2, 13))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    model = language_model(sizes, attention="rcmha(reach=16)").train()
    for length in (4, 5, 12):  # "carry": the same numbers as the whole, within rounding
        torch.testing.assert_close(BySegments(length)(model, batch), next_token(model, batch))
    short = language_model(sizes, attention="rcmha(reach=16, memory=2)").train()
    short.load_state_dict(model.state_dict())
    assert not torch.allclose(BySegments(3)(short, batch), next_token(model, batch), atol=1e-6)
    moh = language_model(sizes, "moh(shared=1, active=1, beta=0.5)").train()
    BySegments(4)(moh, batch).backward()
    with pytest.raises(InputError, match="1 token or more"):
        BySegments(0)


def test_segments_are_judged_as_they_are_trained():
    """Held-out sequences are read behind the same memory, not whole."""
    from foveate.papers.tasks.recall import Recall
    from foveate.papers.training.language import Sizes, language_model
    from foveate.papers.training.loop import train
    from foveate.papers.training.objective import BySegments, evaluate
    from foveate.papers.training.regime import Regime

    torch.manual_seed(0)
    task = Recall(tokens=20, length=12, pairs=2, held=4)
    sizes = Sizes(layers=2, dim=16, heads=2, length=12, vocab=20)
    model = language_model(sizes, attention="rcmha(reach=16, memory=2, segment_conv='reset')")
    by = BySegments(3)
    done = train(model, task, Regime(steps=2, batch=4, every=1), objective=by)
    with torch.no_grad():
        batches = list(task.held_out("validation", 2))
        want = sum(by(model, batch).item() for batch in batches) / len(batches)
    assert done.history[-1]["validation"] == pytest.approx(want, rel=1e-5)
    found = evaluate(model, task, "validation", segments=by)
    assert found["loss"] == pytest.approx(want, rel=1e-5)
    assert found["loss"] != pytest.approx(evaluate(model, task, "validation")["loss"], rel=1e-5)


def test_train_reads_in_segments(tmp_path, capsys):
    from foveate.models import FoveateForCausalLM
    from foveate.papers.tasks.text import text_file
    from foveate.papers.training.job import SPECIAL
    from foveate.papers.training.objective import BySegments, evaluate

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 90)
    arguments = [
        "train", "--steps", "4", "--every", "2", "--layers", "1", "--dim", "16", "--heads", "2",
        "--length", "16", "--batch", "4", "--data", str(text),
        "--attention", "rcmha(reach=32, memory=8, segment_conv='reset')",
        "--json", "--segment", "4", "--out", str(tmp_path / "model"),
    ]  # fmt: skip
    code = main(arguments)
    printed, err = capsys.readouterr()
    assert code == 0, err
    facts = json.loads(printed)
    assert facts["segment"] == 4
    model = FoveateForCausalLM.from_pretrained(tmp_path / "model")
    task = text_file(str(text), 16, offset=SPECIAL)
    found = evaluate(model, task, "test", 4, segments=BySegments(4))
    assert facts["test"]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    whole = evaluate(model, task, "test", 4)
    assert facts["test"]["loss"] != pytest.approx(whole["loss"], rel=1e-6)
    code = main([*arguments[:-3], "8", *arguments[-2:], "--resume"])
    assert code == 2
    assert "is of another training" in capsys.readouterr().err


def test_an_encoder_with_experts_tells_how_they_are_used(run, tmp_path):
    experts = ("--experts", "3", "--router", "similarity-smoe")
    code, printed, err = run("--recurrent", "0", "--layers", "1", *experts, "--json")
    assert code == 0, err
    facts = json.loads(printed)
    assert facts["shape"]["experts"] == {"count": 3, "top_k": 2, "router": "similarity-smoe"}
    assert 0 < facts["routing"]["routing_entropy_share"] <= 1
    code, _, err = run(*experts, out="other")
    assert code == 2
    assert "--layers" in err
