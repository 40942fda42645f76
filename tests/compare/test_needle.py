"""The prompts: exact lengths, keys where they should be, and only real text scored."""

import pytest
import torch

from foveate.compare.needle import PromptMaker, found, tokenise
from foveate.ops.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def text(prose):
    return prose.read_text()


def maker(tokenizer, text, **changes):
    settings = {"seed": "s", "windows": 6, "depths": (0.1, 0.5, 0.9)} | changes
    return PromptMaker(tokenizer, tokenise(tokenizer, text), **settings)


@pytest.mark.parametrize("length", [200, 333, 512])
def test_lengths_are_exact_and_the_key_is_in_the_prompt_once_told(tokenizer, text, length):
    prompts = maker(tokenizer, text).batch(length, 1, 3)
    assert prompts.ids.shape == prompts.scored.shape == (3, length)
    assert prompts.depths == (0.5, 0.9, 0.1)
    for row, key in zip(prompts.ids, prompts.keys):
        shown = tokenizer.decode(row.tolist())
        assert shown.count(key) == 2
        assert shown.endswith("The pass key is")
        assert key not in text


def test_scored_tokens_are_the_real_text(tokenizer, text):
    prompts = maker(tokenizer, text).batch(400, 0, 3)
    for row, scored in zip(prompts.ids, prompts.scored):
        real = tokenizer.decode(row[scored].tolist())
        assert "pass key" not in real
        assert 250 < len(real) < 400
    plain = maker(tokenizer, text, depths=()).batch(400, 0, 1)
    assert plain.keys == ()
    assert int(plain.scored.sum()) == 399
    assert tokenizer.decode(plain.ids[0].tolist()) in text


def test_the_key_is_where_it_was_asked_for_at_a_sentence_end(tokenizer, text):
    for number, depth in enumerate((0.1, 0.5, 0.9)):
        prompts = maker(tokenizer, text).batch(512, number, 1)
        shown = tokenizer.decode(prompts.ids[0].tolist())
        at = shown.index("\n\nThe pass key is")
        assert abs(at / 512 - depth) < 0.2
        assert shown[:at].rstrip(" ").endswith((".", "\n"))


def test_prompts_are_the_same_each_time_and_differ_by_window_length_and_text(tokenizer, text):
    one, again = (maker(tokenizer, text).batch(300, 0, 1) for _ in range(2))
    assert torch.equal(one.ids, again.ids)
    keys = {maker(tokenizer, text).batch(n, w, 1).keys for n in (300, 301) for w in range(6)}
    keys |= {maker(tokenizer, text, seed="other").batch(300, 0, 1).keys}
    assert len(keys) == 13


def test_windows_spread_over_the_whole_text(tokenizer, text):
    made = maker(tokenizer, text, depths=(), windows=4)
    first, last = made.batch(300, 0, 1), made.batch(300, 3, 1)
    assert tokenizer.decode(first.ids[0].tolist()) == text[:300]
    assert tokenizer.decode(last.ids[0].tolist()) == text[-300:]


def test_too_short_a_length_or_text_is_refused(tokenizer, text):
    with pytest.raises(InputError, match="no room for text"):
        maker(tokenizer, text).batch(60, 0, 1)
    with pytest.raises(InputError, match="too few for a length of 512"):
        maker(tokenizer, text[:300]).batch(512, 0, 1)


def test_a_bos_token_stays_in_front_and_unscored(tokenizer, text):
    class Bos:
        def __call__(self, words, add_special_tokens=True, **kw):
            out = tokenizer(words, add_special_tokens=False, **kw)
            if add_special_tokens:
                out["input_ids"] = [255, *out["input_ids"]]
            return out

        decode = staticmethod(tokenizer.decode)

    prompts = maker(Bos(), text).batch(300, 0, 1)
    assert prompts.ids.shape == (1, 300)
    assert prompts.ids[0, 0] == 255
    assert not prompts.scored[0, 0]
    assert int((prompts.ids == 255).sum()) == 1


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 48213.", True), ("it is 48,213!", True), ("48 213", True), ("4821", False), ("", False),
     ("48214 48113", False)],
)  # fmt: skip
def test_an_answer_is_right_if_it_has_the_key(answer, right):
    assert found(answer, "48213") is right
