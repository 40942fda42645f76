"""CausalApproxD: causal attention as exact triangles and rectangles to estimate.

    causal(Q, K, V):  n <= min_seq_len: exact
                      else: causal(first half), causal(second half), and the rectangle of the second
                      half's queries on the first half's keys, merged by lse

(HyperAttention, algorithm 4). Unrolled here into a list, since every piece is a set of (query, key)
pairs of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Queries q0 ... q1 - 1 on keys k0 ... k1 - 1, `sinks` more keys seen exactly.

    Attributes:
        q0: first query.
        q1: past the last query.
        k0: first key.
        k1: past the last key.
        causal: a triangle, as many queries as keys, computed exactly.
        blocks: diagonal blocks that its sorted keys are cut into; 1 is exact.
        sinks: keys 0 ... sinks - 1 are seen by all its queries, and stand before k0.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    blocks: int = 1
    sinks: int = 0

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.q1 - self.q0

    @property
    def keys(self) -> int:
        """Number of keys, sinks apart."""
        return self.k1 - self.k0

    @property
    def estimated(self) -> bool:
        """Whether anything is left out of its blocks."""
        return self.blocks > 1

    @property
    def query_block(self) -> int:
        """Queries of a block."""
        return -(-self.queries // self.blocks)


def pieces_of(
    queries: int, keys: int, *, causal: bool, min_seq_len: int, block_size: int, sinks: int = 0
) -> list[Piece]:
    """What attention of `queries` on `keys` is made of.

    Args:
        queries: number of queries; causal ones stand at the end of the keys.
        keys: number of keys.
        causal: whether queries see no later keys.
        min_seq_len: triangles of up to so many queries, and rectangles of fewer, are exact.
        block_size: keys of a diagonal block.
        sinks: so many first keys of the sequence count as heavy for all.
    """

    def rectangle(q0: int, q1: int, k0: int, k1: int) -> Piece:
        own = min(sinks, k1) if k0 == 0 else 0
        blocks = -(-(k1 - own - k0) // block_size)
        if q1 - q0 < max(2, min_seq_len) or blocks < 2:
            return Piece(q0, q1, k0, k1)
        return Piece(q0, q1, k0 + own, k1, blocks=blocks, sinks=own)

    if not causal:
        return [rectangle(0, queries, 0, keys)]
    shift = keys - queries
    found = [rectangle(0, queries, 0, shift)] if shift else []

    def halve(first: int, last: int) -> None:
        if last - first <= min_seq_len:
            found.append(Piece(first, last, first + shift, last + shift, causal=True))
            return
        middle = first + -(-(last - first) // 2)
        halve(first, middle)
        halve(middle, last)
        found.append(rectangle(middle, last, first + shift, middle + shift))

    halve(0, queries)
    return found
