"""Texts with labels, the task made of them, and a small encoder that learns it."""

from __future__ import annotations

import lzma

import pytest
import torch
from torch import nn

from foveate.ops.errors import InputError
from foveate.papers.harness.paper import Trial
from foveate.papers.tasks import Classification, Labelled, load
from foveate.papers.tasks.classification import FIRST, PADDING, SEPARATOR, SPECIAL, UNKNOWN, words
from foveate.papers.tasks.labelled import Example
from foveate.papers.training import Regime, evaluate, train
from foveate.papers.training.classify import Classifier, encoder_classifier, trained_on_texts
from foveate.papers.training.language import Sizes

PAIRS = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
FOLDER = {
    "train.tsv": "So kind!\t0\tid1\nHm.\t2\tid2\nTwo of them\t1,2\tid3\n",
    "dev.tsv": 'A "quote\t1\tid4\n',
    "test.tsv": "Fine\t2\tid5\n",
    "labels.txt": "admiration\nanger\nneutral\n",
}


def folder(tmp_path, files, packed=False):
    for name, text in files.items():
        if packed:
            (tmp_path / f"{name}.xz").write_bytes(lzma.compress(text.encode()))
        else:
            (tmp_path / name).write_text(text)
    return tmp_path


# -- reading ---------------------------------------------------------------------------------------
def test_banking77_is_shipped_with_its_released_counts():
    data = load()
    assert len(data.train) + len(data.validation) == 10_003
    assert 900 < len(data.validation) < 1100
    assert len(data.test) == 3080
    assert len(data.labels) == 77
    counts = torch.tensor([example.label for example in data.test]).bincount()
    assert counts.tolist() == [40] * 77
    asked = Example(("I am still waiting on my card?",), data.labels.index("card_arrival"))
    assert asked in data.train + data.validation


def test_no_text_is_in_two_splits_that_are_cut_here():
    data = load()
    assert not {e.texts for e in data.train} & {e.texts for e in data.validation}


@pytest.mark.parametrize("packed", [False, True])
def test_goemotions_rows_with_one_label(tmp_path, packed):
    data = load("goemotions", folder(tmp_path, FOLDER, packed))
    assert data.labels == ("admiration", "anger", "neutral")
    assert data.train == (Example(("So kind!",), 0), Example(("Hm.",), 2))
    assert data.validation == (Example(('A "quote',), 1),)
    grouped = load("sentiment", folder(tmp_path, FOLDER, packed))
    found = [grouped.labels[e.label] for e in grouped.train + grouped.validation + grouped.test]
    assert found == ["positive", "neutral", "negative", "neutral"]


def test_pairs(tmp_path):
    files = {
        "train.tsv": PAIRS + '1\tA "dog\tA cat\t1.5\tCONTRADICTION\n',
        "trial.tsv": PAIRS + "2\tA\tB\t4\tENTAILMENT\n",
        "test.tsv": PAIRS + "3\tC\tD\t3\tNEUTRAL\n",
    }
    data = load("sick", folder(tmp_path, files))
    assert data.train == (Example(('A "dog', "A cat"), 0),)
    assert (data.validation[0].label, data.test[0].label) == (2, 1)
    head = "label\tpremise\thypothesis\n"
    lines = "".join(f"neutral\tpremise {i}\tso\n" for i in range(200))
    files = {"snli_dev.tsv": head + lines, "snli_test.tsv": head + "entailment\ta\tb\n"}
    data = load("snli", folder(tmp_path, files))
    assert len(data.train) + len(data.validation) == 200
    assert 8 < len(data.validation) < 40
    assert data.test == (Example(("a", "b"), 2),)


def test_what_reading_refuses(tmp_path):
    with pytest.raises(InputError, match="did you mean 'sick'"):
        load("sik")
    with pytest.raises(InputError, match="isn't shipped.*trial.tsv"):
        load("sick")
    with pytest.raises(InputError, match=r"holds no train.tsv or train.tsv.xz"):
        load("sick", tmp_path)
    (tmp_path / "train.tsv.xz").write_bytes(b"no xz")
    with pytest.raises(InputError, match=r"train.tsv.xz can't be read"):
        load("goemotions", tmp_path)
    other = folder(tmp_path, dict.fromkeys(("train.csv", "test.csv"), "a,b\n1,2\n"))
    with pytest.raises(InputError, match="doesn't hold banking77 as it was released"):
        load("banking77", other)


def test_a_label_that_is_unknown_is_refused_by_name(tmp_path):
    head = "text,category\n"
    files = {"train.csv": head + "a,one\nb,one\n", "test.csv": head + "c,two\n"}
    with pytest.raises(InputError, match="doesn't hold banking77 as it was released"):
        load("banking77", folder(tmp_path, files))
    head = "label\tpremise\thypothesis\n"
    files = {"snli_dev.tsv": head + "-\ta\tb\n", "snli_test.tsv": head + "neutral\ta\tb\n"}
    with pytest.raises(InputError, match="doesn't hold snli as it was released"):
        load("snli", folder(tmp_path, files))


def test_a_line_separator_within_a_text_ends_no_row(tmp_path):
    files = FOLDER | {"train.tsv": "So\u2028kind\x85!\t0\tid1\n"}
    data = load("goemotions", folder(tmp_path, files))
    assert data.train == (Example(("So\u2028kind\x85!",), 0),)


# -- the task --------------------------------------------------------------------------------------
def small(**options):
    rows = [Example((f"Word{i % 3} says: a{i}!",), i % 2) for i in range(10)]
    data = Labelled("small", ("even", "odd"), tuple(rows[:6]), tuple(rows[6:8]), tuple(rows[8:]))
    return Classification(data, **options)


def test_tokens_by_hand():
    task = small()
    assert words("It's HERE, ok?") == ["it", "'", "s", "here", ",", "ok", "?"]
    known = ["!", ":", "says", "word0", "word1", "word2"]  # found twice in training, sorted
    assert task.vocab == SPECIAL + len(known)
    ids = {word: SPECIAL + i for i, word in enumerate(known)}
    expected = [FIRST, ids["word1"], ids["says"], ids[":"], UNKNOWN, ids["!"]]
    assert task.ids(["word1 SAYS: a7!"]) == expected
    as_bytes = small(tokens="bytes", length=9)
    assert as_bytes.vocab == 260
    assert as_bytes.ids(["abc"]) == [FIRST, *(SPECIAL + byte for byte in b"abc")]
    cut = [FIRST, *(SPECIAL + b for b in b"abcd"), SEPARATOR, *(SPECIAL + b for b in b"xyz")]
    assert as_bytes.ids(["abcdefgh", "xyz"]) == cut


def test_training_goes_through_all_texts_in_turn():
    task = small(tokens="bytes")
    rows = [row.tolist() for n in range(3) for row in task.batch(5, n, 4).inputs]
    stripped = [tuple(t for t in row if t != PADDING) for row in rows]
    texts = [tuple(task.ids(example.texts)) for example in task.data.train]
    assert sorted(stripped[:6]) == sorted(stripped[6:]) == sorted(texts)
    assert stripped[:6] != stripped[6:]
    again = task.batch(5, 1, 4)
    assert torch.equal(again.inputs, task.batch(5, 1, 4).inputs)
    assert again.targets.shape == (4, 1)
    labels = {tuple(task.ids(example.texts)): example.label for example in task.data.train}
    assert again.targets[:, 0].tolist() == [labels[row] for row in stripped[4:8]]


def test_held_out_texts():
    task = Classification(load(), held=50)
    whole = torch.cat([batch.targets for batch in task.held_out("test", 64)])
    parts = torch.cat([batch.targets for batch in task.held_out("test", 7)])
    assert torch.equal(whole, parts)
    assert len(whole) == 50
    assert whole.unique().numel() > 30  # spread over a file that is sorted by label
    assert "3080" in task.describe()
    assert task.data.sha256[:12] in task.describe()


def test_what_the_task_refuses():
    with pytest.raises(InputError, match="tokens='wrods'. is unknown; did you mean 'words'"):
        small(tokens="wrods")
    with pytest.raises(InputError, match="length must be 4 or more"):
        small(length=1)


# -- training --------------------------------------------------------------------------------------
def test_any_classifier_of_transformers_form_is_told_the_padding():
    class Toy(nn.Module):
        def forward(self, input_ids, attention_mask):
            self.seen = attention_mask
            self.logits = torch.zeros(2, 3)
            return self

    toy = Toy()
    out = Classifier(toy)(torch.tensor([[5, 6, PADDING], [5, 6, 7]]))
    assert toy.seen.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert out.logits.shape == (2, 1, 3)


def test_a_small_encoder_learns_real_intents():
    """Ten intents that chance gets right in one of ten."""
    pytest.importorskip("transformers")
    data = load()
    few = [tuple(e for e in part if e.label < 10) for part in (data.train, data.validation)]
    test = tuple(e for e in data.test if e.label < 10)
    task = Classification(Labelled("ten", data.labels[:10], *few, test), length=32)
    model = encoder_classifier(Sizes(1, 32, 4, vocab=task.vocab), task.classes)
    done = train(model, task, Regime(steps=120, batch=32, lr=5e-3, every=60))
    assert done.steps == 120
    assert evaluate(model, task, "test", 64)["accuracy"] > 0.6


def test_a_trial_on_texts():
    pytest.importorskip("transformers")
    trial = Trial("arm", 0, quick=True, tuned=1e-3)
    model, found = trained_on_texts(
        trial,
        small(),
        lambda task: encoder_classifier(
            Sizes(1, 16, 2, vocab=task.vocab), task.classes, pooling="cls"
        ),
        steps=100,
    )
    assert set(found) == {"accuracy", "loss", "validation", "parameters", "curve"}
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(found["curve"]) == 2


@pytest.mark.parametrize(
    "composition",
    [
        {"attention": "flowformer"},
        {"attention": "flowformer", "projection": "gqa(kv_heads=2)", "position": "learned"},
        {"mixer": "gaam"},
        {"mixer": "gaam(axis='tokens', heads=2)"},
    ],
    ids=str,
)
def test_other_formulas_learn_real_intents_both_ways(composition):
    """In padded batches of questions of ten intents; by chance one of ten is right."""
    pytest.importorskip("transformers")
    data = load()
    few = [tuple(e for e in part if e.label < 10) for part in (data.train, data.validation)]
    task = Classification(Labelled("ten", data.labels[:10], *few, few[1]), length=32)
    model = encoder_classifier(Sizes(1, 32, 4, vocab=task.vocab), task.classes, **composition)
    train(model, task, Regime(steps=60, batch=32, lr=5e-3, every=60))
    assert evaluate(model, task, "test", 64)["accuracy"] > 0.4
