"""What ranks say to each other, and how much of it: the wires under every scheme.

Everything is made of one primitive, an exchange of tensors between pairs of ranks that is begun now
and waited for later, so that sends and computing overlap and no order of sends can deadlock. What
goes to another rank is counted, in numbers and in bytes, by what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.ops.errors import FoveateError


class LinkError(FoveateError, RuntimeError):
    """Another rank didn't answer: it died, or is too far behind."""


@dataclass
class Traffic:
    """What this rank has sent to others, by what it was for.

    Attributes:
        numbers: elements sent.
        bytes: bytes sent.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int, itemsize: int) -> None:
        """Count `count` numbers."""
        if count:
            self.numbers[what] = self.numbers.get(what, 0) + count
            self.bytes[what] = self.bytes.get(what, 0) + count * itemsize

    def reset(self) -> None:
        """Count from zero."""
        self.numbers.clear()
        self.bytes.clear()


Message = tuple[int, Tensor]
"""(rank to send to or receive from, what is sent or the buffer to receive into)."""


class Pending:
    """An exchange that was begun; `wait` ends it. A second wait does nothing."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Until everything has arrived and what was sent may be overwritten.

        Raises:
            LinkError: another rank didn't answer.
        """
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Links:
    """The wires between N ranks, seen from one of them.

    Attributes:
        rank: this one, 0 ... N - 1.
        size: N.
        traffic: what this rank has sent, shared with the links made by `sub`.
    """

    rank: int
    size: int
    traffic: Traffic

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], what: str, tag: int = 0
    ) -> Pending:
        """Begin to send and receive contiguous tensors; what a rank sends itself is copied.

        Args:
            sends: to whom and what; it must not change before the wait.
            receives: from whom, and a buffer of what that rank sends.
            what: what it is counted as.
            tag: tells exchanges apart that are under way at the same time.
        """
        for rank, tensor in sends:
            if rank != self.rank:
                self.traffic.add(what, tensor.numel(), tensor.element_size())
        own = [t for r, t in sends if r == self.rank]
        for buffer, tensor in zip((b for r, b in receives if r == self.rank), own):
            buffer.copy_(tensor)
        return self._exchange(
            [(r, t) for r, t in sends if r != self.rank and t.numel()],
            [(r, b) for r, b in receives if r != self.rank and b.numel()],
            what,
            tag,
        )

    def _exchange(
        self, sends: list[Message], receives: list[Message], what: str, tag: int
    ) -> Pending:
        raise TypeError(f"{type(self).__name__} defines no _exchange")

    def all_to_all(self, sends: Sequence[Tensor], sizes: Sequence[int], what: str) -> list[Tensor]:
        """Give each rank its tensor, and get one from each, flat, of `sizes` numbers.

        All have one dtype and device.
        """
        buffers = [sends[0].new_empty(size) for size in sizes]
        flat = [x.reshape(-1).contiguous() for x in sends]
        self.exchange(list(enumerate(flat)), list(enumerate(buffers)), what).wait()
        return buffers

    def all_gather(self, x: Tensor, sizes: Sequence[int], what: str) -> list[Tensor]:
        """Every rank's tensor, flat; rank r's has `sizes[r]` numbers."""
        flat = x.reshape(-1).contiguous()
        buffers = [flat if r == self.rank else flat.new_empty(n) for r, n in enumerate(sizes)]
        others = [r for r in range(self.size) if r != self.rank]
        self.exchange([(r, flat) for r in others], [(r, buffers[r]) for r in others], what).wait()
        return buffers

    def reduce_scatter(
        self, parts: Sequence[Tensor], what: str
    ) -> Tensor:  # sums in rank order, so that every run adds alike
        """The sum over ranks of what each has for this one; parts[r] is for rank r."""
        mine = parts[self.rank]
        found = self.all_to_all(parts, [mine.numel()] * self.size, what)
        total = found[0].clone()
        for one in found[1:]:
            total += one
        return total.reshape(mine.shape)

    def sub(self, ranks: Sequence[int]) -> Links:
        """The wires among some of the ranks, this one included, numbered in the order given."""
        return self if list(ranks) == list(range(self.size)) else _Sub(self, list(ranks))


class _Sub(Links):
    """Some of the ranks of other links, by the same wires."""

    def __init__(self, parent: Links, ranks: list[int]) -> None:
        self.parent, self.ranks = parent, ranks
        self.rank, self.size = ranks.index(parent.rank), len(ranks)
        self.traffic = parent.traffic

    def _exchange(
        self, sends: list[Message], receives: list[Message], what: str, tag: int
    ) -> Pending:
        going, coming = ([(self.ranks[r], t) for r, t in some] for some in (sends, receives))
        return self.parent._exchange(going, coming, what, tag)


def packed(*tensors: Tensor) -> Tensor:
    """Several tensors as one flat one, to travel together."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unpacked(flat: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """What `packed` put together, as views of these shapes."""
    found, at = [], 0
    for shape in shapes:
        count = 1
        for n in shape:
            count *= n
        found.append(flat[at : at + count].view(*shape))
        at += count
    return found
