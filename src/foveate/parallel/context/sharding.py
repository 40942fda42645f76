"""Who holds which tokens: contiguous, zig-zag, per-document zig-zag, striped, or by work.

A sequence of S tokens lies on N ranks. A causal query at the end sees the most keys, so equal
stretches make unequal work:

    contiguous        rank r has tokens r S / N ... (r + 1) S / N - 1
    zigzag            cut into 2 N chunks; rank r has chunks r and 2 N - 1 - r
    document zigzag   the same inside each document of a packed sequence
    striped           rank r has tokens r, r + N, r + 2 N, ...
    by work           chunks of c tokens, the heaviest first, each to the least loaded rank that
                      still has room (MagiAttention's dispatch)

Nothing is padded: where lengths don't divide, ranks hold tokens in numbers that differ by a few,
every rank knows all of them, and in per-document zig-zag the spare tokens of one document go to
other ranks than those of the one before. Positions travel with the tokens: masks and rotary
embeddings are told the global ones. Layouts from "Long-Context Attention Benchmark", Bu et al.
2025, arXiv 2510.17896, and from the systems that it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole, whole_list

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Sharding:
    """Which rank holds which tokens of one sequence.

    Attributes:
        name: how it was made.
        length: S, tokens of the whole sequence.
        index: for each rank, (L_r,) int64, the tokens that it holds, in the order it holds them.
    """

    name: str
    length: int
    index: tuple[Tensor, ...]
    _inverse: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        every = torch.cat(self.index) if self.index else torch.zeros(0, dtype=torch.int64)
        if not torch.equal(every.sort().values, torch.arange(self.length)):
            raise InputError(
                f"Sharding {self.name!r}: the ranks' tokens must be all of 0 ... "
                f"{self.length - 1}, each once."
            )

    @property
    def ranks(self) -> int:
        """N."""
        return len(self.index)

    @cached_property
    def pieces(self) -> tuple[tuple[Span, ...], ...]:
        """For each rank, spans of its own tokens that lie together in the sequence.

        Where hardly any do, all of its tokens are one span.
        """
        return tuple(_runs(index) for index in self.index)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each rank."""
        return [len(one) for one in self.index]

    def split(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The tokens of x that a rank holds.

        Raises:
            InputError: x has another length.
        """
        if x.shape[dim] != self.length:
            raise InputError(
                f"Sharding.split: axis {dim} of {tuple(x.shape)} is not the {self.length} tokens "
                "that were shared out."
            )
        return x.index_select(dim, self.index[rank].to(x.device))

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence from all ranks' tokens, in rank order."""
        if not self._inverse:
            self._inverse.append(torch.cat(self.index).argsort())
        whole_one = torch.cat(list(parts), dim)
        return whole_one.index_select(dim, self._inverse[0].to(whole_one.device))


def _made(name: str, length: int, spans: Sequence[Sequence[Span]]) -> Sharding:
    """From each rank's spans of the sequence."""
    parts = ([torch.arange(lo, hi) for lo, hi in mine] for mine in spans)
    none = torch.zeros(0, dtype=torch.int64)
    return Sharding(name, length, tuple(torch.cat(p) if p else none for p in parts))


def _runs(index: Tensor) -> tuple[Span, ...]:
    """Spans of neighbours; of a scattered list all of it."""
    if not len(index):
        return ()
    breaks = (index.diff() != 1).nonzero()[:, 0] + 1
    if len(breaks) * 2 > len(index):
        return ((0, len(index)),)
    ends = [*breaks.tolist(), len(index)]
    return tuple(zip([0, *ends[:-1]], ends))


def _cuts(length: int, parts: int) -> list[int]:
    """Boundaries of `parts` chunks, the longer ones first."""
    small, spare = divmod(length, parts)
    return [i * small + min(i, spare) for i in range(parts + 1)]


def contiguous(length: int, ranks: int) -> Sharding:
    """One stretch of tokens for each rank."""
    length, ranks = _sizes("contiguous", length, ranks)
    cuts = _cuts(length, ranks)
    return _made("contiguous", length, [[(cuts[r], cuts[r + 1])] for r in range(ranks)])


def zigzag(length: int, ranks: int) -> Sharding:
    """Chunks r and 2 N - 1 - r of 2 N: equal work under a causal mask."""
    length, ranks = _sizes("zigzag", length, ranks)
    cuts = _cuts(length, 2 * ranks)
    spans = [_mirrored(cuts, r) for r in range(ranks)]
    return _made("zigzag", length, spans)


def document_zigzag(cu_seqlens: Sequence[int] | Tensor, ranks: int) -> Sharding:
    """Zig-zag inside each document of a packed sequence, boundaries 0, ..., S.

    The longer chunks of a document begin where those of the one before ended, so that documents
    shorter than 2 N tokens are spread over all ranks.
    """
    bounds = whole_list("document_zigzag", "cu_seqlens", cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise InputError(
            f"document_zigzag(cu_seqlens): expected boundaries from 0 that never fall; got "
            f"{list(bounds[:8])}."
        )
    length, ranks = _sizes("document_zigzag", bounds[-1], ranks)
    ends = torch.tensor(bounds)
    lengths, first = ends.diff(), ends[:-1] % (2 * ranks)
    chunk = torch.arange(2 * ranks)
    owner = torch.minimum(chunk, chunk.flip(0))
    small, spare = lengths // (2 * ranks), lengths % (2 * ranks)
    found = []
    for some in torch.arange(len(lengths)).split(max(1, 2**22 // (2 * ranks))):
        more = (chunk - first[some, None]) % (2 * ranks) < spare[some, None]
        sizes = small[some, None] + more
        found.append(owner.repeat(len(some)).repeat_interleave(sizes.reshape(-1)))
    of = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
    counts = torch.bincount(of, minlength=ranks).tolist()
    return Sharding("document-zigzag", length, of.argsort(stable=True).split(counts))


def striped(length: int, ranks: int) -> Sharding:
    """Token t to rank t mod N: even in pairs, but each tile of a rank spans N times as much."""
    length, ranks = _sizes("striped", length, ranks)
    every = torch.arange(length)
    index = tuple(every[r::ranks] for r in range(ranks))
    return Sharding("striped", length, index)


def by_work(work: Tensor, ranks: int, chunk: int) -> Sharding:
    """Chunks of tokens, the heaviest first, each to the least loaded rank that has room.

    Args:
        work: (S,) of each query, such as the keys it sees (`foveate.parallel.context.row_pairs`).
        ranks: N.
        chunk: tokens of a chunk; every rank gets as many chunks as the others, or one less.

    Raises:
        InputError: fewer chunks than ranks where smaller ones would do, or work that isn't (S,).
    """
    chunk = whole("by_work", "chunk", chunk, least=1)
    if work.dim() != 1:
        raise InputError(f"by_work(work): expected (S,), got {tuple(work.shape)}.")
    length, ranks = _sizes("by_work", len(work), ranks)
    count = -(-length // chunk)
    if count < ranks and chunk > 1:
        raise InputError(
            f"by_work(chunk={chunk}): {length} tokens make {count} chunks, fewer than the "
            f"{ranks} ranks; take chunks of at most {max(1, length // ranks)}."
        )
    sums = torch.zeros(count, dtype=torch.float64)
    sums.index_add_(0, torch.arange(length) // chunk, work.double().cpu())
    room = [len(range(r, count, ranks)) for r in range(ranks)]
    load, mine = [0.0] * ranks, [[] for _ in range(ranks)]  # type: list[float], list[list[int]]
    for c in sums.argsort(descending=True, stable=True).tolist():
        r = min((r for r in range(ranks) if len(mine[r]) < room[r]), key=lambda r: (load[r], r))
        mine[r].append(c)
        load[r] += float(sums[c])
    spans = [[(c * chunk, min(length, (c + 1) * chunk)) for c in sorted(m)] for m in mine]
    return _made(f"by-work({chunk})", length, spans)


def _mirrored(cuts: list[int], r: int) -> list[Span]:
    """Chunks r and, counted from the end, r."""
    last = len(cuts) - 2 - r
    return [(cuts[r], cuts[r + 1]), (cuts[last], cuts[last + 1])]


def _sizes(name: str, length: int, ranks: int) -> tuple[int, int]:
    return whole(name, "length", length, least=0), whole(name, "ranks", ranks, least=1)
