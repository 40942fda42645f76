"""What each scheme sends, from its formulas: numbers that one rank sends to others in a step.

S tokens on N ranks, equal shares, Hq query and Hkv key heads of widths D and Dv, batch B; U ranks
share out heads, R = N / U the sequence, H' = lcm(Hkv, U), which is max(Hkv, U) where one divides
the other:

    ring, all-gather   (N-1)/N S Hkv (D + Dv)                       forward, twice that backward
    Ulysses part       (U-1)/U S/N (Hq + H') (D + Dv)               forward, and again backward
    ring part          (R-1)/R S H'/U (D + Dv)                      forward, twice that backward

plus the lse, (U-1)/U S/N Hq, which the published formulas leave out, as nobody but us hands it
back. A double ring sends as much as a plain one, R/w - 1 of R - 1 messages between windows. What
group-cast sends depends on the mask: whole pieces, to those who see some of them.

For arXiv 2510.17896; derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from foveate.parallel.context.all_gather import AllGather
from foveate.parallel.context.group_cast import GroupCast, wanted
from foveate.parallel.context.plan import Plan, grouped
from foveate.parallel.context.ring import Ring
from foveate.parallel.context.scheme import Scheme
from foveate.parallel.context.ulysses import Ulysses


@dataclass(frozen=True)
class Sizes:
    """Of one attention.

    Attributes:
        length: S.
        ranks: N.
        heads: Hq.
        kv_heads: Hkv.
        key_dim: D.
        value_dim: Dv.
        batch: B.
    """

    length: int
    ranks: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    batch: int = 1

    @property
    def width(self) -> int:
        """Numbers of a key and a value, or of a query and its output."""
        return self.key_dim + self.value_dim


@dataclass(frozen=True)
class Volume:
    """Numbers that a rank sends in one step, by what they are for.

    Attributes:
        forward: as `Traffic` counts them; fractions where shares aren't equal.
        backward: likewise, for a loss that doesn't look at the lse.
        crossing: of the ring's messages those that leave a window, 0 to 1.
        repeated: whether key heads were repeated, so that their gradients travel as sums.
    """

    forward: dict[str, Fraction]
    backward: dict[str, Fraction]
    crossing: Fraction = Fraction(1)
    repeated: bool = False

    def bytes(self, itemsize: int = 2, *, backward: bool = False) -> float:
        """Bytes, where tensors have `itemsize` and sums (the lse, dkv) at least 4."""
        wide = {"lse", "dkv"} | ({"dqkv"} if self.repeated else set())
        some = self.backward if backward else self.forward
        return float(
            sum(n * (max(4, itemsize) if w in wide else itemsize) for w, n in some.items())
        )


def volume(scheme: Scheme, sizes: Sizes, plan: Plan | None = None, rank: int = 0) -> Volume:
    """What one rank sends; group-cast needs the plan, and says it for `rank` alone.

    Raises:
        InputError: the scheme can't run on these sizes.
    """
    scheme.check(sizes.ranks, sizes.heads)
    if not isinstance(scheme, Ulysses):
        return _inner(scheme, sizes, sizes.kv_heads, plan, rank)
    u, s = scheme.degree(sizes.ranks), sizes
    rings, heads = s.ranks // u, math.lcm(s.kv_heads, u)
    share = Fraction(u - 1, u) * Fraction(s.length, s.ranks) * s.batch
    forward = {
        "qkv": share * (s.heads * s.key_dim + heads * s.width),
        "out": share * s.heads * s.value_dim,
        "lse": share * s.heads,
    }
    backward = {
        "dout": share * s.heads * s.value_dim,
        "dqkv": share * (s.heads * s.key_dim + heads * s.width),
    }
    inside = Sizes(s.length, rings, s.heads // u, heads // u, s.key_dim, s.value_dim, s.batch)
    if plan is not None and rings > 1:
        ring = rank // u if scheme.placement == "head" else rank % rings
        place = rank % u if scheme.placement == "head" else rank // rings
        of = (place * s.heads // u, s.heads // u, s.heads)
        made = grouped(plan.sharding, u, scheme.placement == "head")[0]
        inner = _inner(scheme.inner, inside, inside.kv_heads, Plan(plan.rule, made, of), ring)
    else:
        inner = _inner(scheme.inner, inside, inside.kv_heads, None, 0)
    return Volume(
        {w: n for w, n in (forward | inner.forward).items() if n},
        {w: n for w, n in (backward | inner.backward).items() if n},
        inner.crossing,
        heads != s.kv_heads,
    )


def _inner(
    scheme: Ring | AllGather | GroupCast, s: Sizes, kv_heads: int, plan: Plan | None, rank: int
) -> Volume:
    per_token = s.batch * kv_heads * s.width
    if isinstance(scheme, GroupCast) and s.ranks > 1:
        if plan is None:
            # Without a mask to look at, as if everyone saw everything.
            sent, got = [Fraction((s.ranks - 1) * s.length, s.ranks)] * 2
        else:
            others = [r for r in range(s.ranks) if r != rank]
            sent = Fraction(sum(len(wanted(plan, r, rank)) for r in others))
            got = Fraction(sum(len(wanted(plan, rank, r)) for r in others))
        kv, dkv = sent * per_token, got * per_token
    else:
        kv = dkv = Fraction(s.ranks - 1, s.ranks) * s.length * per_token
    forward, backward = ({"kv": kv}, {"kv": kv, "dkv": dkv}) if kv or dkv else ({}, {})
    crossing = Fraction(1)
    if isinstance(scheme, Ring) and scheme.window and s.ranks > 1:
        crossing = Fraction(s.ranks // scheme.window - 1, s.ranks - 1)
    return Volume({w: n for w, n in forward.items() if n},
                  {w: n for w, n in backward.items() if n}, crossing)  # fmt: skip
