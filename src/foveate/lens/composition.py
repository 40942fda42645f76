"""How much of what an early head writes a later head reads: composition scores, from weights alone.

Of two whole heads (Elhage et al. 2021), Frobenius norms throughout, early head a, later head b:

    Q   ||OV_a QK_b||   / (||OV_a|| ||QK_b||)      what a writes makes b's query
    K   ||OV_a QK_b^T|| / (||OV_a|| ||QK_b||)      ... its key
    V   ||OV_a OV_b||   / (||OV_a|| ||OV_b||)      ... its value

Of one singular component i of OV_a (Merullo et al. 2024, arXiv 2406.09519): OV_a gives way to
s_i u_i v_i^T, of which s_i and u_i drop out:

    CS(a, i -> b) = ||v_i^T M_b||_2 / ||M_b||_F        M_b = QK_b, QK_b^T or OV_b

so that it says how much of what b reads lies along what the component writes. A random direction
has about 1 / sqrt(D). The two are one: CS(a -> b)^2 = sum_i s_i^2 CS(a, i -> b)^2 / sum_i s_i^2.
For detection take CS; for the size of an effect s_i CS, since a weak component may be aligned too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.lens.circuits import Factored, Heads, Spectrum
from foveate.ops.errors import InputError, nearest

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")


def chance(dim: int) -> float:
    """Root mean square of CS for a random direction: 1 / sqrt(D)."""
    return 1 / math.sqrt(dim)


def read_by(heads: Heads, kind: Kind, offset: int | None = None) -> Factored:
    """M of every head, (N, D, D): what a direction is multiplied with from the left.

    Raises:
        InputError: kind is none of q, k and v.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}: {nearest(str(kind), KINDS)}")
    if kind == "v":
        return heads.ov()
    qk = heads.qk(offset)
    return qk if kind == "q" else qk.transposed


def whole_scores(heads: Heads, kind: Kind, offset: int | None = None) -> Tensor:
    """Composition of whole heads, (N, N): [a, b] of early a into later b.

    NaN where a doesn't stand in an earlier layer than b, or one of the two is zero.
    """
    into = read_by(heads, kind, offset)
    compact, writes = into.compact(), heads.ov()
    r_left: Tensor = torch.linalg.qr(writes.left, mode="r").R  # (N, r, r)
    kept = r_left @ writes.right  # (N, r, D): norms with OV as its left factor is orthonormal
    norms = writes.norm()
    found = torch.full((len(heads), len(heads)), math.nan, dtype=compact.dtype)
    for b in range(len(heads)):
        early = (heads.layer < heads.layer[b]).nonzero()[:, 0]
        if len(early):
            top = torch.linalg.matrix_norm(kept[early] @ compact[b])
            found[early, b] = (top / (norms[early] * torch.linalg.matrix_norm(compact[b]))).cpu()
    return found.masked_fill(found.isinf(), math.nan)


def component_scores(
    spectrum: Spectrum, heads: Heads, kind: Kind, offset: int | None = None
) -> Tensor:
    """CS of every component of every head into every later head: (N, r, N), [a, i, b].

    NaN where a doesn't stand in an earlier layer than b, or b reads nothing at all.

    Args:
        spectrum: of `heads.ov()`, v (N, D, r).
        heads: the heads.
        kind: what is read: the query, the key or the value of b.
        offset: as `Heads.qk`.
    """
    compact = read_by(heads, kind, offset).compact()
    norms = torch.linalg.matrix_norm(compact)
    count, rank = len(heads), spectrum.s.shape[-1]
    found = torch.full((count, rank, count), math.nan, dtype=compact.dtype)
    for layer in heads.layer.unique().tolist():
        late = (heads.layer == layer).nonzero()[:, 0]
        early = (heads.layer < layer).nonzero()[:, 0]
        if not len(early):
            continue
        written = spectrum.v[early].mT.flatten(0, 1).to(compact.dtype)  # (a r, D)
        read = written @ compact[late].movedim(0, 1).flatten(1)  # (a r, b r'): all of them at once
        score = torch.linalg.vector_norm(read.unflatten(1, (len(late), -1)), dim=2) / norms[late]
        where = (early[:, None], slice(None), late[None])
        found[where] = score.unflatten(0, (len(early), rank)).transpose(1, 2).cpu()
    return found


def score_of(directions: Tensor, into: Factored) -> Tensor:
    """CS of unit directions (n, D) into one matrix (D, E): (n,)."""
    compact = into.compact()
    return torch.linalg.vector_norm(directions @ compact, dim=-1) / torch.linalg.matrix_norm(
        compact
    )


def standardised(scores: Tensor) -> Tensor:
    """Standard scores (z) of CS among all components of earlier heads into the same head.

    Args:
        scores: (N, r, N) as `component_scores`.
    """
    mean = scores.nanmean((0, 1), keepdim=True)
    spread = (scores - mean).square().nanmean((0, 1), keepdim=True).sqrt()
    return (scores - mean) / spread


@dataclass(frozen=True)
class Channel:
    """One component of an early head, read by a later one.

    Attributes:
        early, late: (layer, head) of the two.
        component: i, by falling singular value.
        kind: what of the later head is fed: "q", "k" or "v".
        score: CS; z: among all components of all earlier heads into the same head and kind.
        singular: s_i.
        whole: composition score of the two whole heads; whole_rank: of the early head by it, among
            all earlier heads (1 is the highest).
    """

    early: tuple[int, int]
    component: int
    late: tuple[int, int]
    kind: Kind
    score: float
    z: float
    singular: float
    whole: float
    whole_rank: int

    @property
    def effect(self) -> float:
        """s_i CS: its size, where CS is its alignment."""
        return self.singular * self.score

    @property
    def text(self) -> str:
        """Such as "7.3[0] -> 9.9 query"."""
        read = {"q": "query", "k": "key", "v": "value"}[self.kind]
        return (
            f"{self.early[0]}.{self.early[1]}[{self.component}] -> "
            f"{self.late[0]}.{self.late[1]} {read}"
        )


def channels(
    heads: Heads,
    spectrum: Spectrum,
    kind: Kind,
    *,
    offset: int | None = None,
    into: Sequence[tuple[int, int]] | None = None,
    top: int = 20,
    scores: Tensor | None = None,
    whole: Tensor | None = None,
) -> list[Channel]:
    """The components that stand out most (by z), over all pairs of heads or into some.

    Args:
        heads: whose maps were decomposed.
        spectrum: of `heads.ov()`.
        kind: "q", "k" or "v".
        offset: as `Heads.qk`.
        into: (layer, head) of the later heads; None is all.
        top: how many, at most.
        scores, whole: of `component_scores` and `whole_scores`, where they are there already.

    Raises:
        InputError: a head that isn't there.
    """
    scores = component_scores(spectrum, heads, kind, offset) if scores is None else scores
    whole = whole_scores(heads, kind, offset) if whole is None else whole
    z = standardised(scores)
    if into is not None:
        wanted = torch.zeros(len(heads), dtype=torch.bool)
        wanted[[heads.at(*one) for one in into]] = True
        z = z.masked_fill(~wanted, math.nan)
    flat = z.flatten().nan_to_num(nan=-math.inf)
    best = flat.topk(min(top, int(flat.isfinite().sum()))).indices
    found = []
    for a, i, b in zip(*(x.tolist() for x in torch.unravel_index(best, z.shape))):
        column = whole[:, b]
        found.append(
            Channel(
                (int(heads.layer[a]), int(heads.head[a])),
                i,
                (int(heads.layer[b]), int(heads.head[b])),
                kind,
                float(scores[a, i, b]),
                float(z[a, i, b]),
                float(spectrum.s[a, i]),
                float(column[a]),
                1 + int((column > column[a]).sum()),
            )  # fmt: skip
        )
    return found
