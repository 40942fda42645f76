"""What goes over the wire: one flat buffer for a share of a micro-batch, of a fixed size.

    there  header | tokens (c, dim) | scales (c,) with fp8 | expert ids (c, k) | weights (c, k)
    back   header | partial result (c, dim)

c rows are room for; the header says how many count. Buffers of fixed size and place can be
registered once and for all, and be written by any peer while others are read (Step-3's StepMesh).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from foveate.ops.errors import FoveateError
from foveate.parallel.disaggregate.experts import Routes
from foveate.parallel.disaggregate.plan import Plan

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
ALIGNED = 64  # bytes; every part of a buffer starts at a multiple
HEADER = 8  # int64 numbers


class OutOfStepError(FoveateError, RuntimeError):
    """A message is not the one that was expected: ranks run different models or plans."""


@dataclass(frozen=True)
class Head:
    """What a message is about.

    rows: that count. done: its sender has nothing left to decode (there), or nobody has (back).
    arrival: nanoseconds of the monotonic clock before which a paced link holds it back, 0 for
    none. sent: when it was sent, for the trace.
    """

    layer: int
    micro_batch: int
    turn: int
    rows: int
    done: bool = False
    arrival: int = 0
    sent: int = 0

    def expect(self, layer: int, micro_batch: int, turn: int, sender: str) -> None:
        """Check that this is what comes next from a sender.

        Raises:
            OutOfStepError: it is something else.
        """
        got, wanted = (self.layer, self.micro_batch, self.turn), (layer, micro_batch, turn)
        if got != wanted:
            raise OutOfStepError(
                f"{sender} sent (layer, micro-batch, pass) {got} where {wanted} was expected; do "
                "all ranks run the same model and plan?"
            )


class Layout:
    """Where the parts of a buffer are: views by name into flat bytes.

    Args:
        parts: name -> (shape, dtype), in order; a header comes first.
    """

    def __init__(self, parts: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.parts = {"head": ((HEADER,), torch.int64)} | parts
        self.bytes = 0
        self.at: dict[str, int] = {}
        for name, (shape, dtype) in self.parts.items():
            self.at[name] = self.bytes
            size = prod(shape) * dtype.itemsize
            self.bytes += -(-size // ALIGNED) * ALIGNED

    def buffer(self, device: torch.device) -> Tensor:
        """A fresh buffer, zeroed so that what isn't written is harmless."""
        return torch.zeros(self.bytes, dtype=torch.uint8, device=device)

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """A part of the buffer, in its shape and dtype, sharing its memory."""
        shape, dtype = self.parts[name]
        start = self.at[name]
        flat = buffer[start : start + prod(shape) * dtype.itemsize]
        return flat.view(dtype).view(shape)

    def write_head(self, buffer: Tensor, head: Head) -> None:
        """Put the header in."""
        what = (head.layer, head.micro_batch, head.turn, head.rows)
        numbers = (*what, int(head.done), head.arrival, head.sent, 0)
        self.view(buffer, "head").copy_(torch.tensor(numbers, dtype=torch.int64))

    def head(self, buffer: Tensor) -> Head:
        """Read the header."""
        layer, micro, turn, rows, done, arrival, sent, _ = self.view(buffer, "head").tolist()
        return Head(layer, micro, turn, rows, bool(done), arrival, sent)


class Forth(Layout):
    """Attention to FFN; k is the most experts of a token in any layer, 0 without experts."""

    def __init__(self, plan: Plan, dim: int, top_k: int, dtype: torch.dtype) -> None:
        c, self.quantised, self.dtype = plan.share, plan.dispatch == "fp8", dtype
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]]
        parts = {"tokens": ((c, dim), FP8 if self.quantised else dtype)}
        if self.quantised:
            parts["scales"] = ((c,), torch.float32)
        weights = torch.promote_types(dtype, torch.float32)
        parts |= {"ids": ((c, top_k), torch.int32), "weights": ((c, top_k), weights)}
        super().__init__(parts)

    def write(self, buffer: Tensor, rows: Tensor, routes: Routes | None) -> None:
        """Put rows (n, dim), n <= c, and where they go in."""
        n = len(rows)
        if self.quantised:
            tokens, scales = quantised(rows)
            self.view(buffer, "tokens")[:n] = tokens
            self.view(buffer, "scales")[:n] = scales
        else:
            self.view(buffer, "tokens")[:n] = rows
        if routes is not None:
            k = routes.ids.shape[1]
            self.view(buffer, "ids")[:n, :k] = routes.ids
            self.view(buffer, "ids")[:n, k:] = -1
            self.view(buffer, "weights")[:n, :k] = routes.weights

    def read(self, buffer: Tensor, n: int) -> tuple[Tensor, Routes]:
        """The first n rows in the model's dtype, and their experts."""
        tokens = self.view(buffer, "tokens")[:n]
        if self.quantised:
            tokens = restored(tokens, self.view(buffer, "scales")[:n], self.dtype)
        routes = Routes(self.view(buffer, "ids")[:n], self.view(buffer, "weights")[:n])
        return tokens, routes


class Back(Layout):
    """FFN to attention: partial results in the model's dtype."""

    def __init__(self, plan: Plan, dim: int, dtype: torch.dtype) -> None:
        super().__init__({"rows": ((plan.share, dim), dtype)})


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, dim) as float8_e4m3 and a scale (n,) each: x is close to tokens * scale."""
    wide = rows.to(torch.float32)
    scales = wide.abs().amax(-1).clamp_min(1e-30) / FP8_MOST
    return (wide / scales[:, None]).clamp(-FP8_MOST, FP8_MOST).to(FP8), scales


def restored(tokens: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantised` tokens stand for."""
    return (tokens.to(torch.float32) * scales[:, None]).to(dtype)
