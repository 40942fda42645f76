"""Messages between attention and FFN ranks, in buffers that are made once.

Each (micro-batch, peer) has its own buffer and its own receive, posted before anything can arrive,
so that micro-batches never wait for each other. The two directions are groups of their own: on
NCCL each has its own stream. All sends and receives of a pair come in the same order on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn

from foveate.parallel.disaggregate.experts import Routes
from foveate.parallel.disaggregate.message import Back, Forth, Head
from foveate.parallel.disaggregate.plan import Plan
from foveate.parallel.disaggregate.stages import Pace, PacedLink, Trace, sleep_until
from foveate.parallel.disaggregate.watch import Watch


class Groups(NamedTuple):
    """Process groups: of each direction, and of this rank's FFN instance (None elsewhere)."""

    forth: distributed.ProcessGroup
    back: distributed.ProcessGroup
    inside: distributed.ProcessGroup | None


def make_groups(plan: Plan, rank: int) -> Groups:
    """Called by all ranks alike."""
    limit = timedelta(seconds=plan.patience)
    forth, back = distributed.new_group(timeout=limit), distributed.new_group(timeout=limit)
    inside = None
    for instance in range(plan.ffn if plan.tp > 1 else 0):
        first = plan.attention + instance * plan.tp
        members = range(first, first + plan.tp)
        made = distributed.new_group(list(members), timeout=limit)
        inside = made if rank in members else inside
    return Groups(forth, back, inside)


class Reply(NamedTuple):
    """y (n, dim) of a micro-batch, and whether nobody has anything left to decode."""

    rows: Tensor
    done: bool


class Link(Protocol):
    """The attention side's view of the FFN side."""

    def post(self, head: Head, rows: Tensor, routes: Routes | None) -> None:
        """Send a micro-batch of one layer on its way."""

    def take(self, micro_batch: int) -> Reply:
        """Wait for what came of the micro-batch's last `post`."""

    def close(self) -> None:
        """Wait until everything is sent."""


class LocalLink:
    """The FFN side in this process; rows go through the same messages.

    Args:
        plan: of one attention rank; its FFN ranks don't count.
        parts: each layer's whole feed-forward part.
        forth: the messages' layout.
    """

    def __init__(self, plan: Plan, parts: nn.ModuleList, forth: Forth, device: torch.device):
        self.parts, self.forth = parts, forth
        self.buffers = [forth.buffer(device) for _ in range(plan.micro_batches)]
        self.replies: dict[int, Reply] = {}

    def post(self, head: Head, rows: Tensor, routes: Routes | None) -> None:
        """As `Link.post`."""
        buffer = self.buffers[head.micro_batch]
        self.forth.write(buffer, rows, routes)
        y = self.parts[head.layer](*self.forth.read(buffer, len(rows))) if len(rows) else rows
        self.replies[head.micro_batch] = Reply(y, head.done)

    def take(self, micro_batch: int) -> Reply:
        """As `Link.take`."""
        return self.replies.pop(micro_batch)

    def close(self) -> None:
        """As `Link.close`."""


class AttentionLink:
    """An attention rank's messages: shares of rows to the ranks of every FFN instance."""

    def __init__(
        self,
        plan: Plan,
        forth: Forth,
        back: Back,
        groups: Groups,
        watch: Watch,
        trace: Trace,
        pace: Pace,
        device: torch.device,
    ) -> None:
        self.plan, self.forth, self.back, self.groups = plan, forth, back, groups
        self.watch, self.trace, self.wire = watch, trace, PacedLink(pace.forth)
        micro, ranks = range(plan.micro_batches), range(plan.ffn_ranks)
        self.out = [[forth.buffer(device) for _ in range(plan.tp)] for _ in micro]
        self.into = [[back.buffer(device) for _ in ranks] for _ in micro]
        self.sends: list[list[distributed.Work | None]] = [[] for _ in micro]
        self.receives: list[list[distributed.Work | None]] = [[] for _ in micro]
        self.sent: dict[int, Head] = {}

    def _peer(self, f: int) -> tuple[int, str]:
        rank = self.plan.attention + f
        return rank, self.plan.name(rank)

    def post(self, head: Head, rows: Tensor, routes: Routes | None) -> None:
        """As `Link.post`: rows are dealt to the ranks of an instance, all instances get all."""
        m, c = head.micro_batch, self.plan.share
        self._sent(m)
        arrival, now = self.wire.arrival(), time.monotonic_ns()
        for t, buffer in enumerate(self.out[m]):
            at = slice(t * c, (t + 1) * c)
            mine = None if routes is None else Routes(routes.ids[at], routes.weights[at])
            self.forth.write(buffer, rows[at], mine)
            told = Head(head.layer, m, head.turn, len(rows[at]), head.done, arrival, now)
            self.forth.write_head(buffer, told)
        peers = [self._peer(f) for f in range(self.plan.ffn_ranks)]
        self.receives[m] = [
            self.watch.call(partial(distributed.irecv, into, peer, self.groups.back, m), name)
            for (peer, name), into in zip(peers, self.into[m], strict=True)
        ]
        self.sends[m] = [
            self.watch.call(
                partial(
                    distributed.isend, self.out[m][f % self.plan.tp], peer, self.groups.forth, m
                ),
                name,
            )
            for f, (peer, name) in enumerate(peers)
        ]
        self.sent[m] = head

    def take(self, micro_batch: int) -> Reply:
        """As `Link.take`: shares side by side, instances summed in order."""
        m, asked = micro_batch, self.sent[micro_batch]
        total: Tensor | None = None
        done = True
        begun = time.monotonic_ns()
        for instance in range(self.plan.ffn):
            shares = []
            for t in range(self.plan.tp):
                f = instance * self.plan.tp + t
                peer = self._peer(f)[1]
                self.watch.wait(self.receives[m][f], peer)
                head = self.back.head(self.into[m][f])
                head.expect(asked.layer, m, asked.turn, peer)
                sleep_until(head.arrival)
                self.trace.add("back", f"from {peer}", head.sent, time.monotonic_ns())
                shares.append(self.back.view(self.into[m][f], "rows")[: head.rows])
                done = done and head.done
            part = torch.cat(shares)
            total = part if total is None else total + part
        self.trace.add("wait", f"micro-batch {m}", begun, time.monotonic_ns())
        assert total is not None
        return Reply(total, done)

    def _sent(self, m: int) -> None:
        for f, work in enumerate(self.sends[m]):
            self.watch.wait(work, self._peer(f)[1])
        self.sends[m] = []

    def close(self) -> None:
        """As `Link.close`."""
        for m in range(self.plan.micro_batches):
            self._sent(m)


class Batch(NamedTuple):
    """What an FFN rank has of a micro-batch from all attention ranks.

    heads: of share t of attention rank a, at [t][a]; tokens (n, dim) and routes of all rows, in
    that order.
    """

    heads: list[list[Head]]
    tokens: Tensor
    routes: Routes


class FFNLink:
    """An FFN rank's messages: all attention ranks' shares, gathered and scattered in its instance.

    Args:
        plan: all ranks.
        rank: this one.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        forth: Forth,
        back: Back,
        groups: Groups,
        watch: Watch,
        trace: Trace,
        pace: Pace,
        device: torch.device,
    ) -> None:
        self.plan, self.forth, self.back, self.groups = plan, forth, back, groups
        self.watch, self.trace, self.wire = watch, trace, PacedLink(pace.back)
        micro, ranks = range(plan.micro_batches), range(plan.attention)
        first = rank - (rank - plan.attention) % plan.tp
        self.inside = [plan.name(r) for r in range(first, first + plan.tp) if r != rank]
        flat = [torch.zeros(plan.attention, forth.bytes, dtype=torch.uint8, device=device)
                for _ in micro]  # fmt: skip
        self.into = flat
        self.gathered = torch.zeros(
            plan.tp, plan.attention, forth.bytes, dtype=torch.uint8, device=device
        )
        self.out = [[back.buffer(device) for _ in ranks] for _ in micro]
        shape, dtype = back.parts["rows"]
        wide = torch.promote_types(dtype, torch.float32)
        self.partial = torch.zeros(plan.tp, plan.attention, *shape, dtype=wide, device=device)
        self.summed = torch.zeros(plan.attention, *shape, dtype=wide, device=device)
        self.sends: list[list[distributed.Work | None]] = [[] for _ in micro]
        self.receives: list[list[distributed.Work | None]] = [[] for _ in micro]
        for m in micro:
            self._listen(m)

    def _listen(self, m: int) -> None:
        self.receives[m] = [
            self.watch.call(
                partial(distributed.irecv, self.into[m][a], a, self.groups.forth, m),
                self.plan.name(a),
            )
            for a in range(self.plan.attention)
        ]

    def get(self, micro_batch: int, layer: int, turn: int) -> Batch:
        """Wait until every attention rank has delivered its micro-batch of this layer."""
        m = micro_batch
        for a, work in enumerate(self.receives[m]):
            peer = self.plan.name(a)
            self.watch.wait(work, peer)
            head = self.forth.head(self.into[m][a])
            head.expect(layer, m, turn, peer)
            sleep_until(head.arrival)
            self.trace.add("forth", f"from {peer}", head.sent, time.monotonic_ns())
        shares = self.into[m][None]
        if self.groups.inside is not None:
            self._collect(distributed.all_gather, list(self.gathered), self.into[m])
            shares = self.gathered
        heads = [[self.forth.head(buffer) for buffer in share] for share in shares]
        read = [
            self.forth.read(buffer, head.rows)
            for share, found in zip(shares, heads, strict=True)
            for buffer, head in zip(share, found, strict=True)
        ]
        if len(read) == 1:
            return Batch(heads, *read[0])
        return Batch(
            heads,
            torch.cat([tokens for tokens, _ in read]),
            Routes(
                torch.cat([routes.ids for _, routes in read]),
                torch.cat([routes.weights for _, routes in read]),
            ),
        )

    def respond(self, micro_batch: int, batch: Batch, y: Tensor) -> bool:
        """Give everyone their rows of y (n, dim); whether nobody has anything left to decode."""
        m = micro_batch
        done = all(head.done for share in batch.heads for head in share)
        if not done:
            self._listen(m)  # what came has been used: the next may come
        for a, work in enumerate(self.sends[m]):
            self.watch.wait(work, self.plan.name(a))
        pieces = y.split([head.rows for share in batch.heads for head in share])
        mine = list(pieces) if self.groups.inside is None else self._scattered(batch, pieces)
        own = batch.heads[self._part()]
        self.sends[m] = []
        arrival = self.wire.arrival()
        for a, (rows, head) in enumerate(zip(mine, own, strict=True)):
            buffer = self.out[m][a]
            self.back.view(buffer, "rows")[: len(rows)] = rows
            told = Head(head.layer, m, head.turn, head.rows, done, arrival, time.monotonic_ns())
            self.back.write_head(buffer, told)
            send = partial(distributed.isend, buffer, a, self.groups.back, m)
            self.sends[m].append(self.watch.call(send, self.plan.name(a)))
        return done

    def _collect(self, collective: Callable[..., Any], *given: Any) -> None:
        """Run a collective of this rank's instance."""
        start = partial(collective, *given, group=self.groups.inside, async_op=True)
        self.watch.wait(self.watch.call(start, *self.inside), *self.inside)

    def _part(self) -> int:
        return 0 if self.groups.inside is None else distributed.get_rank(self.groups.inside)

    def _scattered(self, batch: Batch, pieces: tuple[Tensor, ...]) -> list[Tensor]:
        """The sums over this instance's ranks, of this rank's share of everybody's rows."""
        if any(len(piece) for piece in pieces):
            self.partial.zero_()
            for i, piece in enumerate(pieces):
                t, a = divmod(i, self.plan.attention)
                self.partial[t, a, : len(piece)] = piece
            self._collect(distributed.reduce_scatter, self.summed, list(self.partial))
        own = batch.heads[self._part()]
        return [self.summed[a, : head.rows] for a, head in enumerate(own)]

    def close(self) -> None:
        """Wait until everything is sent."""
        for sends in self.sends:
            for a, work in enumerate(sends):
                self.watch.wait(work, self.plan.name(a))
