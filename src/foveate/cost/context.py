"""What context parallelism will cost: a model of its time on any number of ranks.

    time = FLOPs of the busiest rank / rate + bytes / bandwidth       nothing overlaps
    time = the larger of the two                                      everything overlaps

The truth lies between the two. The busiest rank follows from the mask, row by row, and from the
sharding; bytes from the formulas of `foveate.parallel.context.theory`; rate and bandwidths are
given or measured. Ranks sit `node` to a machine, with a fast link inside and a slow one between.
A ring moves as one: where it leaves a machine, its every step takes as long as the slow link. A
double ring whose windows are machines uses the slow link while an inner ring runs. Of an
all-to-all over more than one machine the part for other machines takes the slow link.

For arXiv 2510.17896.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.ops import attention, causal
from foveate.ops.errors import InputError
from foveate.parallel.context.plan import group_ranks
from foveate.parallel.context.ring import Ring
from foveate.parallel.context.scheme import Scheme, scheme_of
from foveate.parallel.context.sharding import Sharding
from foveate.parallel.context.theory import Sizes, Volume, volume
from foveate.parallel.context.ulysses import Ulysses

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """What the ranks run on.

    Attributes:
        rate: useful FLOP/s of one rank on this mask (operations of pairs that attend).
        inside: bytes per second that a rank sends within its machine.
        between: bytes per second that it sends to another one.
        node: ranks of a machine.
        itemsize: bytes of a number.
    """

    rate: float
    inside: float
    between: float
    node: int = 8
    itemsize: int = 2

    def __post_init__(self) -> None:
        for name in ("rate", "inside", "between", "node", "itemsize"):
            if not getattr(self, name) > 0:
                raise InputError(f"Machine({name}={getattr(self, name)!r}): expected above 0.")


@dataclass(frozen=True)
class Cost:
    """What one scheme comes to.

    Attributes:
        scheme: its name.
        compute: seconds of the busiest rank.
        exchange: seconds of sending.
        sent: bytes that a rank sends.
        memory: bytes of keys and values that a rank holds at most.
        alone: seconds of one rank with everything.
        ranks: N.
    """

    scheme: str
    compute: float
    exchange: float
    sent: float
    memory: float
    alone: float
    ranks: int

    @property
    def apart(self) -> float:
        """Seconds, if nothing overlaps."""
        return self.compute + self.exchange

    @property
    def together(self) -> float:
        """Seconds, if everything overlaps."""
        return max(self.compute, self.exchange)

    @property
    def efficiency(self) -> tuple[float, float]:
        """Speed-up by ranks, without and with overlap."""
        return (
            self.alone / self.apart / self.ranks,
            self.alone / self.together / self.ranks,
        )

    def row(self) -> dict[str, Any]:
        """As JSON."""
        none, all_ = self.efficiency
        return {
            "scheme": self.scheme, "ranks": self.ranks, "compute_seconds": self.compute,
            "exchange_seconds": self.exchange, "sent_bytes": self.sent,
            "held_bytes": self.memory, "seconds_apart": self.apart,
            "seconds_together": self.together, "speed_up_apart": none * self.ranks,
            "speed_up_together": all_ * self.ranks, "efficiency_apart": none,
            "efficiency_together": all_,
        }  # fmt: skip


def loads(work: Tensor, sharding: Sharding) -> list[float]:
    """Pairs of each rank's queries, from the keys that each query sees (S,)."""
    return [float(work[i].sum()) for i in sharding.index]


def cost(
    scheme: str | Scheme,
    sizes: Sizes,
    pairs: Sequence[float],
    machine: Machine,
    *,
    backward: bool = False,
) -> Cost:
    """Time of one attention, forward, or with `backward` both.

    Args:
        scheme: by name; group-cast counts as if everyone saw everything.
        sizes: of the attention.
        pairs: of each rank's queries, see `loads`.
        machine: rates.
        backward: count the backward too, 2.5 times the forward's operations.

    Raises:
        InputError: the scheme can't run on these sizes.
    """
    name, made = scheme if isinstance(scheme, str) else repr(scheme), scheme_of(scheme)
    told = volume(made, sizes)
    times = 3.5 if backward else 1.0
    flops = 2.0 * sizes.width * sizes.heads * sizes.batch * times
    u = made.degree(sizes.ranks) if isinstance(made, Ulysses) else 1
    rings, head_first = sizes.ranks // u, getattr(made, "placement", "head") == "head"
    groups = (group_ranks(ring, u, rings, head_first) for ring in range(rings))
    # U ranks put their rows together, and each has its share of their heads.
    busiest = max(sum(pairs[r] for r in group) for group in groups) / u
    seconds, sent = _exchange(made, told, sizes, machine, u, backward)
    return Cost(
        scheme=name,
        compute=flops * busiest / machine.rate,
        exchange=seconds,
        sent=sent,
        memory=_held(made, sizes, u) * machine.itemsize,
        alone=flops * sum(pairs) / machine.rate,
        ranks=sizes.ranks,
    )


def _exchange(
    scheme: Scheme, told: Volume, sizes: Sizes, machine: Machine, u: int, backward: bool
) -> tuple[float, float]:
    """(seconds, bytes) of sending, all-to-all and ring one after the other."""
    seconds = total = 0.0
    head_first = not isinstance(scheme, Ulysses) or scheme.placement == "head"
    rings = sizes.ranks // u
    for back in (False, True) if backward else (False,):
        some = told.backward if back else told.forward
        for what in some:
            one = replace(told, forward={what: some[what]}, backward={what: some[what]})
            amount = one.bytes(machine.itemsize, backward=back)
            total += amount
            if what in ("kv", "dkv"):
                step = u if head_first else 1  # how far apart ranks of a ring sit
                seconds += _ring(amount, rings, step, float(told.crossing), machine)
            else:
                seconds += _all_to_all(amount, u, 1 if head_first else rings, machine)
    return seconds, total


def _ring(amount: float, rings: int, step: int, crossing: float, machine: Machine) -> float:
    if rings * step <= machine.node:
        return amount / machine.inside
    if crossing >= 1.0:
        return amount / machine.between
    # Windows: what crosses travels while the inner rings run.
    window = round(rings / (crossing * (rings - 1) + 1))
    inner = machine.inside if window * step <= machine.node else machine.between
    return max(amount * (1 - crossing) / inner, amount * crossing / machine.between)


def _all_to_all(amount: float, u: int, step: int, machine: Machine) -> float:
    near = max(1, min(u, machine.node // step))
    if near >= u:
        return amount / machine.inside
    outside = amount * (u - near) / (u - 1)
    return max((amount - outside) / machine.inside, outside / machine.between)


def _held(scheme: Scheme, sizes: Sizes, u: int) -> float:
    """Numbers of keys and values: two chunks of a ring, or the whole sequence."""
    inner = scheme.inner if isinstance(scheme, Ulysses) else scheme
    heads = math.lcm(sizes.kv_heads, u) / u if u > 1 else sizes.kv_heads
    rings = sizes.ranks // u
    tokens = sizes.length / rings
    if rings > 1:
        copies = 2.0 + (isinstance(inner, Ring) and inner.window is not None)
        tokens = copies * tokens if isinstance(inner, Ring) else float(sizes.length)
    return tokens * heads * sizes.width * sizes.batch


def candidates(ranks: int, heads: int, node: int) -> list[str]:
    """Schemes worth a look on so many ranks, all that can run there."""
    found = ["ring", "all-gather"]
    if heads % ranks == 0 and ranks > 1:
        found.append("ulysses")
    for u in range(2, ranks):
        if ranks % u or heads % u or u > max(node, 8):
            continue
        found.append(f"usp(ulysses={u})")
        rings = ranks // u
        windows = [w for w in range(2, rings) if rings % w == 0]
        if windows:
            w = min(windows, key=lambda w: (abs(w - math.sqrt(rings)), w))
            found.append(f"loongtrain(ulysses={u}, window={w})")
            if u <= node // 2:
                found.append(f"loongtrain(ulysses={u}, window={w}, placement='context')")
    return found


def rate_in(path: Path, mask: str) -> float:
    """FLOP/s of the fastest forward of a mask among the results of `foveate bench kernels`.

    Args:
        path: a results.jsonl, or the folder that holds it.
        mask: a name of the catalogue.

    Raises:
        InputError: it can't be read, or holds no forward of that mask.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        found: dict[str, float] = {}
        for record in records:
            cell = record["cell"]
            if cell.get("direction") == "forward":
                for result in record["values"].get("results", ()):
                    name, rate = cell["mask"], result.get("tflops", 0.0) * 1e12
                    found[name] = max(found.get(name, 0.0), rate)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected the results of foveate bench kernels ({type(error).__name__})."
        ) from error
    if not found.get(mask):
        raise InputError(
            f"{path} holds no forward of {mask!r}; run foveate bench kernels --masks {mask}, or "
            f"give one of: {', '.join(sorted(found)) or 'none'}."
        )
    return found[mask]


def measured_rate(head_dim: int, length: int = 2048) -> float:
    """FLOP/s of causal attention by the core op on this machine, fp32, here and now."""
    q, k, v = torch.randn(3, 1, 2, length, head_dim).unbind(0)
    mask = causal()
    pairs = mask.pairs(length, length)
    seconds = []
    for _ in range(4):  # the first one also builds what is kept
        start = time.perf_counter()
        attention(q, k, v, mask)
        seconds.append(time.perf_counter() - start)
    return 4.0 * pairs * 2 * head_dim / median(seconds[1:])
