"""Attention and FFN on different machines: the pipeline in closed form and event by event (G2).

b micro-batches go round: attention, network, FFN, network, attention of the next layer. Each of the
four is serial: it works on one micro-batch at a time, in the order in which they come; the two
directions of the network are independent. Where all L layers take the same times, in steady state

    TPOT = L max( b t_A, b t_F, b c_AF, b c_FA, t_A + c_AF + t_F + c_FA )

In general the sums over layers are a bound that no schedule passes. `simulate` plays the events and
also knows several instances of either side, slow ones among them: an FFN instance starts when every
attention instance has delivered, an attention instance goes on when every FFN instance has
answered.

Source: StepFun 2025, arXiv 2507.19427, section 5; the formula is inferred from its figures.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole


@dataclass(frozen=True)
class Stages:
    """Seconds of one micro-batch in one layer.

    Attributes:
        attention: t_A, everything on the attention side.
        to_ffn: c_AF, of the transfer there.
        ffn: t_F.
        back: c_FA, of the transfer back.

    Raises:
        InputError: a time that is negative or no number, or no time at all.
    """

    attention: float
    to_ffn: float
    ffn: float
    back: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise InputError(f"Stages({field.name}={value!r}): expected seconds, 0 or more.")
        if not self.round_trip:
            raise InputError("Stages: all four times are 0; at least one must take time.")

    @property
    def round_trip(self) -> float:
        """Seconds of a micro-batch that waits for nobody."""
        return self.attention + self.to_ffn + self.ffn + self.back

    @property
    def each(self) -> tuple[float, float, float, float]:
        """In the order of a round."""
        return self.attention, self.to_ffn, self.ffn, self.back


NAMES = ("attention", "network to FFN", "FFN", "network back")


@dataclass(frozen=True)
class Steady:
    """The pipeline in steady state.

    Attributes:
        tpot: seconds for each token of a sequence.
        bottleneck: what sets it: one of NAMES, or "round trip".
        busy: by name, the share of the time that each of the four works.
    """

    tpot: float
    bottleneck: str
    busy: dict[str, float]


def steady(layers: Sequence[Stages], micro_batches: int) -> Steady:
    """The closed form: exact where all layers take the same times, else what no schedule passes.

    Args:
        layers: times of each layer; `[stages] * L` for equal ones.
        micro_batches: b, in flight together.

    Raises:
        InputError: no layers, or no micro-batch.
    """
    whole("pipeline", "micro_batches", micro_batches, least=1)
    if not layers:
        raise InputError("A pipeline needs the times of at least one layer.")
    sums = [micro_batches * math.fsum(at) for at in zip(*(one.each for one in layers))]
    limits = dict(zip(NAMES, sums))
    limits["round trip"] = math.fsum(one.round_trip for one in layers)
    name = max(limits, key=lambda key: limits[key])
    tpot = limits[name]
    return Steady(tpot, name, {key: total / tpot for key, total in zip(NAMES, sums)})


@dataclass(frozen=True)
class Event:
    """A piece of work: seconds at which it began and ended.

    Attributes:
        stage: index into NAMES.
        instance: of that side.
        micro_batch, token, layer: whose work it was.
        start, end: seconds.
    """

    stage: int
    instance: int
    micro_batch: int
    token: int
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Played:
    """What a simulation saw.

    Attributes:
        tpot: seconds for each token over the second half of the tokens, mean of the micro-batches.
        tokens: by micro-batch, the time at which each of its tokens was done.
        events: all of them, in the order of their beginnings at each resource.
    """

    tpot: float
    tokens: list[list[float]]
    events: list[Event]


def simulate(
    layers: Sequence[Stages],
    micro_batches: int,
    tokens: int = 8,
    *,
    attention: Sequence[float] = (1.0,),
    ffn: Sequence[float] = (1.0,),
) -> Played:
    """Play the pipeline from a standing start.

    Args:
        layers: times of each layer.
        micro_batches: in flight together; all are ready at the start.
        tokens: that each of them decodes.
        attention: for each attention instance, how many times as long as `layers` says it and its
            link take.
        ffn: the same for FFN instances.

    Raises:
        InputError: no layers, micro-batches, instances, fewer than 2 tokens, or a factor not above
            0.
    """
    whole("pipeline", "micro_batches", micro_batches, least=1)
    whole("pipeline", "tokens", tokens, least=2)
    if not layers:
        raise InputError("A pipeline needs the times of at least one layer.")
    for name, factors in (("attention", attention), ("ffn", ffn)):
        if not factors or not all(math.isfinite(f) and f > 0 for f in factors):
            raise InputError(
                f"{name}={list(factors)}: expected a factor above 0 for each instance."
            )
    slow = (attention, attention, ffn, ffn)  # whose factors each stage takes
    times = [one.each for one in layers]
    rounds = tokens * len(layers)
    order = itertools.count()
    ready = [(0.0, next(order), 0, i, m, 0) for m in range(micro_batches)
             for i in range(len(attention))]  # fmt: skip
    heapq.heapify(ready)
    free: dict[tuple[int, int], float] = {}
    waiting: dict[tuple[int, int], tuple[int, float]] = {}
    done: list[list[float]] = [[] for _ in range(micro_batches)]
    events = []
    while ready:
        now, _, stage, instance, micro, number = heapq.heappop(ready)
        token, layer = divmod(number, len(layers))
        begin = max(now, free.get((stage, instance), 0.0))
        end = begin + times[layer][stage] * slow[stage][instance]
        free[stage, instance] = end
        events.append(Event(stage, instance, micro, token, layer, begin, end))
        if stage in (0, 2):  # its own link carries it on
            heapq.heappush(ready, (end, next(order), stage + 1, instance, micro, number))
            continue
        left, latest = waiting.get((stage, micro), (len(slow[stage]), 0.0))
        waiting[stage, micro] = (left - 1, max(latest, end))
        if left > 1:
            continue
        _, arrived = waiting.pop((stage, micro))  # of the last one
        if stage == 1:
            for i in range(len(ffn)):
                heapq.heappush(ready, (arrived, next(order), 2, i, micro, number))
            continue
        if layer == len(layers) - 1:
            done[micro].append(arrived)
        if number + 1 < rounds:
            for i in range(len(attention)):
                heapq.heappush(ready, (arrived, next(order), 0, i, micro, number + 1))
    half = tokens // 2
    spans = [(at[-1] - at[half - 1]) / (tokens - half) for at in done]
    return Played(math.fsum(spans) / micro_batches, done, events)
