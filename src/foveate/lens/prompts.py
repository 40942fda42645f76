"""Prompts whose answer is one of several words that were named, and how a model answers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.lens.interventions import Edit, Path, edited
from foveate.lens.reading import places
from foveate.lens.watching import Watch, watched
from foveate.ops.errors import InputError


class Prompts(NamedTuple):
    """Prompts of one length. The last token is where the model must answer.

    ids: (B, L); answer: (B,), the right token; others: (B, k), wrong ones that were named, too;
    answer_at: (B,), where the answer is named; others_at: (B, m), every place of
    the others, in order.
    """

    ids: Tensor
    answer: Tensor
    others: Tensor
    answer_at: Tensor
    others_at: Tensor

    @property
    def listed_at(self) -> Tensor:
        """(B, k + 1): where each of the words named is named first, in that order."""
        first = self.others_at[:, : self.others.shape[1]]
        return torch.cat((self.answer_at[:, None], first), 1).sort(1).values

    def parts(self, size: int) -> Iterator[Prompts]:
        """The same, `size` at a time."""
        for at in range(0, len(self.ids), size):
            yield Prompts(*(x[at : at + size] for x in self))


class Answers(NamedTuple):
    """How a model answers.

    accuracy: share of prompts whose answer has the highest logit of all words named; margin: mean
    logit of the answer above the highest of the others; looks: by (layer, head), the mean attention
    from the last token to the answer, and to one of the others (wherever it is named).
    """

    accuracy: float
    margin: float
    looks: dict[tuple[int, int], tuple[float, float]]

    def inhibition(self, head: tuple[int, int]) -> float:
        """Attention to the answer minus that to one other: the others are told not to be copied."""
        to_answer, to_others = self.looks[head]
        return to_answer - to_others


def words_of_one_token(tokenizer: Any, words: Sequence[str], least: int) -> list[str]:
    """Those words that are a single token behind a space.

    Raises:
        InputError: fewer than `least` are.
    """
    found = [w for w in words if len(_bare(tokenizer, " " + w)) == 1]
    if len(found) < least:
        raise InputError(
            f"Only {len(found)} of {len(words)} words are one token of this tokenizer; the prompts "
            f"need {least}. Its alphabet is another one than English's, or it works by letters."
        )
    return found


def _bare(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenised(tokenizer: Any, texts: Sequence[tuple[str, str, Sequence[str]]]) -> Prompts:
    """Prompts from (text, answer, others), words without their space.

    Raises:
        InputError: texts of different lengths, or a word isn't found in its text.
    """
    ids = [list(tokenizer(text)["input_ids"]) for text, _, _ in texts]
    if len({len(one) for one in ids}) != 1:
        raise InputError("Prompts of one batch must have as many tokens; these differ.")
    rows = torch.tensor(ids)
    answer = torch.tensor([_bare(tokenizer, " " + a)[0] for _, a, _ in texts])
    others = torch.tensor([[_bare(tokenizer, " " + w)[0] for w in ws] for _, _, ws in texts])
    named = (rows == answer[:, None]).sum(1)
    again = (rows[:, :, None] == others[:, None]).any(2)
    if bool((named != 1).any()) or len(set(again.sum(1).tolist())) != 1:
        raise InputError("An answer must be named once, the others equally often in every prompt.")
    answer_at = (rows == answer[:, None]).int().argmax(1)
    return Prompts(rows, answer, others, answer_at, again.nonzero()[:, 1].view(len(rows), -1))


def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, vocab) behind the last token, without those of all others."""
    if not hasattr(model, "config"):
        logits: Tensor = model(ids)
        return logits[:, -1]
    lm: Any = model
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    return lm.get_output_embeddings()(hidden).float()


@torch.no_grad()
def ask(
    model: nn.Module,
    prompts: Sequence[Prompts],
    *edits: Edit | Path,
    heads: Sequence[tuple[int, int]] | None = (),
    size: int = 32,
) -> Answers:
    """How a model answers, with some of its heads' writing changed.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: batches, each of one length.
        edits: as `edited` takes them.
        heads: whose attention is measured; None is all, empty none.
        size: prompts at a time.
    """
    if not prompts:
        raise InputError("ask: there are no prompts.")
    device = next(model.parameters()).device
    right = margin = count = 0.0
    sums: dict[tuple[int, int], tuple[float, float]] = {}
    if heads is None:
        heads = [(p.layer, h) for p in places(model) for h in range(p.heads)]
    for part in (part for batch in prompts for part in batch.parts(size)):
        ids = part.ids.to(device)
        with edited(model, *edits):
            if heads:
                with watched(model) as watch:
                    logits = last_logits(model, ids).cpu()
                    _add(sums, _looks(watch, part, heads))
            else:
                logits = last_logits(model, ids).cpu()
        above = logits.gather(1, part.answer[:, None])[:, 0] - logits.gather(1, part.others).amax(1)
        right += float((above > 0).sum())
        margin += float(above.sum())
        count += len(ids)
    looks = {head: (a / count, b / count) for head, (a, b) in sums.items()}
    return Answers(right / count, margin / count, looks)


def _looks(
    watch: Watch, part: Prompts, heads: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], tuple[float, float]]:
    """Attention from the last token, summed over prompts."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for layer in dict.fromkeys(layer for layer, _ in heads):
        end = torch.tensor([part.ids.shape[1] - 1])
        seen = watch.weights(layer, end.to(watch.seen[layer][0].device))[:, :, 0].cpu()
        index = part.answer_at[:, None, None].expand(-1, seen.shape[1], 1)
        to_answer = seen.gather(2, index)[..., 0].sum(0)
        index = part.others_at[:, None].expand(-1, seen.shape[1], -1)
        to_others = seen.gather(2, index).sum((0, 2)) / part.others.shape[1]
        for at, head in heads:
            if at == layer:
                found[at, head] = (float(to_answer[head]), float(to_others[head]))
    return found


def _add(
    sums: dict[tuple[int, int], tuple[float, float]],
    more: dict[tuple[int, int], tuple[float, float]],
) -> None:
    for head, (a, b) in more.items():
        before = sums.get(head, (0.0, 0.0))
        sums[head] = (before[0] + a, before[1] + b)


def movers(answers: Answers, count: int) -> list[tuple[int, int]]:
    """The heads that look most at the answer and least at another, behind the first layer."""
    behind = [head for head in answers.looks if head[0] > 0]
    return sorted(behind, key=lambda head: -answers.inhibition(head))[:count]


def best_factor(
    score: Callable[[float], float], factors: Sequence[float]
) -> tuple[float, dict[float, float]]:
    """The factor with the highest score, the one nearest to 1 of equals; and all scores."""
    found = {factor: score(factor) for factor in factors}
    return max(found, key=lambda f: (found[f], -abs(f - 1))), found
