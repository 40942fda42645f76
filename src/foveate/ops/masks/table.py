"""Masks told by a table or confined to a rectangle: blocks and region."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.base import Certainty, Mask
from foveate.ops.masks.checks import whole


class blocks(Mask):  # noqa: N801 - masks read as words
    """A boolean table over tiles of positions; `blocks(tensor, 1)` is any dense boolean mask.

    Args:
        tensor: bool (Tq, Tk), (H, Tq, Tk) or (B or 1, H or 1, Tq, Tk); True = attend.
        tile: size of a tile, or (query tile, key tile), in positions.

    Position p belongs to row and column p // tile. A square-tiled table may leave out its first
    rows where fewer queries than keys stand at the end: its last row is the last key's.
    """

    __slots__ = ("_sums", "_skipped", "table", "tile")

    def __init__(self, tensor: Tensor, tile: int | tuple[int, int]) -> None:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(
                f"blocks(tensor): expected a boolean tensor (True = attend), got {what}; "
                "compare first, for example scores > threshold."
            )
        if tensor.dim() not in (2, 3, 4):
            raise InputError(
                "blocks(tensor): expected shape (Tq, Tk), (H, Tq, Tk) or (B, H, Tq, Tk), got "
                f"{tuple(tensor.shape)}."
            )
        self.table = tensor[(None,) * (4 - tensor.dim())]
        pair = tile if isinstance(tile, tuple) else (tile, tile)
        self.tile = tuple(whole("blocks", "tile", t, least=1) for t in pair)
        rows, cols = self.table.shape[2:]
        self._skipped = cols - rows if self.tile[0] == self.tile[1] else 0
        self._sums: tuple[tuple[object, ...], Tensor] | None = None
        size = self.tile[0] if self.tile[0] == self.tile[1] else self.tile
        super().__init__(f"blocks($0$, {size})", (tensor,))

    @override
    def groups(self) -> tuple[int, int]:
        return (self.table.shape[0], self.table.shape[1])

    def _check(self, q_len: int, kv_len: int) -> None:
        rows, cols = self.table.shape[2:]
        q_tile, k_tile = self.tile
        if cols != -(-kv_len // k_tile):
            raise InputError(
                f"blocks(tensor, {self.tile}): {kv_len} keys make {-(-kv_len // k_tile)} columns, "
                f"but the table has {cols}."
            )
        first, last = (kv_len - q_len) // q_tile, (kv_len - 1) // q_tile
        if q_len and (self._skipped > first or self._skipped + rows <= last):
            raise InputError(
                f"blocks(tensor, {self.tile}): {q_len} queries at the end of {kv_len} positions "
                f"need rows {first} to {last}, but the table's {rows} rows stand for "
                f"{self._skipped} to {self._skipped + rows - 1}."
            )

    def _pick(self, b: int, h: int) -> Tensor:
        batches, heads = self.groups()
        return self.table[b if batches > 1 else 0, h if heads > 1 else 0]

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        table = self._pick(b, h)
        rows, cols = q // self.tile[0] - self._skipped, k // self.tile[1]
        inside = (rows >= 0) & (cols >= 0) & (rows < table.shape[0]) & (cols < table.shape[1])
        rows, cols = rows.clamp(0, table.shape[0] - 1), cols.clamp(0, table.shape[1] - 1)
        return table.to(q.device)[rows, cols] & inside

    def _counted(self, b: int, h: int, device: torch.device) -> Tensor:
        """Sums of the table over everything above and left; the last one asked for is kept."""
        version = None if self.table.is_inference() else self.table._version
        key = (b, h, version, device)
        kept = self._sums  # read once: another thread may ask for another head meanwhile
        if version is not None and kept is not None and kept[0] == key:
            return kept[1]
        table = self._pick(b, h)
        small = torch.int32 if table.numel() < 2**31 else torch.int64
        sums = torch.zeros(table.shape[0] + 1, table.shape[1] + 1, dtype=small, device=device)
        sums[1:, 1:] = table.to(device).cumsum(0, dtype=small).cumsum(1, dtype=small)
        self._sums = (key, sums)
        return sums

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        table = self._pick(b, h)
        sums = self._counted(b, h, q_lo.device)
        r0, r1 = (x // self.tile[0] - self._skipped for x in (q_lo, q_hi))
        c0, c1 = (x // self.tile[1] for x in (k_lo, k_hi))
        area = (r1 - r0 + 1) * (c1 - c0 + 1)
        r0, r1 = r0.clamp(0, table.shape[0]), (r1 + 1).clamp(0, table.shape[0])
        c0, c1 = c0.clamp(0, table.shape[1]), (c1 + 1).clamp(0, table.shape[1])
        seen = sums[r1, c1] - sums[r0, c1] - sums[r1, c0] + sums[r0, c0]
        return Certainty(seen == 0, seen == area)

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        """The entries under the tile as one number, where it holds few of them and whole."""
        rows, cols = (max(1, t // own) for t, own in zip(tile, self.tile))
        whole_ones = (tile[0] % self.tile[0], tile[1] % self.tile[1]) == (0, 0)
        if not whole_ones or rows * cols > 60:
            return None
        if bool((q % self.tile[0]).any()) or bool((k % self.tile[1]).any()):
            return None
        number = torch.zeros_like(q)
        for i in range(rows):
            for j in range(cols):
                seen = self._element(q + i * self.tile[0], k + j * self.tile[1], b, h)
                number = number * 2 + seen
        return (number,)


class region(Mask):  # noqa: N801
    """A rectangle of the attention matrix, filled by a mask as if it were a problem of its own.

    Args:
        mask: what holds inside, its queries aligned to the end of its keys; None is everything.
        queries: (first, past the last) query position.
        keys: (first, past the last) key position.
    """

    __slots__ = ("inner", "keys", "queries")

    def __init__(self, mask: Mask | None, queries: tuple[int, int], keys: tuple[int, int]) -> None:
        self.queries, self.keys = _span("queries", queries), _span("keys", keys)
        self.inner = mask
        spec = "None" if mask is None else mask.spec
        super().__init__(
            f"region({spec}, queries={self.queries}, keys={self.keys})",
            () if mask is None else mask.tensors,
        )

    @override
    def groups(self) -> tuple[int, int]:
        return (1, 1) if self.inner is None else self.inner.groups()

    def _check(self, q_len: int, kv_len: int) -> None:
        if self.inner is not None:
            self.inner._check(self.queries[1] - self.queries[0], self.keys[1] - self.keys[0])

    def _local(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (q0, q1), (k0, k1) = self.queries, self.keys
        return q - q0 + (k1 - k0) - (q1 - q0), k - k0

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        (q0, q1), (k0, k1) = self.queries, self.keys
        inside = (q >= q0) & (q < q1) & (k >= k0) & (k < k1)
        if self.inner is None:
            return inside
        return inside & self.inner._element(*self._local(q, k), b, h)

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        (q0, q1), (k0, k1) = self.queries, self.keys
        outside = (q_hi < q0) | (q_lo >= q1) | (k_hi < k0) | (k_lo >= k1)
        within = (q_lo >= q0) & (q_hi < q1) & (k_lo >= k0) & (k_hi < k1)
        if self.inner is None:
            return Certainty(outside, within)
        lo, hi = self._local(q_lo, k_lo), self._local(q_hi, k_hi)
        inner = self.inner._tiles(lo[0], hi[0], lo[1], hi[1], b, h)
        return Certainty(outside | inner.none, within & inner.full)


def _span(name: str, span: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(span, tuple | list) or len(span) != 2:
        raise InputError(f"region({name}={span!r}): expected (first, past the last).")
    first, last = (whole("region", name, v, least=0) for v in span)
    if last < first:
        raise InputError(f"region({name}={span!r}): the end lies before the start.")
    return first, last
