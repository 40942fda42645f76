"""Who does what: attention ranks, FFN ranks, and what is in flight between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole

DISPATCHES = ("plain", "fp8")


@dataclass(frozen=True)
class Plan:
    """How a model is spread over ranks; the same on all of them.

    Ranks 0 to attention - 1 are the attention ranks: norms, attention with its caches, routers,
    embedding and head, data-parallel over sequences. Behind them stand `ffn` instances of `tp`
    ranks each, without state: an instance has a part of the experts (EP), each of its ranks a part
    of their width (TP). Dense layers and shared experts are split by width over all FFN ranks.

    Attributes:
        attention: attention ranks, N_A.
        ffn: FFN instances, N_F.
        tp: ranks of an FFN instance.
        micro_batches: in flight on each attention rank, b; 3 fill both sides and both ways.
        rows: most sequences of a micro-batch, and most prompt tokens of it in one pass; a multiple
            of tp. Buffers are registered for this size.
        dispatch: "plain" sends tokens as they are, "fp8" as float8_e4m3 with a scale each.
        patience: seconds without a message until a rank counts as stalled.

    Raises:
        InputError: a number below 1, or rows that don't split over tp.
    """

    attention: int = 1
    ffn: int = 1
    tp: int = 1
    micro_batches: int = 3
    rows: int = 8
    dispatch: Literal["plain", "fp8"] = "plain"
    patience: float = 30.0

    def __post_init__(self) -> None:
        for name in ("attention", "ffn", "tp", "micro_batches", "rows"):
            whole("Plan", name, getattr(self, name), least=1)
        if self.rows % self.tp:
            raise InputError(f"Plan(rows={self.rows}): expected a multiple of tp={self.tp}.")
        if self.dispatch not in DISPATCHES:
            raise InputError(
                f"Plan(dispatch={self.dispatch!r}) is unknown; "
                f"{nearest(str(self.dispatch), DISPATCHES)}"
            )
        if not self.patience > 0:
            raise InputError(f"Plan(patience={self.patience}): expected seconds above 0.")

    @property
    def ffn_ranks(self) -> int:
        """Ranks on the FFN side, N_F tp."""
        return self.ffn * self.tp

    @property
    def size(self) -> int:
        """All ranks."""
        return self.attention + self.ffn_ranks

    @property
    def share(self) -> int:
        """Rows of a micro-batch that go to one rank of an FFN instance."""
        return self.rows // self.tp

    def name(self, rank: int) -> str:
        """What a rank is called: "attention-0", "ffn-1", or "ffn-1.0" where tp is above 1."""
        if rank < self.attention:
            return f"attention-{rank}"
        instance, part = divmod(rank - self.attention, self.tp)
        return f"ffn-{instance}" if self.tp == 1 else f"ffn-{instance}.{part}"

    @property
    def names(self) -> tuple[str, ...]:
        """All ranks' names, in order."""
        return tuple(self.name(rank) for rank in range(self.size))
