"""Texts to sub-words for an encoder, and to the bag of whole words that ColBERTer keeps of them.

Words are what BERT's pre-tokeniser makes: it splits at blanks, and each punctuation mark is a word
of its own. They are lower-cased and stemmed by Porter's rules, so that "words" and "word" are one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from foveate.methods.colberter.words import Words, sub_words, whole_words, word_id
from foveate.ops.errors import InputError, MissingPackageError


@lru_cache(maxsize=1)
def porter() -> Callable[[str], str]:
    """Lower-cases a word and stems it; words that were met before are remembered.

    Raises:
        MissingPackageError: snowballstemmer isn't installed.
    """
    if importlib.util.find_spec("snowballstemmer") is None:
        raise MissingPackageError(
            "Stemming words needs snowballstemmer: pip install 'foveate[retrieve]'"
        )
    import snowballstemmer

    stem = snowballstemmer.stemmer("porter").stemWord
    return lru_cache(maxsize=1 << 18)(lambda word: stem(word.lower()))


@dataclass(frozen=True)
class Tokens:
    """One text: the encoder's input and its bag.

    Attributes:
        ids: of the encoder's vocabulary, special tokens included.
        spans: (first character, one past the last) of each; (n, n) for special tokens.
        words: the bag.
        cut: whether the text went on behind the last token.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    words: Words
    cut: bool = False


class WordTokenizer:
    """Tokenises into sub-words and words.

    Args:
        tokenizer: of the encoder, one of transformers' fast ones.
        length: the most sub-words of a text, special tokens included.
        stem: reduce words to stems; else lower-case them only.
        whole: bags of whole words; else every sub-word is a word of its own.
        numbered: as in `whole_words`.

    Raises:
        InputError: the tokenizer isn't a fast one, or length has no room for a word.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        length: int = 256,
        stem: bool = True,
        whole: bool = True,
        numbered: bool = False,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "Whole words need to know where sub-words stand in the text: give a fast tokenizer "
                "of transformers (a model folder with tokenizer.json)."
            )
        special = tokenizer.num_special_tokens_to_add()
        if isinstance(length, bool) or not isinstance(length, int) or length <= special:
            raise InputError(f"length={length!r}: expected an integer above {special}.")
        self.tokenizer, self.length, self.stem = tokenizer, length, stem
        self.whole, self.numbered = whole, numbered

    def names(self, text: str) -> dict[int, str]:
        """By id each word as it first stands in a text; a sub-word as the vocabulary has it."""
        from tokenizers.pre_tokenizers import BertPreTokenizer

        if not self.whole:
            ids = self([text])[0].words.ids
            return dict(zip(ids, self.tokenizer.convert_ids_to_tokens(list(ids))))
        normalise = porter() if self.stem else str.lower
        found: dict[int, str] = {}
        for word, _ in BertPreTokenizer().pre_tokenize_str(text):
            found.setdefault(word_id(normalise(word)), word)
        return found

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise texts; a longer one is cut to `length`, its bag too."""
        from tokenizers.pre_tokenizers import BertPreTokenizer

        if not texts:
            return []
        split = BertPreTokenizer()
        normalise = porter() if self.stem else str.lower
        made = self.tokenizer(
            list(texts), truncation=True, max_length=self.length, return_offsets_mapping=True,
            return_special_tokens_mask=True, return_attention_mask=False, verbose=False,
            return_overflowing_tokens=False,
        )  # fmt: skip
        out = []
        for i, text in enumerate(texts):
            ids, special = made["input_ids"][i], made["special_tokens_mask"][i]
            spans = [tuple(span) for span in made["offset_mapping"][i]]
            words = split.pre_tokenize_str(text)
            if self.whole:
                found = whole_words(
                    [None if skip else span for span, skip in zip(spans, special)], words,
                    normalise, numbered=self.numbered,
                )  # fmt: skip
            else:
                found = sub_words(ids, [bool(s) for s in special])
            last = max((span[1] for span, skip in zip(spans, special) if not skip), default=0)
            cut = bool(words) and last < words[-1][1][1]
            out.append(Tokens(tuple(ids), tuple(spans), found, cut))
        return out
