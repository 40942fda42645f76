"""Ring attention, and LoongTrain's double ring: keys and values go round, queries stay.

With R ranks in windows of w, step t = o w + i (o = 0 ... R / w - 1, i = 0 ... w - 1), rank
(ro, ri) works on the keys that rank (ro - o, ri - i) brought, both counted round. They come from
the neighbour in the window, or at i = 0 from the neighbouring window, which sends what it *began*
its own outer step with: a whole inner ring earlier, so that the slow link is used meanwhile. Of the
R - 1 sends of a rank only R / w - 1 leave its window. One window of R is the plain ring: at step t
rank r has the keys of rank r - t.

Backward: keys and values go round again, and the sums of their gradients follow one step behind,
by the ranks that worked on them, and home. Each rank adds its own share at home, so that a sum
travels R - 1 times: the backward sends twice what the forward does.

Ring attention: Liu et al. 2023, arXiv 2310.01889; zig-zag and striped balance as in
zhuzilin/ring-flash-attention; double ring: LoongTrain, Gu et al. 2024, arXiv 2406.18485.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole as whole_number
from foveate.parallel.context.links import Links, Pending, packed, unpacked
from foveate.parallel.context.partial import How, Three, Whole, add, finished, gradients, zeros
from foveate.parallel.context.plan import Plan


@dataclass(frozen=True)
class Rounds:
    """The schedule: who has whose keys at which step.

    Attributes:
        ranks: R.
        window: w, a divisor of R.
    """

    ranks: int
    window: int

    def chunk(self, step: int, rank: int) -> int:
        """Whose keys a rank works on."""
        return self._moved(rank, step, -1)

    def worker(self, step: int, chunk: int) -> int:
        """Who works on a rank's keys."""
        return self._moved(chunk, step, 1)

    def _moved(self, rank: int, step: int, sign: int) -> int:
        outer, inner = divmod(step, self.window)
        ro, ri = divmod(rank, self.window)
        rows = self.ranks // self.window
        return (ro + sign * outer) % rows * self.window + (ri + sign * inner) % self.window

    def fed(self, step: int) -> list[int]:
        """The later steps whose keys are sent on from this one."""
        inner = step % self.window
        later = [step + 1] if inner + 1 < self.window else []
        if inner == 0 and step + self.window < self.ranks:
            later.append(step + self.window)
        return later


@dataclass(frozen=True)
class Ring:
    """Keys and values round a ring of ranks; `window` makes it LoongTrain's double ring.

    Attributes:
        window: w, ranks of an inner ring; it divides the ring. None is all.
        overlap: begin to send before computing, rather than after.

    Raises:
        InputError: a window below 1.
    """

    window: int | None = None
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.window is not None:
            whole_number("ring", "window", self.window, least=1)

    def check(self, ranks: int, heads: int) -> None:
        """Refuse numbers of ranks that it can't run on."""
        if self.window is not None and ranks % self.window:
            raise InputError(
                f"ring(window={self.window}): windows of {self.window} don't divide a ring of "
                f"{ranks} ranks."
            )

    def _rounds(self, links: Links) -> Rounds:
        return Rounds(links.size, self.window or links.size)

    def forward(
        self, links: Links, q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: How
    ) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
        """This rank's rows over all keys, and nothing more to keep."""
        travelling = _Travelling(self._rounds(links), links, k, v, plan, self.overlap)
        sofar: AttentionOutput | None = None
        for step in range(links.size):
            chunk, keys, values = travelling.begin(step)
            sofar = add(sofar, q, keys, values, plan.pair(links.rank, chunk), how)
            travelling.end(step)
        return finished(sofar, q, v.shape[3]), ()

    def backward(
        self,
        links: Links,
        k: Tensor,
        v: Tensor,
        whole: Whole,
        kept: tuple[Tensor, ...],
        plan: Plan,
        how: How,
    ) -> Three:
        """Gradients of this rank's queries, keys and values."""
        rounds, rank = self._rounds(links), links.rank
        travelling = _Travelling(rounds, links, k, v, plan, self.overlap)
        dq, own_k, own_v = zeros(whole.q), zeros(k), zeros(v)
        coming: tuple[Pending, Tensor] | None = None
        for step in range(links.size):
            chunk, keys, values = travelling.begin(step)
            found = gradients(whole, keys, values, plan.pair(rank, chunk), how)
            if found is not None:
                dq += found.q
            if step == 0:
                if found is not None:
                    own_k += found.k
                    own_v += found.v
            else:
                total = zeros(packed(keys, values))
                if coming is not None:
                    coming[0].wait()
                    total = coming[1]
                if found is not None:
                    total += packed(found.k, found.v)
                coming = self._pass_on(links, rounds, step, total, _lengths(k, v, plan))
            travelling.end(step)
        if coming is not None:
            coming[0].wait()
            dk, dv = unpacked(coming[1], k.shape, v.shape)
            own_k += dk
            own_v += dv
        return Three(dq, own_k, own_v)

    def _pass_on(
        self, links: Links, rounds: Rounds, step: int, total: Tensor, counts: list[int]
    ) -> tuple[Pending, Tensor]:
        """Send a sum to who works on its keys next, or home, and begin to receive one."""
        rank, chunk, last = links.rank, rounds.chunk(step, links.rank), step == links.size - 1
        to = chunk if last else rounds.worker(step + 1, chunk)
        next_one = rank if last else rounds.chunk(step + 1, rank)
        buffer = total.new_empty(counts[next_one])
        receives = [(rounds.worker(step, next_one), buffer)]
        return links.exchange([(to, total)], receives, "dkv", links.size + step), buffer


class _Travelling:
    """Keys and values on their way round."""

    def __init__(
        self, rounds: Rounds, links: Links, k: Tensor, v: Tensor, plan: Plan, overlap: bool
    ) -> None:
        self.rounds, self.links, self.plan, self.overlap = rounds, links, plan, overlap
        self.k, self.v = k, v
        self.counts = _lengths(k, v, plan)
        self.held: dict[int, Tensor] = {}
        self.pending: dict[int, Pending] = {}
        if links.size > 1:
            self.held[0] = packed(k, v)

    def begin(self, step: int) -> tuple[int, Tensor, Tensor]:
        """(whose keys, keys, values) of a step; what others need of them leaves now."""
        chunk = self.rounds.chunk(step, self.links.rank)
        if step in self.pending:
            self.pending.pop(step).wait()
        if self.overlap:
            self._send(step)
        if step == 0:
            return chunk, self.k, self.v
        keys, values = unpacked(self.held[step], *self._shapes(chunk))
        return chunk, keys, values

    def end(self, step: int) -> None:
        """The step's computing is done."""
        if not self.overlap:
            self._send(step)
        self.held.pop(step, None)

    def _send(self, step: int) -> None:
        rounds, links = self.rounds, self.links
        chunk = rounds.chunk(step, links.rank)
        for later in rounds.fed(step):
            coming = rounds.chunk(later, links.rank)
            buffer = self.k.new_empty(self.counts[coming])
            self.held[later] = buffer
            self.pending[later] = links.exchange(
                [(rounds.worker(later, chunk), self.held[step])],
                [(rounds.worker(step, coming), buffer)],
                "kv",
                later,
            )

    def _shapes(self, chunk: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return _shapes(self.k, self.v, self.plan.sharding.sizes[chunk])


def _shapes(k: Tensor, v: Tensor, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (*k.shape[:2], length, k.shape[3]), (*v.shape[:2], length, v.shape[3])


def _lengths(k: Tensor, v: Tensor, plan: Plan) -> list[int]:
    """Numbers in each rank's keys and values."""
    per_token = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
    return [per_token * size for size in plan.sharding.sizes]
