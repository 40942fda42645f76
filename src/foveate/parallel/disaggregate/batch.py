"""Sequences of one micro-batch: they join with their prompt, decode together, and leave.

A row's tokens stand at the end of the caches' common length, with padding in front, so that a step
appends one token to all rows. A prompt runs on its own, in chunks of at most `rows` tokens, while
the micro-batch's other rows wait; then its cache is put beside theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from foveate.ops.errors import InputError
from foveate.parts.cache import Field
from foveate.parts.kv_cache import TokenCache


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    Attributes:
        id: its name, unique among the requests.
        ids: token ids of the prompt, at least one.
        new: most tokens to produce; fewer if an end token comes.
        after: the pass from which it may join, counted from 0; requests are taken in order.

    Raises:
        InputError: an empty prompt, or a number that is too small.
    """

    id: str
    ids: tuple[int, ...]
    new: int
    after: int = 0

    def __post_init__(self) -> None:
        if not self.ids or self.new < 1 or self.after < 0:
            raise InputError(
                f"Request({self.id!r}): expected at least one token, new at least 1 and after at "
                f"least 0, got {len(self.ids)} tokens, new={self.new}, after={self.after}."
            )


@dataclass(eq=False)
class Running:
    """A request that has joined: what it produced, and its logits if they are kept."""

    request: Request
    produced: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    read: int = 0  # tokens of the prompt that have been through the model
    caches: list[TokenCache] = field(default_factory=list)  # its own, until it decodes


@dataclass
class Step:
    """What one pass through the layers works on.

    ids (B, L) new tokens; attention_mask (B, past + L) bool or None; the layers' caches; who
    prefills, None when all rows decode.
    """

    ids: Tensor
    attention_mask: Tensor | None
    past: int
    caches: list[TokenCache]
    prompt: Running | None


class MicroBatch:
    """The rows that go through the layers together.

    Args:
        kinds: each layer's cache fields.
        limit: most rows, and most prompt tokens in a pass.
        device: where ids are made.
    """

    def __init__(self, kinds: Sequence[Sequence[Field]], limit: int, device: torch.device) -> None:
        self.kinds = list(kinds)
        self.limit, self.device = limit, device
        self.rows: list[Running] = []
        self.waiting: deque[Running] = deque()
        self.caches: list[TokenCache] = []
        self.lengths: list[int] = []  # real tokens of each row in the caches

    @property
    def load(self) -> int:
        """Sequences that it has, decoding or not yet."""
        return len(self.rows) + len(self.waiting)

    def join(self, request: Request) -> None:
        """Take a request in; its prompt runs from the next pass on."""
        caches = [TokenCache(kind) for kind in self.kinds]
        self.waiting.append(Running(request, caches=caches))

    def next(self) -> Step | None:
        """What the next pass does: a prompt first, else one token for all rows; None if nothing."""
        if self.waiting:
            one = self.waiting[0]
            chunk = one.request.ids[one.read : one.read + self.limit]
            ids = torch.tensor([chunk], device=self.device)
            return Step(ids, None, one.read, one.caches, one)
        if not self.rows:
            return None
        ids = torch.tensor([[row.produced[-1]] for row in self.rows], device=self.device)
        past = len(self.caches[0])
        first = past - torch.tensor(self.lengths, device=self.device)
        real = torch.arange(past + 1, device=self.device) >= first[:, None]
        return Step(ids, real, past, self.caches, None)

    def took(self, step: Step, logits: Tensor, end: int | None, keep: bool) -> list[Running]:
        """Take in what a pass gave, logits (B, vocab) of its last tokens; who is finished."""
        if step.prompt is None:
            self.lengths = [n + 1 for n in self.lengths]
            for row, found in zip(self.rows, logits, strict=True):
                _choose(row, found, keep)
            return self._leave(end)
        one = step.prompt
        one.read += step.ids.shape[1]
        if one.read < len(one.request.ids):
            return []
        self.waiting.popleft()
        _choose(one, logits[0], keep)
        if _finished(one, end):
            return [one]
        together = zip(self.caches, one.caches, strict=True) if self.caches else None
        self.caches = one.caches if together is None else [beside(*both) for both in together]
        self.rows.append(one)
        self.lengths.append(one.read)
        one.caches = []
        return []

    def _leave(self, end: int | None) -> list[Running]:
        """Let finished rows go, and with them padding that nobody needs any more."""
        gone = [row for row in self.rows if _finished(row, end)]
        if not gone:
            return []
        keep = [i for i, row in enumerate(self.rows) if row not in gone]
        self.rows = [self.rows[i] for i in keep]
        self.lengths = [self.lengths[i] for i in keep]
        if not keep:
            self.caches = []
            return gone
        padding = torch.arange(len(self.caches[0]) - max(self.lengths), device=self.device)
        for cache in self.caches:
            cache.reorder(torch.tensor(keep, device=self.device))
            cache.evict(padding)
        return gone

    def bytes(self) -> int:
        """Bytes of all that is cached."""
        own = [cache for one in self.waiting for cache in one.caches]
        return sum(cache.bytes() for cache in (*self.caches, *own))


def beside(held: TokenCache, new: TokenCache) -> TokenCache:
    """Rows of both caches in one, the shorter ones with padding in front."""
    length = max(len(held), len(new))

    def padded(cache: TokenCache) -> dict[str, Tensor]:
        front = length - len(cache)
        return {name: functional.pad(x, (0, 0, front, 0)) for name, x in cache.entries.items()}

    first, second = padded(held), padded(new)
    made = TokenCache(held.fields, capacity=length + 16)
    made.append({name: torch.cat((x, second[name])) for name, x in first.items()})
    return made


def _choose(row: Running, logits: Tensor, keep: bool) -> None:
    """The likeliest token; of equal ones the first."""
    row.produced.append(int(logits.argmax()))
    if keep:
        row.logits.append(logits.clone())


def _finished(row: Running, end: int | None) -> bool:
    return len(row.produced) >= row.request.new or row.produced[-1] == end
