"""Ulysses, USP and LoongTrain's 2-D attention: heads across some ranks, the sequence across others.

N = U R ranks. Inside a group of U an all-to-all turns [tokens of one rank, all heads] into [tokens
of the group, heads / U]; the R ranks that hold the same heads run a ring (or another scheme) on the
groups' tokens; a second all-to-all turns the output back. U = N is DeepSpeed-Ulysses: whole rows,
any mask, equal work. Key heads are repeated to the least common multiple with U, so that every
query head finds its own: with U above the number of key heads, to U. Backward: the gradient of the
output goes in, those of queries, keys and values come out.

`placement` says which dimension lies on neighbouring ranks, which are those of one machine: "head"
puts U there (head-first), "context" R.

DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv 2309.14509; USP: Fang and Zhao 2024, arXiv 2405.07719;
LoongTrain: Gu et al. 2024, arXiv 2406.18485.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole as whole_number
from foveate.parallel.context.all_gather import AllGather
from foveate.parallel.context.group_cast import GroupCast
from foveate.parallel.context.links import Links, packed, unpacked
from foveate.parallel.context.partial import How, Three, Whole, add, finished, gradients, zeros
from foveate.parallel.context.plan import Plan, group_ranks, grouped
from foveate.parallel.context.ring import Ring

Inner = Ring | AllGather | GroupCast


@dataclass(frozen=True)
class Ulysses:
    """Heads across `ulysses` ranks, and across the rest what `inner` is.

    Attributes:
        ulysses: U; None is all ranks.
        inner: the scheme between the groups.
        placement: "head" or "context", what lies on neighbouring ranks.

    Raises:
        InputError: U below 1, or another placement.
    """

    ulysses: int | None = None
    inner: Inner = field(default_factory=Ring)
    placement: str = "head"

    def __post_init__(self) -> None:
        if self.ulysses is not None:
            whole_number("ulysses", "ulysses", self.ulysses, least=1)
        if self.placement not in ("head", "context"):
            raise InputError(
                f"ulysses(placement={self.placement!r}): expected 'head' (neighbouring ranks share "
                "out heads) or 'context' (they share out the sequence)."
            )

    def degree(self, ranks: int) -> int:
        """U on so many ranks."""
        return ranks if self.ulysses is None else self.ulysses

    def check(self, ranks: int, heads: int) -> None:
        """Refuse numbers of ranks that it can't run on.

        Raises:
            InputError: U divides the ranks or the heads not.
        """
        u = self.degree(ranks)
        if ranks % u:
            raise InputError(f"ulysses={u} doesn't divide the {ranks} ranks.")
        if heads % u:
            raise InputError(
                f"Ulysses on {u} ranks needs query heads that {u} divides, got {heads}: every rank "
                "works on whole heads. Use a ring or all-gather, or usp(ulysses=U) with a U that "
                f"divides both, such as {math.gcd(heads, ranks)}."
            )
        self.inner.check(ranks // u, heads // u)

    def forward(
        self, links: Links, q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: How
    ) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
        """This rank's rows over all keys; and the rows that it worked on, for the backward."""
        group = _Group(self, links, q, k, plan)
        k, v = group.repeated(k), group.repeated(v)
        q_rows, k_rows, v_rows = group.to_heads([q, k, v], "qkv")
        if group.rings.size == 1:
            inner = group.plan.pair(0, 0)
            found = finished(add(None, q_rows, k_rows, v_rows, inner, how), q_rows, v.shape[3])
            kept: tuple[Tensor, ...] = ()
        else:
            found, kept = self.inner.forward(group.rings, q_rows, k_rows, v_rows, group.plan, how)
        (out,) = group.to_tokens([found.out], "out")
        (lse,) = group.to_tokens([found.lse[..., None]], "lse")
        return AttentionOutput(out, lse[..., 0]), (
            q_rows,
            k_rows,
            v_rows,
            found.out,
            found.lse,
            *kept,
        )

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
        group = _Group(self, links, whole.q, k, plan)
        q_rows, k_rows, v_rows, out, lse, *more = kept
        dout = dlse = None
        if whole.dout is not None:
            (dout,) = group.to_heads([whole.dout], "dout")
        if whole.dlse is not None:
            dlse = group.to_heads([whole.dlse[..., None]], "dlse")[0][..., 0].contiguous()
        mine = Whole(q_rows, out, lse, dout, dlse)
        if group.rings.size == 1:
            got = gradients(mine, k_rows, v_rows, group.plan.pair(0, 0), how)
            if got is None:
                got = Three(zeros(q_rows), zeros(k_rows), zeros(v_rows))
        else:
            got = self.inner.backward(
                group.rings, k_rows, v_rows, mine, tuple(more), group.plan, how
            )
        # Heads that were repeated are summed after the way back: that keeps the dtype of sums.
        whole_heads = group.kv_heads == k.shape[1]
        going = [g.to(q_rows.dtype) for g in got] if whole_heads else list(got)
        dq, dk, dv = group.to_tokens(going, "dqkv")
        return Three(dq, group.summed(dk, k.shape[1]), group.summed(dv, v.shape[1]))


class _Group:
    """The ranks that put their tokens together, and the ring that is left."""

    def __init__(self, scheme: Ulysses, links: Links, q: Tensor, k: Tensor, plan: Plan) -> None:
        heads, u = q.shape[1], scheme.degree(links.size)
        scheme.check(links.size, heads)
        rings, head_first = links.size // u, scheme.placement == "head"
        if head_first:
            ring, place = divmod(links.rank, u)
            column = list(range(place, links.size, u))
        else:
            place, ring = divmod(links.rank, rings)
            column = list(range(place * rings, (place + 1) * rings))
        members = group_ranks(ring, u, rings, head_first)
        self.links, self.rings = links.sub(members), links.sub(column)
        self.size, self.kv_heads = u, math.lcm(k.shape[1], u)
        of = (place * heads // u, heads // u, heads)
        self.plan = plan.of_rings(u, of if plan.heads is None else _inside(plan.heads, of),
                                  head_first)  # fmt: skip
        self.lengths = [plan.sharding.sizes[r] for r in members]
        order = plan.kept.get(("order", u, head_first, ring))
        if order is None:
            order = grouped(plan.sharding, u, head_first)[1][ring]
            plan.kept[("order", u, head_first, ring)] = order
        self.order = order.to(q.device)
        self.sorted = bool((order.diff() == 1).all())
        self.place = place

    def repeated(self, x: Tensor) -> Tensor:
        """Key heads so often that U divides them."""
        return x if x.shape[1] == self.kv_heads else x.repeat_interleave(
            self.kv_heads // x.shape[1], 1
        )  # fmt: skip

    def summed(self, x: Tensor, heads: int) -> Tensor:
        """The gradient of heads that were repeated."""
        return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)

    def to_heads(self, tensors: list[Tensor], what: str) -> list[Tensor]:
        """From [own tokens, all heads] to [the group's tokens, some heads], each (B, H, L, D)."""
        u = self.size
        cut = [x.chunk(u, 1) for x in tensors]
        sends = [packed(*(c[r] for c in cut)) for r in range(u)]
        shapes = [
            [(x.shape[0], x.shape[1] // u, n, x.shape[3]) for x in tensors] for n in self.lengths
        ]
        sizes = [sum(math.prod(s) for s in some) for some in shapes]
        found = self.links.all_to_all(sends, sizes, what)
        pieces = [unpacked(flat, *some) for flat, some in zip(found, shapes)]
        rows = [torch.cat(list(x), 2) for x in zip(*pieces)]
        return rows if self.sorted else [x.index_select(2, self.order) for x in rows]

    def to_tokens(self, tensors: list[Tensor], what: str) -> list[Tensor]:
        """Back again."""
        u = self.size
        if not self.sorted:
            tensors = [torch.empty_like(x).index_copy_(2, self.order, x) for x in tensors]
        cut = [x.split(self.lengths, 2) for x in tensors]
        sends = [packed(*(c[r] for c in cut)) for r in range(u)]
        own = self.lengths[self.links.rank]
        shapes = [(*x.shape[:2], own, x.shape[3]) for x in tensors]
        size = sum(math.prod(s) for s in shapes)
        found = self.links.all_to_all(sends, [size] * u, what)
        pieces = [unpacked(flat, *shapes) for flat in found]
        return [torch.cat(list(x), 1) for x in zip(*pieces)]


def _inside(outer: tuple[int, int, int], inner: tuple[int, int, int]) -> tuple[int, int, int]:
    return (outer[0] + inner[0], inner[1], outer[2])
