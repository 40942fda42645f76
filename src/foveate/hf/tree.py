"""Hierarchical attention in encoders that have been trained already, without training them.

All weights stay; in some layers softmax makes room for the hierarchical attention closest to it on
a tree of the tokens (`foveate.methods.hsa`), here of sentences. Which layers: late ones, every
other one, as in the paper (7, 9 and 11 of RoBERTa's 12): early layers are sensitive, and the
softmax layer in between mends what the one before it has tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hf.assignment import Assignment
from foveate.hf.errors import ModelError
from foveate.hf.places import self_stacks, sites
from foveate.hf.using import Use, use
from foveate.hf.watch_tree import TreeOf
from foveate.methods import spec
from foveate.methods.hsa import HSA
from foveate.ops.errors import InputError
from foveate.parts.tree import Tree


@dataclass(frozen=True)
class SentenceTree:
    """Documents of sentences of tokens, read off input ids.

    A sentence ends behind a run of `ends`, unless it has fewer than `least` tokens, which then
    belong to the next one ("e.g.", "3.5"). Special tokens ([CLS], [SEP]) hang on the root.

    Attributes:
        ends: ids of what ends a sentence.
        special: ids of special tokens.
        least: tokens of a sentence.
        most: tokens of a sentence, where a longer one is cut (a table, a text without marks).
    """

    ends: tuple[int, ...]
    special: tuple[int, ...] = ()
    least: int = 4
    most: int = 64

    @staticmethod
    def of(tokenizer: Any, marks: Sequence[str] = (".", "!", "?"), **sizes: int) -> SentenceTree:
        """For a transformers tokenizer that has a token for each mark.

        Raises:
            InputError: it has none of them.
        """
        unknown = getattr(tokenizer, "unk_token_id", None)
        ids = [tokenizer.convert_tokens_to_ids(mark) for mark in marks]
        ends = tuple(i for i in ids if i is not None and i != unknown)
        if not ends:
            raise InputError(f"SentenceTree: the tokenizer has no token for any of {marks}.")
        # What stands for a word, an unknown or a masked one, belongs to its sentence.
        words = {unknown, getattr(tokenizer, "mask_token_id", None)}
        special = tuple(i for i in tokenizer.all_special_ids if i not in words)
        return SentenceTree(ends, special, **sizes)

    def __call__(self, input_ids: Tensor, real: Tensor) -> Tree:
        """(B, L) ids and bool (B, L) -> the forest of the real tokens."""
        device = input_ids.device
        special = torch.isin(input_ids, torch.tensor(self.special, device=device))
        marks = torch.isin(input_ids, torch.tensor(self.ends, device=device))
        numbers = [self._numbered(m, s) for m, s in zip(marks.tolist(), (special | ~real).tolist())]
        return Tree.segments(torch.tensor(numbers, device=device), real=real)

    def _numbered(self, marks: list[bool], outside: list[bool]) -> list[int]:
        """The sentence of each token, -1 for those outside any."""
        found, number, size = [], 0, 0
        for at, mark in enumerate(marks):
            if outside[at]:
                found.append(-1)
                continue
            found.append(number)
            size += 1
            over = mark and (at + 1 == len(marks) or not marks[at + 1]) and size >= self.least
            if over or size >= self.most:
                number, size = number + 1, 0
        return found


def late_alternating(layers: int) -> tuple[int, ...]:
    """The layers of the second half that the paper replaces: the last, and every second before."""
    return tuple(range(layers - 1, (layers - 1) // 2, -2))[::-1] or (0,)


def use_on_tree(
    model: nn.Module,
    tree: Tree | TreeOf,
    layers: Iterable[int] | None = None,
    method: str | HSA = "hsa",
    *,
    backend: str = "auto",
    stats: Callable[..., None] | None = None,
) -> Use:
    """Run some layers of an encoder by hierarchical attention on a tree, until undone.

        sentences = SentenceTree.of(tokenizer)
        with foveate.hf.use_on_tree(model, sentences):
            model(**tokenizer(documents, padding=True, return_tensors="pt"))

    Args:
        model: a transformers encoder.
        tree: of all inputs (such as `Tree.patches` for images), or what makes one from input ids.
        layers: their numbers; None is `late_alternating`.
        method: a form of "hsa".
        backend, stats: as in `foveate.use`.

    Raises:
        ModelError: the model has no single stack of self-attention, or not these layers.
    """
    found = sites(model)
    stacks = self_stacks(found)
    if len(stacks) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(stacks)} stacks of layers; give the one that is to "
            "run on a tree, such as model.encoder."
        )
    count = 1 + max(site.layer for site in found.values() if not site.cross)
    chosen = late_alternating(count) if layers is None else tuple(layers)
    name = method if isinstance(method, str) else spec(method)
    plan = Assignment(dict.fromkeys(chosen, name))
    return use(model, plan, backend=backend, stats=stats, tree=tree)
