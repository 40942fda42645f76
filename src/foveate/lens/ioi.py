"""Indirect object identification: who was named, but doesn't act.

"When Mary and John went to the store, John gave a drink to" -> Mary. Two names are introduced in
either order, one of them (S) acts, and the answer is the other (IO). Wang et al. 2022, arXiv
2211.00593.
"""

from __future__ import annotations

import random
from typing import Any

from foveate.lens.prompts import Prompts, tokenised, words_of_one_token

NAMES = (
    "Mary", "John", "Tom", "James", "Anna", "Mark", "Paul", "Sarah", "Peter", "David", "Michael",
    "Robert", "Laura", "Alice", "Emma", "Jack", "Henry", "George", "Kate", "Simon", "Daniel",
    "Lucy", "Martin", "Jane", "William", "Charles", "Thomas", "Susan", "Frank", "Rachel",
)  # fmt: skip
TEMPLATES = (
    "When {a} and {b} went to the store, {s} gave a drink to",
    "After {a} and {b} had lunch at the restaurant, {s} gave the money to",
    "While {a} and {b} were working at the office, {s} handed a letter to",
    "Then {a} and {b} had a long argument, and afterwards {s} said to",
)


def ioi(tokenizer: Any, count: int, seed: int = 0) -> list[Prompts]:
    """About `count` prompts, as many of each template and of both orders of the names.

    Args:
        tokenizer: of transformers; its names must be single tokens.
        count: of prompts.
        seed: of the names.

    Raises:
        InputError: the tokenizer cuts nearly all names.
    """
    names = words_of_one_token(tokenizer, NAMES, least=6)
    drawn = random.Random(seed)
    each = max(1, count // len(TEMPLATES))
    batches = []
    for template in TEMPLATES:
        texts = []
        for number in range(each):
            subject, other = drawn.sample(names, 2)
            a, b = (subject, other) if number % 2 else (other, subject)
            texts.append((template.format(a=a, b=b, s=subject), other, (subject,)))
        batches.append(tokenised(tokenizer, texts))
    return batches
