"""All-gather: every rank gets all keys and values, as in Llama 3's context parallelism.

Simple, for any mask, at the volume of a ring but with nothing to hide it behind; it holds the keys
and values of the whole sequence, or with `groups` those of some key heads at a time. Backward:
gather again, and reduce-scatter the gradients of keys and values, in fp32.

Llama Team 2024, arXiv 2407.21783, section 3.3.2; zhuzilin/ring-flash-attention's llama3 form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole as whole_number
from foveate.parallel.context.links import Links, packed, unpacked
from foveate.parallel.context.partial import How, Three, Whole, add, finished, gradients, zeros
from foveate.parallel.context.plan import Plan
from foveate.parallel.context.rule import Part


@dataclass(frozen=True)
class AllGather:
    """Gather all keys and values, attend, and in the backward reduce and scatter.

    Attributes:
        groups: key heads are gathered in so many groups, one after the other; it divides them.

    Raises:
        InputError: groups below 1.
    """

    groups: int = 1

    def __post_init__(self) -> None:
        whole_number("all-gather", "groups", self.groups, least=1)

    def check(self, ranks: int, heads: int) -> None:
        """It runs on any number of ranks."""

    def forward(
        self, links: Links, q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: How
    ) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
        """This rank's rows over all keys, and nothing more to keep."""
        outs, lses = [], []
        for heads, kv_heads in self._groups(q, k):
            keys, values = self._gathered(links, k[:, kv_heads], v[:, kv_heads], plan)
            part = self._part(links, plan, heads, q.shape[1])
            rows = q[:, heads]
            done = finished(add(None, rows, keys, values, part, how), rows, v.shape[3])
            outs.append(done.out)
            lses.append(done.lse)
        return AttentionOutput(torch.cat(outs, 1), torch.cat(lses, 1)), ()

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
        found = []
        for heads, kv_heads in self._groups(whole.q, k):
            mine = Whole(*(None if x is None else x[:, heads] for x in whole))  # type: ignore[arg-type]
            keys, values = self._gathered(links, k[:, kv_heads], v[:, kv_heads], plan)
            part = self._part(links, plan, heads, whole.q.shape[1])
            got = gradients(mine, keys, values, part, how)
            if got is None:
                got = Three(zeros(mine.q), zeros(keys), zeros(values))
            index = [i.to(k.device) for i in plan.sharding.index]
            parts = [packed(got.k[:, :, i], got.v[:, :, i]) for i in index]
            shapes = (k[:, kv_heads].shape, v[:, kv_heads].shape)
            found.append((got.q, *unpacked(links.reduce_scatter(parts, "dkv"), *shapes)))
        return Three(*(torch.cat(x, 1) for x in zip(*found)))

    def _groups(self, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
        """(query heads, key heads) of each group."""
        if k.shape[1] % self.groups:
            raise InputError(
                f"all-gather(groups={self.groups}): {k.shape[1]} key heads can't be gathered in "
                f"{self.groups} equal groups."
            )
        kv, heads = k.shape[1] // self.groups, q.shape[1] // self.groups
        return [
            (slice(g * heads, (g + 1) * heads), slice(g * kv, (g + 1) * kv))
            for g in range(self.groups)
        ]

    def _part(self, links: Links, plan: Plan, heads: slice, of: int) -> Part:
        if self.groups > 1:
            plan = plan.of_heads(heads.start, heads.stop - heads.start, of)
        every = torch.arange(plan.sharding.length)
        return plan.part(("all", links.rank), plan.sharding.index[links.rank], every)

    def _gathered(self, links: Links, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, in its order."""
        lengths = plan.sharding.sizes
        shapes = [((*k.shape[:2], n, k.shape[3]), (*v.shape[:2], n, v.shape[3])) for n in lengths]
        per_token = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
        flat = links.all_gather(packed(k, v), [per_token * n for n in lengths], "kv")
        pairs = [unpacked(one, *shape) for one, shape in zip(flat, shapes)]
        keys, values = (plan.sharding.join(list(x), dim=2) for x in zip(*pairs))
        return keys, values
