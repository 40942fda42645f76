"""The masks of the Long-Context Attention Benchmark (arXiv 2510.17896), as masks of ours.

i is the query, j the key, doc(i) the document of token i. Twelve are fixed by the length and the
documents; the dynamic ones draw a table of blocks (share kept: NAME@SHARE); the last three are of
FlashMask's own tests (arXiv 2410.01359).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops import Layout, Mask, blocks, causal, documents, prefix, region, sinks, window
from foveate.ops.errors import InputError, nearest

KEPT = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Settings:
    """What the masks of one length are made of.

    Attributes:
        bounds: documents, as boundaries 0, ..., length.
        window: w, keys on a side.
        global_tokens: g, tokens that see and are seen by all.
        prefix: P, tokens at the start that see each other.
        prefixes: the same for each document.
        block: b, tokens of a block of the block-causal mask.
        squares: [o, end) x [o, end) on the diagonal that QK-sparse leaves out.
        heads: for how many heads the random ones draw.
        tile: size of the random blocks.
        seed: of everything random.
    """

    bounds: tuple[int, ...]
    window: int
    global_tokens: int
    prefix: int
    prefixes: tuple[int, ...]
    block: int
    squares: tuple[tuple[int, int], ...]
    heads: int = 1
    tile: int = 64
    seed: int = 0

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.bounds[-1]


def settings(bounds: Sequence[int], *, heads: int = 1, tile: int = 64, seed: int = 0) -> Settings:
    """The benchmark's sizes, in proportion to the length where it is short.

    Window 1,024 or an eighth of the length, 64 global tokens or a sixteenth of the window, a
    quarter of the length and of each document as prefix, blocks of 1,024 or a 32nd of the length,
    four squares of a 16th.
    """
    length = bounds[-1]
    wide = max(1, min(1024, length // 8))
    side = max(1, length // 16)
    return Settings(
        bounds=tuple(bounds),
        window=wide,
        global_tokens=max(1, wide // 16),
        prefix=length // 4,
        prefixes=tuple((b - a) // 4 for a, b in zip(bounds, bounds[1:])),
        block=max(1, min(1024, length // 32)),
        squares=tuple((o, o + side) for o in range(side, length - side, max(1, length // 4))),
        heads=heads,
        tile=tile,
        seed=seed,
    )


def full(s: Settings) -> Mask:
    """Everything."""
    return window(-1, -1)


def causal_only(s: Settings) -> Mask:
    """A query sees itself and what comes before: j <= i."""
    return causal()


def full_document(s: Settings) -> Mask:
    """doc(i) = doc(j)."""
    return documents(s.bounds)


def causal_document(s: Settings) -> Mask:
    """doc(i) = doc(j) and j <= i."""
    return causal() & documents(s.bounds)


def sliding(s: Settings) -> Mask:
    """|i - j| <= w."""
    return window(s.window, s.window)


def causal_sliding(s: Settings) -> Mask:
    """0 <= i - j <= w."""
    return window(s.window, 0)


def shared_question(s: Settings) -> Mask:
    """Causal, and doc(j) is 0, the question, or doc(i)."""
    return causal() & (documents(s.bounds) | sinks(s.bounds[1]))


def global_sliding(s: Settings) -> Mask:
    """|i - j| <= w, or one of i, j is among the first g."""
    rows = region(None, queries=(0, s.global_tokens), keys=(0, s.length))
    return window(s.window, s.window) | sinks(s.global_tokens) | rows


def causal_blockwise(s: Settings) -> Mask:
    """Causal documents, but the last one sees everything before it."""
    last = (s.bounds[-2], s.length)
    return causal_document(s) | region(causal(), queries=last, keys=(0, s.length))


def prefix_causal(s: Settings) -> Mask:
    """Causal, or both among the first P."""
    return causal() | prefix(s.prefix)


def prefix_document(s: Settings) -> Mask:
    """The same inside each document, with a prefix of its own.

    Cut behind the prefixes, a piece that starts a document holds pairs of its prefix only.
    """
    cuts, is_prefix = [0], torch.zeros(1, s.length, dtype=torch.bool)
    for start, end, size in zip(s.bounds, s.bounds[1:], s.prefixes):
        cuts += [start + size, end]
        is_prefix[:, start : start + size] = True
    return causal_document(s) | documents(cuts) & blocks(is_prefix, (s.length, 1))


def block_causal_document(s: Settings) -> Mask:
    """Same document, and floor(pos(j) / b) <= floor(pos(i) / b), pos counted in the document.

    That is: causal, or in the same block.
    """
    cuts = [0]
    for start, end in zip(s.bounds, s.bounds[1:]):
        cuts += [*range(start + s.block, end, s.block), end]
    return documents(s.bounds) & (causal() | documents(cuts))


def qk_sparse(s: Settings) -> Mask:
    """Causal without some squares on the diagonal."""
    mask: Mask = causal()
    for span in s.squares:
        mask = mask & ~region(None, queries=span, keys=span)
    return mask


def hash_sparse(s: Settings) -> Mask:
    """What hashing tokens into buckets and sorting by bucket leaves: causal inside each bucket."""
    count = max(1, s.length // 512)
    of = torch.randint(count, (s.length,), generator=_random(s))
    ends = torch.bincount(of, minlength=count).cumsum(0)
    return causal() & documents([0, *ends.tolist()])


def block_random(s: Settings, share: float) -> Mask:
    """Each row of blocks sees `share` of the blocks, drawn for each head."""
    count = -(-s.length // s.tile)
    rank = torch.rand(s.heads, count, count, generator=_random(s)).argsort(-1).argsort(-1)
    return blocks(rank < max(1, round(share * count)), s.tile)


def block_global(s: Settings, share: float) -> Mask:
    """`share` of all blocks of a head, so that rows differ in number; none is left empty."""
    count = -(-s.length // s.tile)
    drawn = torch.rand(s.heads, count, count, generator=_random(s))
    keep = max(1, round(share * count * count))
    least = drawn.flatten(1).kthvalue(keep).values[:, None, None]
    return blocks((drawn <= least) | torch.eye(count, dtype=torch.bool), s.tile)


def variable_blocks(s: Settings, share: float) -> Mask:
    """Blocks of one to four times 32 tokens, rows and columns cut apart; `share` of each row."""
    unit, random = 32, _random(s)
    count = -(-s.length // unit)

    def cut() -> Tensor:
        ends = torch.randint(1, 5, (count,), generator=random).cumsum(0)
        return torch.searchsorted(ends, torch.arange(count), right=True)

    rows, cols = cut(), cut()
    drawn = torch.rand(s.heads, int(rows[-1]) + 1, int(cols[-1]) + 1, generator=random)
    keep = max(1, round(share * drawn.shape[-1]))
    chosen = drawn.argsort(-1).argsort(-1) < keep
    return blocks(chosen[:, rows][:, :, cols], unit)


def eviction_rows(s: Settings) -> Tensor:
    """(S,) e_j of random eviction: causal, and key j is out of sight from row e_j > j on."""
    keys = torch.arange(s.length)
    left = s.length - keys
    drawn = keys + 1 + (torch.rand(s.length, generator=_random(s)) * left).long()
    return drawn.clamp_max(s.length)


def random_eviction(s: Settings, tile: int | tuple[int, int] = 64) -> Layout:
    """Causal without the keys that were evicted; a layout, as no mask of positions says it."""
    keys, gone = torch.arange(s.length), eviction_rows(s)
    zero, end = torch.zeros_like(keys), torch.full_like(keys, s.length)
    return Layout.from_column_intervals(gone, end, zero, keys, s.length, tile)


def _random(s: Settings) -> torch.Generator:
    return torch.Generator().manual_seed(s.seed)


FIXED: dict[str, Callable[[Settings], Mask]] = {
    "full": full,
    "causal": causal_only,
    "full-document": full_document,
    "causal-document": causal_document,
    "sliding": sliding,
    "causal-sliding": causal_sliding,
    "shared-question": shared_question,
    "global-sliding": global_sliding,
    "causal-blockwise": causal_blockwise,
    "prefix-causal": prefix_causal,
    "prefix-document": prefix_document,
    "block-causal-document": block_causal_document,
    "qk-sparse": qk_sparse,
    "hash-sparse": hash_sparse,
}
DYNAMIC: dict[str, Callable[[Settings, float], Mask]] = {
    "block-random": block_random,
    "block-global": block_global,
    "variable-blocks": variable_blocks,
}
EVICTION = "random-eviction"


def names() -> list[str]:
    """Every mask of the catalogue, the dynamic ones with the benchmark's shares."""
    drawn = [f"{name}@{share:g}" for name in DYNAMIC for share in KEPT]
    return [*FIXED, EVICTION, *drawn]


def seen_by(name: str, s: Settings) -> Mask | Layout:
    """What a name stands for: a mask, or a layout where positions alone don't tell it.

    Raises:
        InputError: there is no such mask.
    """
    kind, _, share = name.partition("@")
    if kind == EVICTION and not share:
        return random_eviction(s)
    if kind in FIXED and not share:
        return FIXED[kind](s)
    if kind not in DYNAMIC or not share.replace(".", "", 1).isdecimal():
        raise InputError(f"mask {name!r} is not known; {nearest(name, names())}")
    return DYNAMIC[kind](s, float(share))
