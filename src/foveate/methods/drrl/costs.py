"""What low rank costs, honestly: FLOPs of a sequence and bytes of a decoding step.

Of each query head (d key width, d_v value width, pairs of queries and keys that see each other):

    full rank   2 pairs (d + d_v)
    rank r      2 pairs (r + d_v), so that at most d / (d + d_v) is ever saved
    on top      projections 2 d r of each query and key, Gram 2 d^2 of each token, eigenvectors
                10 d^3 of each key head and basis, policy 2 (3 D 64) of a token + 0.5 M a decision
                + 5 of each weight of W_Q, W_K and W_V, which it is told of once

The paper and its code count 2 n r d for all of it. Erden 2025, arXiv 2512.15973; the figures here
are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

EIGH = 10
JOINT = 6  # spectra and roots of both Gram matrices, and an svd, which is two
DECISION = 500_000
FEATURE = 5  # mean, variance and norm of a weight, once a sequence


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer.

    Attributes:
        dim: D.
        heads: query heads.
        kv_heads: key/value heads.
        key_dim: d.
        value_dim: d_v.
    """

    dim: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    def core(self, pairs: int, rank: int | None = None) -> int:
        """Scores and values of all heads; None, or d and more, is full rank."""
        width = self.key_dim if rank is None else min(rank, self.key_dim)
        return 2 * pairs * self.heads * (width + self.value_dim)

    def projections(self, queries: int, keys: int, rank: int) -> int:
        """Of queries and keys onto r columns; none at full rank."""
        if rank >= self.key_dim:
            return 0
        return 2 * self.key_dim * rank * (queries * self.heads + keys * self.kv_heads)

    def basis(self, tokens: int, *, queries: bool = False) -> int:
        """A Gram matrix of so many new keys (and queries), and its eigenvectors."""
        d = self.key_dim
        products = 2 * tokens * d * d * (self.kv_heads + (self.heads if queries else 0))
        return products + self.kv_heads * EIGH * d**3 * (JOINT if queries else 1)

    def decision(self, tokens: int) -> int:
        """The policy on a segment of so many tokens."""
        return 2 * 3 * self.dim * 64 * tokens + DECISION

    def features(self) -> int:
        """What the policy is told of the layer's weights."""
        width = self.heads * self.key_dim + self.kv_heads * (self.key_dim + self.value_dim)
        return FEATURE * self.dim * width


def relative(shape: Shape, rows: int, keys: int, rank: int) -> float:
    """FLOPs of a segment's rows at rank r, over those at full rank; new keys are its own rows."""
    pairs = rows * keys
    low = shape.core(pairs, rank) + shape.projections(rows, rows, rank)
    return low / shape.core(pairs)


def causal_flops(
    shape: Shape,
    length: int,
    segment: int,
    ranks: list[int],
    *,
    policy: bool,
    joint: bool = False,
    doubling: bool = False,
) -> dict[str, int]:
    """FLOPs of a causal sequence, by part, and "full" for all of it at full rank.

    Args:
        shape: of the layer.
        length: tokens.
        segment: tokens between decisions.
        ranks: of each segment; the first one's isn't looked at, it runs at full rank.
        policy: whether a policy decides.
        joint: whether queries go into the basis as well.
        doubling: whether the basis is made anew only where the past has doubled.
    """
    found = dict.fromkeys(("core", "projections", "basis", "policy"), 0)
    known = columns = made = 0
    if policy and length > segment:
        found["policy"] += shape.features()
    for number, start in enumerate(range(0, length, segment)):
        stop = min(length, start + segment)
        rows = stop - start
        pairs = rows * start + rows * (rows + 1) // 2
        rank = ranks[number] if number else shape.key_dim
        found["core"] += shape.core(pairs, rank)
        if number:
            if not doubling or start >= 2 * made:
                found["basis"] += shape.basis(start - made, queries=joint)
                known, columns, made = 0, 0, start
            if policy:
                found["policy"] += shape.decision(segment)
        if number and rank < shape.key_dim:
            found["projections"] += shape.projections(rows, 0, rank)
            if rank > columns:
                found["projections"] += shape.projections(0, known, rank) - (
                    shape.projections(0, known, columns)
                )
                columns = rank
            found["projections"] += shape.projections(0, stop - known, columns)
            known = stop
    return found | {"full": shape.core(length * (length + 1) // 2)}


def key_bytes(shape: Shape, length: int, rank: int, element: int) -> int:
    """Bytes of keys that a decoding step reads."""
    return length * shape.kv_heads * min(rank, shape.key_dim) * element
