"""Masks that depend on where query and key stand: sinks, prefix, documents, padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.base import Certainty, Mask
from foveate.ops.masks.checks import whole, whole_list


class sinks(Mask):  # noqa: N801 - masks read as words
    """Everyone sees keys 0 ... n-1."""

    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = whole("sinks", "n", n, least=0)
        super().__init__(f"sinks({self.n})")

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return (k >= 0) & (k < self.n) & (q == q)

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        same = q_lo == q_lo
        return Certainty(
            ((k_lo >= self.n) | (k_hi < 0)) & same, (k_hi < self.n) & (k_lo >= 0) & same
        )

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        return (k.clamp(-tile[1], self.n),)


class prefix(Mask):  # noqa: N801
    """The first n tokens see each other."""

    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = whole("prefix", "n", n, least=0)
        super().__init__(f"prefix({self.n})")

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return (q >= 0) & (q < self.n) & (k >= 0) & (k < self.n)

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        none = (q_lo >= self.n) | (k_lo >= self.n) | (q_hi < 0) | (k_hi < 0)
        return Certainty(none, (q_hi < self.n) & (k_hi < self.n) & (q_lo >= 0) & (k_lo >= 0))

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        return q.clamp(-tile[0], self.n), k.clamp(-tile[1], self.n)


class documents(Mask):  # noqa: N801
    """Packed sequences: tokens see tokens of their own document only.

    Args:
        cu_seqlens: boundaries 0 = c_0 <= c_1 <= ... <= c_n; document d holds positions
            c_d ... c_{d+1} - 1. The last one must be the number of keys.
    """

    __slots__ = ("_cached", "cu_seqlens")

    def __init__(self, cu_seqlens: Sequence[int] | Tensor) -> None:
        self.cu_seqlens = whole_list("documents", "cu_seqlens", cu_seqlens)
        bounds = self.cu_seqlens
        if len(bounds) < 2 or bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:])):
            raise InputError(
                "documents(cu_seqlens): expected boundaries that start with 0 and never fall, "
                f"at least two of them; got {_short(bounds)}."
            )
        self._cached: dict[torch.device, Tensor] = {}
        super().__init__(f"documents({list(bounds)})")

    def _check(self, q_len: int, kv_len: int) -> None:
        if self.cu_seqlens[-1] != kv_len:
            raise InputError(
                f"documents(cu_seqlens) ends at {self.cu_seqlens[-1]} but there are {kv_len} keys; "
                "the last boundary must be the number of keys."
            )

    def _document(self, position: Tensor) -> Tensor:
        bounds = self._cached.get(position.device)
        if bounds is None:
            bounds = torch.tensor(self.cu_seqlens, device=position.device)
            self._cached[position.device] = bounds
        return torch.bucketize(position.contiguous(), bounds, right=True)

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        mine, theirs = self._document(q), self._document(k)
        return (mine == theirs) & (mine > 0) & (mine < len(self.cu_seqlens))

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        q0, q1, k0, k1 = (self._document(x) for x in (q_lo, q_hi, k_lo, k_hi))
        none = (q1 < k0) | (k1 < q0)
        inside = (q0 > 0) & (q1 < len(self.cu_seqlens))
        return Certainty(none, (q0 == q1) & (k0 == k1) & (q0 == k0) & inside)


class padding(Mask):  # noqa: N801
    """Batches of unequal lengths: a key is seen if its position is 0 ... lengths[b] - 1.

    Right padding needs nothing else; for left padding, give `kv_positions` that count from each
    sequence's first real token (negative on the padding).
    """

    __slots__ = ("lengths",)

    def __init__(self, lengths: Sequence[int] | Tensor) -> None:
        self.lengths = whole_list("padding", "lengths", lengths)
        if not self.lengths:
            raise InputError(
                "padding(lengths): expected one length for each batch entry, got none."
            )
        super().__init__(f"padding({list(self.lengths)})")

    @override
    def groups(self) -> tuple[int, int]:
        return (len(self.lengths), 1)

    def _check(self, q_len: int, kv_len: int) -> None:
        if max(self.lengths) > kv_len:
            raise InputError(
                f"padding(lengths) holds {max(self.lengths)} but there are only {kv_len} keys."
            )

    def _length(self, b: int) -> int:
        return self.lengths[b if len(self.lengths) > 1 else 0]

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return (k >= 0) & (k < self._length(b)) & (q == q)

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        same = q_lo == q_lo
        length = self._length(b)
        return Certainty(
            ((k_lo >= length) | (k_hi < 0)) & same, (k_hi < length) & (k_lo >= 0) & same
        )

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        return (k.clamp(-tile[1], self._length(b)),)


def _short(values: tuple[int, ...]) -> str:
    if len(values) <= 8:
        return str(list(values))
    return f"[{', '.join(map(str, values[:4]))}, ..., {', '.join(map(str, values[-2:]))}]"
