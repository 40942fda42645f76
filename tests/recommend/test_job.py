"""`foveate recommend`: from files to answers with reasons, cut off and gone on with."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("typer")

from foveate.cli import main
from foveate.methods.kgat import Graph
from foveate.methods.mqsa_ted import MQSATED
from foveate.recommend import pairwise, sequential
from foveate.recommend.answers import FACTS, TENSORS, Kept
from foveate.recommend.files import write_folder
from foveate.recommend.job import PRETRAINING, TRAINING, Job, run
from foveate.recommend.loop import Plan, train
from foveate.recommend.sequences import SequenceData, read

SMALL = ("--epochs", "8", "--every", "2", "--dim", "8", "--lr", "0.02", "--batch", "32")


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run_it(*args):
        code = main(args)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run_it


@pytest.fixture
def folder(data, tmp_path):
    place = tmp_path / "data"
    write_folder(data, place)
    (place / "item_list.txt").write_text(
        "org_id\tremap_id\n" + "".join(f"item {n}\t{n}\n" for n in range(30))
    )
    (place / "relation_list.txt").write_text("org_id remap_id\nkind 0\nshelf 1\n")
    rows = [[int(i) for i in range(u % 5, 30, 5)] for u in range(30)]
    (place / "sequences.txt").write_text(
        "".join(" ".join(map(str, (u, *row))) + "\n" for u, row in enumerate(rows))
    )
    return place


def test_kgat_from_files_to_reasons(call, folder, tmp_path, data):
    out = str(tmp_path / "out")
    args = ("recommend", "train", "--data", str(folder), "--out", out, "--layers", "8,4", *SMALL)
    code, told, _ = call(*args, "--json")
    assert code == 0
    facts = json.loads(told)
    assert facts["kind"] == "kgat"
    assert facts["pretraining"]["epochs"] == facts["training"]["epochs"] == 8
    assert set(facts["test"]) >= {"recall@5", "ndcg@20", "hit@10", "users"}
    assert json.loads((tmp_path / "out" / FACTS).read_text())["test"] == facts["test"]
    again = json.loads(call(*args, "--json")[1])  # finished: it goes on from the end
    assert again["test"] == facts["test"]
    assert again["training"]["resumed_at"] == 8
    code, _, err = call(*args, "--seed", "1")
    assert (code, "another training" in err) == (2, True)
    fresh = json.loads(call(*args, "--seed", "1", "--fresh", "--json")[1])
    assert fresh["training"]["resumed_at"] == 0
    assert fresh["test"] != facts["test"]

    code, told, _ = call("recommend", "query", out, "7", "--top", "4", "--json")
    assert code == 0
    answer = json.loads(told)
    had = set(data.train[data.train[:, 0] == 7, 1].tolist())
    had |= set(data.validation[data.validation[:, 0] == 7, 1].tolist())
    assert len(answer) == 4
    assert not had & {one["number"] for one in answer}
    scores = [one["score"] for one in answer]
    assert scores == sorted(scores, reverse=True)
    kept = Kept(tmp_path / "out")
    t = kept.tensors
    graph = Graph(torch.stack((t["head"], t["relation"], t["tail"]), 1), 78, 6)
    dense = graph.adjacency(t["attention"]) @ torch.eye(78)
    sums = dense.sum(1)
    torch.testing.assert_close(sums[:70], torch.ones(70))
    for one in answer:
        assert one["because"]
        for reason in one["because"]:
            path = reason["path"]
            assert path[0] == "user 7"
            assert path[-1] == one["item"]
            assert set(path[1::2]) <= {"interact", "^interact", "kind", "^kind", "shelf", "^shelf"}
    code, told, _ = call("recommend", "query", out, "7")
    assert code == 0
    assert "user 7 → interact → item" in told
    shown = call(*args, "--seed", "1")[1]
    assert "recall by user" in shown
    assert f"foveate recommend query {out} USER" in " ".join(shown.split())
    for args_, said in (
        (("query", out, "99"), "No user is called '99'; they are 0 ... 39."),
        (("query", out), "recommends for a user"),
        (("query", str(folder), "1"), "holds no trained recommender"),
    ):
        code, _, err = call("recommend", *args_)
        assert code == 2
        assert said in " ".join(err.split())
    path = tmp_path / "out" / TENSORS
    path.write_bytes(path.read_bytes()[:-50])
    code, _, err = call("recommend", "query", out, "7")
    assert (code, "damaged" in err) == (2, True)


def test_a_killed_job_goes_on_to_the_same_figures(folder, tmp_path):
    from foveate.methods.kgat import KGAT

    setting = pairwise.Setting("kgat", 8, 0.02, 32, recipe=KGAT(8, 8, (8,)))
    plan = Plan(epochs=6, every=2, patience=None)
    expected = run(Job(str(folder), setting, plan, tmp_path / "one"), lambda *a: None)

    limit = 0.0

    def stop(share, doing):
        if share > limit:
            raise KeyboardInterrupt

    for reached in (0.2, 0.75):  # in the pretraining, then in the training
        limit = reached
        with pytest.raises(KeyboardInterrupt):
            run(Job(str(folder), setting, plan, tmp_path / "two"), stop)
        assert not (tmp_path / "two" / TENSORS).exists()
    assert (tmp_path / "two" / PRETRAINING).exists()
    assert (tmp_path / "two" / TRAINING).exists()
    found = run(Job(str(folder), setting, plan, tmp_path / "two"), lambda *a: None)
    assert found["training"]["resumed_at"] > 0
    assert found["test"] == expected["test"]


@pytest.mark.parametrize("model", ["bpr-mf", "fm"])
def test_baselines_answer_too(call, folder, tmp_path, model):
    out = str(tmp_path / "out")
    args = ("--data", str(folder), "--model", model, "--out", out, *SMALL)
    assert call("recommend", "train", *args)[0] == 0
    answer = json.loads(call("recommend", "query", out, "3", "--json")[1])
    assert len(answer) == 10
    assert "because" not in answer[0]


@pytest.mark.parametrize("model", ["mqsa-ted", "sasrec"])
def test_the_next_item_from_files_to_answers(call, folder, tmp_path, model):
    out = str(tmp_path / "out")
    args = ("--data", str(folder), "--model", model, "--out", out, "--length", "6", "--dropout",
            "0.1", "--epochs", "60", "--every", "20", "--dim", "8", "--lr", "0.02")  # fmt: skip
    code, told, _ = call("recommend", "train", *args, "--json")
    assert code == 0
    facts = json.loads(told)
    assert facts["kind"] == model
    # Sequences go up by 5; the last step, 20 to 25 and so on, is never trained on.
    assert facts["test"]["unseen"] == 1
    assert set(facts["test"]) >= {"hr@10", "ndcg@20", "unseen ndcg@10"}
    code, told, _ = call("recommend", "query", out, "--after", "item 2", "--after", "7", "--json")
    assert code == 0
    answer = json.loads(told)
    (next_,) = [one for one in answer[:2] if one["item"] == "item 12"]
    assert next_["times followed the last"] == 6
    assert not any(one["times followed the last"] for one in answer if one is not next_)
    looks = next_["looked at"]
    assert set(looks) == ({"short", "long"} if model == "mqsa-ted" else {"short"})
    for looked in looks.values():
        assert sum(one["weight"] for one in looked) == pytest.approx(1)
    assert "followed the last item 6 times" in call("recommend", "query", out, "--after", "7")[1]
    for args_, said in ((("--after", "nothing"), "No item is called"), (("1",), "give --after")):
        code, _, err = call("recommend", "query", out, *args_)
        assert (code, said in err) == (2, True)


def test_options_that_have_no_meaning_are_refused(call, tmp_path):
    for args, said in (
        (("--model", "svd"), "kgat, bpr-mf, fm, mqsa-ted, sasrec"),
        (("--layers", "a"), "widths"),
        (("--data", str(tmp_path / "no")), "is no folder"),
        (("--lr", "0"), "above 0"),
        (("--epochs", "0"), "epochs"),
    ):
        code, _, err = call("recommend", "train", "--out", str(tmp_path / "out"), *args)
        assert code == 2
        assert said in err


def test_the_next_items_training_goes_on_bit_by_bit(folder, tmp_path):
    recipe = MQSATED(8, 6, dropout=0.4)
    plan = Plan(epochs=6, every=2, patience=None)

    def trained(path, tell=lambda *a: None):
        trainee = sequential.Sequential(sequential.Setting(recipe, 0.01), read(str(folder)), 1)
        train(trainee, plan, path, tell)
        return trainee.model.state_dict()

    def stop(share, doing):
        if share > 0.6:
            raise KeyboardInterrupt

    expected = trained(None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "kept.safetensors", stop)
    found = trained(tmp_path / "kept.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


# -- sequences ------------------------------------------------------------------------------------
def some():
    return SequenceData("made", ((0, 1, 2, 3, 4), (5, 6), (7, 8, 9), (1,), ()), 10)


def test_leave_one_out_parts_never_meet():
    data = some()
    assert data.training == ((0, 1, 2), (5, 6), (7,), (1,), ())
    assert data.judged("test") == [((0, 1, 2, 3), 4), ((7, 8), 9)]
    assert data.judged("validation") == [((0, 1, 2), 3), ((7,), 8)]
    counts = data.transitions().counts(torch.tensor([1, 3, 2, 5]), torch.tensor([2, 4, 3, 6]))
    assert counts.tolist() == [1, 0, 0, 1]
    ((items, targets),) = data.batches(4, 8, torch.Generator().manual_seed(0))
    rows = sorted(zip(items.tolist(), targets.tolist()))
    assert rows == [([10, 10, 0, 1], [10, 10, 1, 2]), ([10, 10, 10, 5], [10, 10, 10, 6])]
    assert data.padded([(1, 2, 3)], 2).tolist() == [[2, 3]]


def test_figures_are_those_of_a_loop():
    random = torch.Generator().manual_seed(5)
    rows = tuple(tuple(torch.randperm(12, generator=random)[:6].tolist()) for _ in range(20))
    recipe = MQSATED(8, 4, dropout=0.3)
    trainee = sequential.Sequential(sequential.Setting(recipe), SequenceData("made", rows, 12))
    for p in trainee.model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    found = trainee.figures("test", (3,), size=7)
    trainee.model.eval()
    hits, unseen = [], 0
    steps = {(a, b) for row in rows for a, b in zip(row[:-2], row[1:-2])}
    for row in rows:
        scores = trainee.model.scores(torch.tensor([row[-5:-1]]))[0]
        scores[list(row[:-1])] = -torch.inf
        hits.append(row[-1] in scores.topk(3).indices.tolist())
        unseen += (row[-2], row[-1]) not in steps
    assert found["hr@3"] == pytest.approx(sum(hits) / 20)
    assert found["unseen"] == pytest.approx(unseen / 20)
    assert 0 < unseen < 20


def test_sequences_are_read_from_a_folder(folder):
    found = read(str(folder))
    assert found.sequences[7] == (2, 7, 12, 17, 22, 27)
    assert (found.items, found.names[3]) == (30, "item 3")
