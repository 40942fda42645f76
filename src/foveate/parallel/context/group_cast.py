"""MagiAttention's group-cast: keys and values go only to the ranks that see some of them.

Each rank's tokens are cut into the pieces that lie together in the sequence. A piece is sent to a
rank if any of that rank's queries sees any of its keys (group-cast); in the backward it is sent
again, and the gradients come back and are summed (group-reduce). Remote pieces come in `stages`,
by how far round the ring their rank stands, so that one stage travels while another is computed.
Under a causal mask in zig-zag 1.5 N (N - 1) of the 2 N (N - 1) half chunks travel that a ring
sends; documents save far more. With `by_work` sharding this is MagiAttention's dispatch.

SandAI-org/MagiAttention (2025), documentation of the CP modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops import AttentionOutput
from foveate.ops.masks.checks import whole as whole_number
from foveate.parallel.context.links import Links, Pending, packed, unpacked
from foveate.parallel.context.partial import How, Three, Whole, add, finished, gradients, zeros
from foveate.parallel.context.plan import Plan
from foveate.parallel.context.rule import Part


@dataclass(frozen=True)
class GroupCast:
    """Send keys and values to those who see them.

    Attributes:
        stages: into how many exchanges the remote keys are cut (MagiAttention: 1 to 4).

    Raises:
        InputError: stages below 1.
    """

    stages: int = 1

    def __post_init__(self) -> None:
        whole_number("magi", "stages", self.stages, least=1)

    def check(self, ranks: int, heads: int) -> None:
        """It runs on any number of ranks."""

    def forward(
        self, links: Links, q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: How
    ) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
        """This rank's rows over all keys, and nothing more to keep."""
        sofar = None
        for stage, keys, values in self._arriving(links, k, v, plan):
            sofar = add(sofar, q, keys, values, self._part(links, plan, stage), how)
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
        rank, dq, dk, dv = links.rank, zeros(whole.q), zeros(k), zeros(v)
        returning: list[tuple[Pending, list[tuple[Tensor, Tensor]]]] = []
        for stage, keys, values in self._arriving(links, k, v, plan):
            found = gradients(whole, keys, values, self._part(links, plan, stage), how)
            if found is not None:
                dq += found.q
            if stage == 0:
                if found is not None:
                    dk += found.k
                    dv += found.v
                continue
            if found is None:
                found = Three(dq, zeros(keys), zeros(values))
            sends, at = [], 0
            for source in self._sources(rank, links.size, stage):
                n = len(self._wanted(plan, rank, source))
                span = slice(at, at + n)
                sends.append((source, packed(found.k[:, :, span], found.v[:, :, span])))
                at += n
            receives, places = [], []
            for reader in self._readers(rank, links.size, stage):
                which = self._wanted(plan, reader, rank).to(k.device)
                buffer = dk.new_empty(len(which) * _width(k, v))
                receives.append((reader, buffer))
                places.append((which, buffer))
            tag = self.stages + 1 + stage
            returning.append((links.exchange(sends, receives, "dkv", tag), places))
        for pending, places in returning:  # in a fixed order, so that every run adds alike
            pending.wait()
            for which, buffer in places:
                shapes = (*k.shape[:2], len(which), k.shape[3]), (
                    *v.shape[:2], len(which), v.shape[3],
                )  # fmt: skip
                more_k, more_v = unpacked(buffer, *shapes)
                dk.index_add_(2, which, more_k)
                dv.index_add_(2, which, more_v)
        return Three(dq, dk, dv)

    def _arriving(
        self, links: Links, k: Tensor, v: Tensor, plan: Plan
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(stage, keys, values), this rank's own as stage 0; the next stage is under way."""
        coming = self._begin(links, k, v, plan, 1)
        yield 0, k, v
        for stage in range(1, self.stages + 1):
            pending, buffers = coming
            pending.wait()
            if stage < self.stages:
                coming = self._begin(links, k, v, plan, stage + 1)
            pairs = [
                unpacked(b, (*k.shape[:2], n, k.shape[3]), (*v.shape[:2], n, v.shape[3]))
                for b, n in buffers
            ]
            if pairs:
                keys, values = (torch.cat(list(x), 2) for x in zip(*pairs))
                yield stage, keys, values

    def _begin(
        self, links: Links, k: Tensor, v: Tensor, plan: Plan, stage: int
    ) -> tuple[Pending, list[tuple[Tensor, int]]]:
        rank, sends, receives = links.rank, [], []
        for reader in self._readers(rank, links.size, stage):
            which = self._wanted(plan, reader, rank).to(k.device)
            sends.append((reader, packed(k[:, :, which], v[:, :, which])))
        buffers = []
        for source in self._sources(rank, links.size, stage):
            count = len(self._wanted(plan, rank, source))
            buffers.append((k.new_empty(count * _width(k, v)), count))
            receives.append((source, buffers[-1][0]))
        return links.exchange(sends, receives, "kv", stage), buffers

    def _sources(self, rank: int, ranks: int, stage: int) -> list[int]:
        """Whose keys a rank gets in a stage."""
        return [(rank - far) % ranks for far in self._distances(ranks, stage)]

    def _readers(self, rank: int, ranks: int, stage: int) -> list[int]:
        """Who gets a rank's keys in a stage."""
        return [(rank + far) % ranks for far in self._distances(ranks, stage)]

    def _distances(self, ranks: int, stage: int) -> range:
        ends = [1 + (ranks - 1) * s // self.stages for s in (stage - 1, stage)]
        return range(*ends)

    def _wanted(self, plan: Plan, reader: int, source: int) -> Tensor:
        return wanted(plan, reader, source)

    def _part(self, links: Links, plan: Plan, stage: int) -> Part:
        rank, index = links.rank, plan.sharding.index
        if stage == 0:
            return plan.pair(rank, rank)
        keys = [index[s][wanted(plan, rank, s)] for s in self._sources(rank, links.size, stage)]
        return plan.part(("cast", self.stages, rank, stage), index[rank], torch.cat(keys))


def wanted(plan: Plan, reader: int, source: int) -> Tensor:
    """(n,) which of a rank's own tokens travel to another: pieces of which it sees any key."""
    key = ("wanted", reader, source)
    found = plan.kept.get(key)
    if found is None:
        seen = plan.pair(reader, source).seen_keys().cpu()
        spans = [
            torch.arange(lo, hi)
            for lo, hi in plan.sharding.pieces[source]
            if bool(seen[lo:hi].any())
        ]
        found = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)
        plan.kept[key] = found
    return found


def _width(k: Tensor, v: Tensor) -> int:
    return k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
