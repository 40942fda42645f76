"""What fits: weights, cache and activations against memory, and the times that follow.

Weights are spread evenly over all chips (tensor or expert parallel); a sequence's cache lies on one
chip (attention data-parallel), or on `ranks` of them (tensor-parallel: heads are split, an entry
that all heads share is copied, or its latent is cut into groups, as TPLA does). Of activations it
counts what a chip holds at once while it runs a chunk of a prompt: the residual and its norm, and
the widest of attention's or the feed-forward's inner maps, in 16 bit; and logits in fp32 for each
sequence. A share of memory is left alone, for everything else.

    TTFT = max(operations / X, weights / M for each chunk)     of a prompt of n tokens, on all chips
    TPOT = max(operations / X, (weights touched + caches) / M) of a step over the whole batch, on
           the chip that has most sequences

Both are divided by what kernels reach of the roofline. Communication is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from foveate.cost.hardware import Chip
from foveate.cost.layer import Model
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

LONGEST = 2**40  # contexts that are looked at


@dataclass(frozen=True)
class Machine:
    """Chips that serve a model together.

    Attributes:
        chip: of one kind.
        count: how many.
        ranks: of them share a sequence's cache.
        groups: into which an MLA's latent is cut (TPLA).
        weight_bytes, kv_bytes: of each number.
        reserve: share of memory that is left alone.
        chunk: tokens of a prompt that run at once.
        efficiency: share of the roofline that kernels reach.

    Raises:
        InputError: numbers out of range, or ranks that don't divide the chips.
    """

    chip: Chip
    count: int = 8
    ranks: int = 1
    groups: int = 1
    weight_bytes: float = 1.0
    kv_bytes: float = 1.0
    reserve: float = 0.1
    chunk: int = 4096
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        for name in ("count", "ranks", "groups", "chunk"):
            whole("machine", name, getattr(self, name), least=1)
        if self.count % self.ranks:
            raise InputError(f"{self.ranks} ranks don't divide {self.count} chips.")
        if not 0 <= self.reserve < 1 or not 0 < self.efficiency <= 1:
            raise InputError(
                f"reserve {self.reserve}, efficiency {self.efficiency}: expected 0 up to, not "
                "with, 1; and above 0, at most 1."
            )
        if not (0 < self.weight_bytes < math.inf and 0 < self.kv_bytes < math.inf):
            raise InputError("Weights and cached numbers need more than 0 bytes each.")


class Fit:
    """A model on a machine.

    Args:
        model: to serve.
        machine: where.

    Raises:
        InputError: numbers that don't divide, or groups for a model without a latent.
    """

    def __init__(self, model: Model, machine: Machine) -> None:
        self.model, self.machine = model, machine
        if machine.groups > 1 and not any(one.kind == "mla" for one in model.mixing):
            raise InputError(f"{machine.groups} groups: {model.name} has no latent to cut.")
        self._mixing = [
            one.on_rank(machine.ranks, machine.groups if one.kind == "mla" else 1)
            for one in model.mixing
        ]

    @property
    def weights(self) -> float:
        """Bytes of weights on each chip."""
        return self.model.parameters * self.machine.weight_bytes / self.machine.count

    def cache(self, context: int) -> float:
        """Bytes that one sequence takes on each of its ranks."""
        return sum(one.held(context, self.machine.kv_bytes) for one in self._mixing)

    def activations(self, context: int, sequences: float = 1) -> float:
        """Bytes in passing on a chip, of a chunk or of a step over so many sequences."""
        tokens = max(min(context, self.machine.chunk), sequences)
        inner = [one.width + one.kv for one in self.model.mixing]
        for layer in self.model.layers:
            if layer.feedforward is not None:
                inner.append(layer.feedforward.activated * (layer.feedforward.matrices - 1))
        width = 2 * self.model.dim + max(inner)
        return 2 * tokens * width + 4 * sequences * self.model.vocab

    @property
    def room(self) -> float:
        """Bytes of each chip for cache and activations; negative if the weights alone don't fit."""
        chip = self.machine.chip
        return chip.memory * (1 - self.machine.reserve) - self.weights

    def fits(self, batch: int, context: int) -> bool:
        """Whether so many sequences of this length fit."""
        places = self.machine.count // self.machine.ranks
        each = -(-batch // places)  # on the fullest chip
        return each * self.cache(context) + self.activations(context, each) <= self.room

    def largest_batch(self, context: int) -> int:
        """The most sequences of this length; 0 if not even one fits."""
        places = self.machine.count // self.machine.ranks
        if not self.fits(1, context):
            return 0
        return places * _most(lambda each: self.fits(each * places, context), 2**32)

    def longest_context(self, batch: int) -> int | None:
        """The most tokens for each of so many sequences; 0 if none fit, None if nothing bounds it.

        A model that keeps states of constant size, or windows alone, has no such bound.
        """
        whole("memory", "batch", batch, least=1)
        if not self.fits(batch, 1):
            return 0
        if self.fits(batch, LONGEST):
            return None
        return _most(lambda context: self.fits(batch, context), LONGEST)

    def time_to_first(self, context: int) -> float:
        """Seconds until the first token, of one prompt of this length that has the machine."""
        model, machine = self.model, self.machine
        flops = context * (model.linear + model.feedforward)
        flops += sum(one.prefill_flops(context) for one in model.mixing)
        flops += 2 * model.dim * model.vocab
        read = 0.0
        for begin in range(0, context, machine.chunk):
            read += model.touched(min(machine.chunk, context - begin)) * machine.weight_bytes
        return self._seconds(flops / machine.count, read / machine.count)

    def time_per_token(self, batch: int, context: int) -> float:
        """Seconds of a decoding step over so many sequences, with the cache at this length."""
        model, machine = self.model, self.machine
        each = model.linear + model.feedforward + 2 * model.dim * model.vocab
        own = -(-batch // (machine.count // machine.ranks))  # sequences of the fullest chip
        flops = batch * each / machine.count
        flops += own * sum(one.flops(context) for one in self._mixing)
        read = model.touched(batch) * machine.weight_bytes / machine.count
        read += own * sum(one.bytes(context, machine.kv_bytes) for one in self._mixing)
        return self._seconds(flops, read)

    def _seconds(self, flops: float, read: float) -> float:
        """By the roofline of one chip."""
        chip = self.machine.chip
        return max(flops / chip.peak, read / chip.bandwidth) / self.machine.efficiency


def _most(good: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that is good, where 1 is and all below a good one are."""
    low, high = 1, 2
    while high < limit and good(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
