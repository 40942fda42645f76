"""The Laundry List: several things are needed, all but one were bought, and which is left?

A list of N objects, all but one of them again (in the list's order, or shuffled), and the model
must name the one that is left. Heads tell a later one which of the listed words not to copy, along
few directions, so that it gets crowded as N grows. Merullo et al. 2024, arXiv 2406.09519, whose own
wording isn't known here.
"""

from __future__ import annotations

import random
from typing import Any

from foveate.lens.prompts import Prompts, tokenised, words_of_one_token
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

OBJECTS = (
    "milk", "bread", "cheese", "rice", "soap", "coffee", "sugar", "salt", "butter", "paper",
    "water", "meat", "fish", "fruit", "wine", "beer", "oil", "corn", "tea", "honey", "juice",
    "chicken", "glass", "wood", "cotton", "silk", "gold", "iron", "sand", "steel", "wool", "ink",
)  # fmt: skip
SPLITS = ("train", "test")


def laundry(
    tokenizer: Any,
    count: int,
    items: int,
    *,
    seed: int = 0,
    split: str = "train",
    shuffled: bool = True,
) -> Prompts:
    """Prompts of N items.

    Args:
        tokenizer: of transformers.
        count: of prompts.
        items: N, 2 to 20 (the tokenizer must know as many objects as single tokens).
        seed: of the objects.
        split: "train" or "test": other draws, of which none is in both.
        shuffled: the ones that were bought are told in random order, else in the list's.

    Raises:
        InputError: N out of its range, an unknown split, or a tokenizer that cuts the objects.
    """
    whole("laundry", "count", count, least=1)
    whole("laundry", "items", items, least=2)
    if items > 20:
        raise InputError(f"laundry(items={items}): expected 2 to 20 objects.")
    if split not in SPLITS:
        raise InputError(f"laundry(split={split!r}): expected one of {', '.join(SPLITS)}.")
    objects = words_of_one_token(tokenizer, OBJECTS, least=items)
    drawn = random.Random(f"{seed}:{split}:{items}")
    texts: list[tuple[str, str, tuple[str, ...]]] = []
    while len(texts) < count:
        listed = drawn.sample(objects, items)
        # Which split a list is of is decided by the list alone, so that the two share none.
        mine = SPLITS[random.Random(" ".join(listed)).randrange(2)]
        left = drawn.randrange(items)
        if mine != split:
            continue
        bought = listed[:left] + listed[left + 1 :]
        told = drawn.sample(bought, len(bought)) if shuffled else bought
        text = (
            f"Mary needs to buy {_series(listed)}. She has already bought {_series(told)}. "
            "The only thing that she still needs to buy is"
        )
        texts.append((text, listed[left], tuple(bought)))
    return tokenised(tokenizer, texts)


def _series(words: list[str]) -> str:
    """Words as "a, b and c"."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"
