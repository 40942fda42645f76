"""`ContextParallel`: attention over a sequence whose tokens lie on several ranks.

    cp = ContextParallel(mesh["cp"], "ring", "zigzag")
    sequence = cp.sequence(8192, causal() & documents(cu_seqlens))
    q, k, v = (sequence.split(x, dim=2) for x in (q, k, v))     # or made from own tokens
    out, lse = sequence.attention(q, k, v)                      # this rank's rows, exact

Outputs and gradients equal those of one rank with everything, whatever the scheme, the sharding and
the mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from foveate.ops import AttentionOutput, Layout, Mask, with_sinks
from foveate.ops.check import check_numbers, check_sinks, check_tensors
from foveate.ops.errors import InputError, nearest
from foveate.parallel.context import sharding as shard
from foveate.parallel.context.groups import links_of
from foveate.parallel.context.links import Links, Traffic
from foveate.parallel.context.partial import How, Whole
from foveate.parallel.context.plan import Plan
from foveate.parallel.context.rule import Rule, rule_of
from foveate.parallel.context.scheme import Scheme, scheme_of
from foveate.parallel.context.sharding import Sharding
from foveate.parallel.context.work import row_pairs

SHARDINGS = ("contiguous", "zigzag", "document-zigzag", "striped", "by-work")
KEPT = 16


class ContextParallel:
    """A scheme and a sharding on some ranks.

    Args:
        where: a process group, a device mesh (its one axis, or two: ring by Ulysses), links, or
            None for all processes.
        scheme: a name with its options, see `SCHEMES`, or a scheme.
        sharding: "contiguous", "zigzag", "document-zigzag", "striped" or "by-work(chunk)", or a
            `Sharding`.
        backend: of the core op; "reference" keeps no pieces apart and is refused.

    Raises:
        InputError: torch.distributed isn't set up, or a name isn't known.
    """

    def __init__(
        self,
        where: Links | dist.ProcessGroup | DeviceMesh | None = None,
        scheme: str | Scheme = "ring",
        sharding: str | Sharding = "zigzag",
        *,
        backend: str = "auto",
    ) -> None:
        if backend in ("reference", "flex"):
            raise InputError(
                f"backend={backend!r} has no backward for one part of a row; use 'auto' or "
                "'blocks'."
            )
        self.scheme, self.backend = scheme_of(scheme), backend
        self.sharding = sharding
        if isinstance(sharding, str):
            _sharding_name(sharding)
        self.links = links_of(where)
        self._sequences: dict[Any, Sequence] = {}

    @property
    def rank(self) -> int:
        """This rank among those of the sequence."""
        return self.links.rank

    @property
    def ranks(self) -> int:
        """N."""
        return self.links.size

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent."""
        return self.links.traffic

    def sequence(
        self,
        length: int,
        mask: Mask | None = None,
        *,
        layout: Layout | None = None,
        positions: Tensor | None = None,
    ) -> Sequence:
        """A sequence under a mask or a layout, shared out; kept, so that layers share its plan.

        Args:
            length: S, tokens of the whole sequence.
            mask: who may attend, as for the whole sequence; None is everyone.
            layout: in place of a mask.
            positions: where its tokens stand, (S,) or (B, S), where that isn't 0 ... S - 1.

        Raises:
            InputError: a mask and a layout, or one made for another length.
        """
        if mask is not None and layout is not None:
            raise InputError("Give a mask or a layout, not both.")
        key = (length, mask, id(layout), id(positions))
        found = self._sequences.get(key)
        if found is None:
            rule = rule_of(mask if layout is None else layout, length, positions)
            plan = Plan(rule, self._shared_out(length, mask, layout))
            found = Sequence(self, plan, mask, layout, positions)
            self._sequences[key] = found
            if len(self._sequences) > KEPT:
                self._sequences.pop(next(iter(self._sequences)))
        return found

    def _shared_out(self, length: int, mask: Mask | None, layout: Layout | None) -> Sharding:
        if isinstance(self.sharding, Sharding):
            if (self.sharding.length, self.sharding.ranks) != (length, self.ranks):
                raise InputError(
                    f"The sharding is of {self.sharding.length} tokens on {self.sharding.ranks} "
                    f"ranks, but the sequence has {length} on {self.ranks}."
                )
            return self.sharding
        return sharding_of(self.sharding, length, self.ranks, mask if layout is None else layout)


def sharding_of(name: str, length: int, ranks: int, seen: Mask | Layout | None = None) -> Sharding:
    """A sharding by its name; "document-zigzag" and "by-work(chunk)" look at what is seen.

    Raises:
        InputError: no such sharding.
    """
    kind, chunk = _sharding_name(name)
    if kind == "contiguous":
        return shard.contiguous(length, ranks)
    if kind == "zigzag":
        return shard.zigzag(length, ranks)
    if kind == "striped":
        return shard.striped(length, ranks)
    if kind == "document-zigzag":
        return shard.document_zigzag(bounds_of(seen) or [0, length], ranks)
    work = torch.full((length,), length) if seen is None else row_pairs(seen, length)
    return shard.by_work(work, ranks, chunk or max(1, min(512, length // (4 * ranks))))


def _sharding_name(name: str) -> tuple[str, int]:
    kind, _, tail = name.partition("(")
    if kind not in SHARDINGS:
        raise InputError(f"sharding {name!r} is not known; {nearest(kind, SHARDINGS)}")
    digits = tail.removesuffix(")").removeprefix("chunk=")
    if tail and (kind != "by-work" or not digits.isdecimal() or not int(digits)):
        raise InputError(f"sharding {name!r}: expected {', '.join(SHARDINGS)}, or by-work(512).")
    return kind, int(digits) if tail else 0


def bounds_of(mask: Mask | Layout | None) -> tuple[int, ...] | None:
    """The boundaries of the documents that a mask names, None where it names none."""
    own = getattr(mask, "cu_seqlens", None)
    if own is not None:
        return tuple(own)
    for part in getattr(mask, "parts", ()):
        found = bounds_of(part)
        if found is not None:
            return found
    return None


class Sequence:
    """One sequence shared out: what `ContextParallel.sequence` returns.

    Attributes:
        cp: whose it is.
        plan: who holds what and sees whom.
        mask: as it was given.
    """

    def __init__(
        self,
        cp: ContextParallel,
        plan: Plan,
        mask: Mask | None,
        layout: Layout | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.cp, self.plan, self.mask = cp, plan, mask
        self._layout, self._positions = layout, positions  # kept: their ids name this sequence
        self._under: dict[Mask | None, Sequence] = {}

    @property
    def sharding(self) -> Sharding:
        """Who holds which tokens."""
        return self.plan.sharding

    @property
    def rule(self) -> Rule:
        """Who sees whom."""
        return self.plan.rule

    @property
    def length(self) -> int:
        """S."""
        return self.sharding.length

    @property
    def index(self) -> Tensor:
        """(L,) the tokens of this rank: their positions, for rotary embeddings."""
        return self.sharding.index[self.cp.rank]

    def under(self, mask: Mask | None) -> Sequence:
        """The same tokens on the same ranks under another mask, as layers of one model have them.

        They stand where they stood; None is everyone.

        Raises:
            InputError: the mask is made for another length.
        """
        same = self._layout is None and mask == self.mask
        found = self if same else self._under.get(mask)
        if found is None:
            plan = Plan(rule_of(mask, self.length, self._positions), self.sharding)
            found = Sequence(self.cp, plan, mask, positions=self._positions)
            self._under[mask] = found
        return found

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of x, which has all."""
        return self.sharding.split(x, self.cp.rank, dim)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """All tokens, on every rank, from every rank's; without a gradient.

        Raises:
            InputError: x isn't this rank's tokens.
        """
        self._check_own(x.shape[dim], "gather")
        dim = dim % x.dim()
        per_token = x.numel() // x.shape[dim] if x.shape[dim] else 0
        sizes = self.sharding.sizes
        if not x.shape[dim]:
            per_token = 1
            for i, n in enumerate(x.shape):
                per_token *= 1 if i == dim else n
        flat = self.cp.links.all_gather(x.detach(), [per_token * n for n in sizes], "gather")
        shapes = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in sizes]
        return self.sharding.join([f.view(s) for f, s in zip(flat, shapes)], dim)

    @torch.compiler.disable
    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> AttentionOutput:
        """`foveate.attention` over the whole sequence, for this rank's tokens.

        Args:
            query: (B, Hq, L, D), this rank's tokens in the order of `index`.
            key: (B, Hkv, L, D), Hq a multiple of Hkv.
            value: (B, Hkv, L, Dv).
            scale: factor on the scores; None is D ** -0.5.
            softcap: as in `foveate.attention`.
            sink_logits: (Hq,), likewise.
            bias: refused: each rank would need the rows and columns of all others.
            dropout: refused above 0: ranks would have to draw alike.

        Returns:
            out (B, Hq, L, Dv) and lse (B, Hq, L); both differentiable, once.

        Raises:
            InputError: shapes don't fit, ranks don't divide heads, or a bias or dropout.
            LinkError: another rank has stopped.
        """
        check_tensors(query, key, value)
        self._check_own(query.shape[2], "attention")
        self._check_own(key.shape[2], "attention")
        scale = query.shape[3] ** -0.5 if scale is None else scale
        check_numbers(scale, softcap, dropout)
        if bias is not None or dropout:
            raise InputError(
                "Context parallelism takes no "
                f"{'bias' if bias is not None else 'attention dropout'}: "
                + ("it would have to be shared out in rows and columns. Put what it says into the "
                   "mask, or run on one rank." if bias is not None
                   else "ranks would have to draw alike. Set it to 0.")
            )  # fmt: skip
        if sink_logits is not None:
            check_sinks(sink_logits, query)
        self.cp.scheme.check(self.cp.ranks, query.shape[1])
        how = How(scale, softcap, self.cp.backend)
        result = AttentionOutput(*_Attention.apply(query, key, value, self, how))
        return result if sink_logits is None else with_sinks(result, sink_logits)

    def _check_own(self, length: int, what: str) -> None:
        if length != len(self.index):
            raise InputError(
                f"{what}: rank {self.cp.rank} holds {len(self.index)} of the {self.length} tokens, "
                f"got {length}; give its own tokens, in the order of `index`."
            )


class _Attention(torch.autograd.Function):
    """A scheme's forward and backward, for autograd."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, how: How
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        scheme, links = sequence.cp.scheme, sequence.cp.links
        found, kept = scheme.forward(links, q, k, v, sequence.plan, how)
        ctx.save_for_backward(q, k, v, found.out, found.lse, *kept)
        ctx.sequence, ctx.how = sequence, how
        return found.out, found.lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *kept = ctx.saved_tensors
        scheme, links = ctx.sequence.cp.scheme, ctx.sequence.cp.links
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        found = scheme.backward(
            links, k, v, Whole(q, out, lse, dout, dlse), tuple(kept), ctx.sequence.plan, ctx.how
        )
        dq, dk, dv = (g.to(x.dtype) for g, x in zip(found, (q, k, v)))
        return dq, dk, dv, None, None
