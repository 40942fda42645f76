"""What Combiner keeps of the past: lanes, each of sequences that stand at the same position.

Blocks close by position, so sequences of different padding are stepped apart: a lane holds the
whole batch where all stand together, else there is one for each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from foveate.parts.cache import Field
from foveate.parts.kv_cache import TokenCache, token_field
from foveate.parts.state import State


class Lane:
    """Named lists (B, H, n, W) that grow, and named tensors (B, ...) that are replaced.

    Attributes:
        length: real tokens so far.
    """

    def __init__(self) -> None:
        self.length = 0
        self._lists: dict[str, TokenCache] = {}
        self._values: dict[str, Tensor] = {}

    def append(self, name: str, x: Tensor) -> Tensor:
        """Add x (B, H, n, W) to a list and give back all of it."""
        if name not in self._lists:
            self._lists[name] = TokenCache([token_field(name, x.shape[1], x.shape[3])])
        return self._lists[name].append({name: x})[name]

    def all(self, name: str) -> Tensor | None:
        """A list, None if nothing is on it."""
        held = self._lists.get(name)
        return None if held is None or not len(held) else held.entries[name]

    def empty(self, *names: str) -> None:
        """Forget lists and values."""
        for name in names:
            self._values.pop(name, None)
            if name in self._lists:
                self._lists[name].truncate(0)

    def put(self, name: str, x: Tensor) -> None:
        """Replace a value."""
        self._values[name] = x

    def get(self, name: str) -> Tensor | None:
        """A value, None if there is none."""
        return self._values.get(name)

    def tensors(self) -> dict[str, Tensor]:
        """All that is held."""
        lists = {name: held.entries[name] for name, held in self._lists.items() if len(held)}
        return lists | self._values

    def picked(self, rows: Tensor) -> Lane:
        """A lane of these rows."""
        made = Lane()
        made.length = self.length
        for name, x in self.tensors().items():
            if name in self._values:
                made.put(name, x.index_select(0, rows.to(x.device)))
            else:
                made.append(name, x.index_select(0, rows.to(x.device)))
        return made


class CombinerState(State):
    """The lanes of a batch; see `Lane`."""

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self.lanes: list[list[Lane]] = []  # of each lane one for each part of a mixture
        self.rows = 0

    @property
    @override
    def batch(self) -> int | None:
        return self.rows or None

    def lane_rows(self) -> list[slice]:
        """The rows of the batch that each lane holds."""
        if len(self.lanes) == 1:
            return [slice(0, self.rows)]
        return [slice(i, i + 1) for i in range(len(self.lanes))]

    @override
    def bytes(self) -> int:
        held = [x for lanes in self.lanes for lane in lanes for x in lane.tensors().values()]
        return sum(x.numel() * x.element_size() for x in held)

    @override
    def reset(self) -> None:
        super().reset()
        self.lanes, self.rows = [], 0

    @override
    def reorder(self, rows: Tensor) -> None:
        rows = rows.cpu()
        if len(self.lanes) == 1:
            self.lanes = [[lane.picked(rows) for lane in self.lanes[0]]]
        elif self.lanes:
            one = torch.zeros(1, dtype=torch.int64, device="cpu")
            self.lanes = [[lane.picked(one) for lane in self.lanes[row]] for row in rows.tolist()]
        self.rows = len(rows) if self.lanes else 0
