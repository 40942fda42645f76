"""What the heads of a layer do on a sequence: figures of their attention, without holding L x L.

With s_ij the scores, lse_i = log sum_j e^{s_ij} from the core op and A_ij = e^{s_ij - lse_i}, made
again a block of rows at a time (Su et al. 2026, arXiv 2604.10098, and the papers that it collects):

    importance   alpha_k = mean of A_ik over the queries i that see key k
    sink rate    share of [alpha_k > eps] over layers, heads and sequences (arXiv 2410.10781)
    no-op        mean_i ||sum_{j not a sink} A_ij v_j|| / ||o_i||: 0 is a head that does nothing
    drain        ||v_sink|| / median_j ||v_j||
    density      share of its visible keys that a query needs to recover a part of its mass
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foveate.methods.echoatt.maps import Block, blocks, scores
from foveate.ops import AttentionOutput, attention, probs
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import EVERYTHING
from foveate.parts.context import Context
from foveate.parts.tokens import queries_that_are, tokens_of

EPS = 0.3  # the sink rate's usual threshold, at sequences of 64 tokens
MASSES = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        sinks: tokens at the start that count as the sink for no-op, drain and geometry.
        near: distance up to which a key is local.
        rows: queries, evenly spread, that density, ranks and similarity are taken from.
        cells: cells along each side of the pooled maps; 0 makes none.
        masses: recovered shares of a query's mass.
    """

    sinks: int = 1
    near: int = 128
    rows: int = 64
    cells: int = 48
    masses: tuple[float, ...] = MASSES

    def __post_init__(self) -> None:
        for name, least in (("sinks", 1), ("near", 1), ("rows", 1), ("cells", 0)):
            whole("Wanted", name, getattr(self, name), least=least)
        if not all(0 < mass <= 1 for mass in self.masses):
            raise InputError(f"Wanted(masses={self.masses}): expected shares above 0, up to 1.")


@dataclass(frozen=True)
class HeadFigures:
    """One layer's figures; B sequences, Hq heads, all fp32.

    Attributes:
        out, lse: of the dense attention.
        importance: (B, Hq, Lkv), alpha.
        seen: (1 or B, 1 or Hq, Lkv), queries that see each key.
        sink_share: (B, Hq), mean over queries of the mass on the sink tokens.
        entropy: (B, Hq), mean over queries, nats.
        spread: (B, Hq), entropy over the log of the number of visible keys, mean: 0 to 1.
        distance: (B, Hq), mean of sum_j A_ij |i - j|, tokens.
        near: (B, Hq), mean mass on keys up to `near` away.
        no_op: (B, Hq), the part of the output's norm that isn't the sink's.
        drain: (B, Hkv), the sink's value norm over the median one.
        sink_cosine, other_cosine: (B, Hq), mean cos(q_i, k_j) to the sink's key and to the rest.
        output_rank: (B, Hq), effective rank of the outputs (Lq, Dv).
        map_rank: (B, Hq), effective rank of the sampled rows of A.
        density: by mass, (B, Hq).
        sampled: (B, n, Lkv), mean over heads of the sampled rows of A.
        maps: (B, Hq, cells, cells), mean A of each cell; None if not wanted.
    """

    out: Tensor
    lse: Tensor
    importance: Tensor
    seen: Tensor
    sink_share: Tensor
    entropy: Tensor
    spread: Tensor
    distance: Tensor
    near: Tensor
    no_op: Tensor
    drain: Tensor
    sink_cosine: Tensor
    other_cosine: Tensor
    output_rank: Tensor
    map_rank: Tensor
    density: dict[float, Tensor]
    sampled: Tensor
    maps: Tensor | None


@dataclass
class _Sums:
    """What is added up over blocks of rows."""

    columns: Tensor
    seen: Tensor
    maps: Tensor | None
    rows: Tensor  # (1 or B, 1 or Hq), queries that see anything
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, rows: Tensor) -> None:
        """Rows (B, Hq, n) of a figure, 0 where a query sees nothing."""
        self.totals[name] = self.totals.get(name, rows.new_zeros(())) + rows.sum(-1)

    def mean(self, name: str) -> Tensor:
        """(B, Hq), over the queries that see anything."""
        return self.totals[name] / self.rows.clamp_min(1)


@torch.no_grad()
def head_figures(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, wanted: Wanted | None = None
) -> HeadFigures:
    """Measure the heads of one layer.

    Args:
        q: (B, Hq, Lq, D), as attention takes it.
        k: (B, Hkv, Lkv, D).
        v: (B, Hkv, Lkv, Dv).
        ctx: mask, scale, softcap, bias, sink logits of the call; the sequence starts at key 0.
        wanted: what is measured.

    Raises:
        InputError: padding.
    """
    wanted = Wanted() if wanted is None else wanted
    if ctx.kv_positions is not None and bool((ctx.kv_positions[..., 0] != 0).any()):
        raise InputError("head_figures: expected sequences that begin at their first key.")
    if not bool(queries_that_are(tokens_of(q, k, ctx)).all()):
        raise InputError(
            "head_figures: expected no padding, whose queries would count as the text's; measure "
            "sequences of one length together."
        )
    result = attention(q, k, v, ctx.mask, **ctx.options)
    lse = result.lse
    work = lse.dtype
    index = torch.arange(k.shape[2], device=q.device)
    q_index = torch.arange(q.shape[2], device=q.device) + k.shape[2] - q.shape[2]
    cells = min(wanted.cells, q.shape[2])
    sums = _Sums(
        lse.new_zeros(*q.shape[:2], k.shape[2]),
        lse.new_zeros(1, 1, k.shape[2]),
        lse.new_zeros(*q.shape[:2], cells, cells) if cells else None,
        lse.new_zeros(1, 1),
    )
    head = v[:, :, : wanted.sinks].to(work).repeat_interleave(q.shape[1] // v.shape[1], 1)
    for block in blocks(q, k, ctx):
        _add(sums, scores(q, k, block, ctx), block, wanted, q_index, index, head, result)
    options: dict[str, Any] = {"scale": ctx.scale, "softcap": ctx.softcap, "bias": ctx.bias}
    some = probs(q, k, lse, sampled_rows(q, wanted), ctx.mask or EVERYTHING, **options)
    norms = v.to(work).norm(dim=-1)
    sink_cos, other_cos = _cosines(q, k, wanted.sinks)
    return HeadFigures(
        result.out, lse,
        importance=sums.columns / sums.seen.clamp_min(1),
        seen=sums.seen,
        sink_share=sums.mean("sink"),
        entropy=sums.mean("entropy"),
        spread=sums.mean("spread"),
        distance=sums.mean("distance"),
        near=sums.mean("near"),
        no_op=sums.mean("no_op"),
        drain=norms[..., : wanted.sinks].mean(-1) / norms.median(-1).values.clamp_min(1e-30),
        sink_cosine=sink_cos,
        other_cosine=other_cos,
        output_rank=effective_rank(result.out.to(work)),
        map_rank=effective_rank(some),
        density={mass: density(some, mass) for mass in wanted.masses},
        sampled=some.mean(1),
        maps=sums.maps,
    )  # fmt: skip


def sampled_rows(q: Tensor, wanted: Wanted) -> Tensor:
    """The queries that are sampled, evenly spread: (n,) indices."""
    rows = torch.linspace(0, q.shape[2] - 1, min(wanted.rows, q.shape[2]))
    return rows.round().long().to(q.device)


def _add(
    sums: _Sums, s: Tensor, block: Block, wanted: Wanted, q_index: Tensor, index: Tensor,
    head: Tensor, result: AttentionOutput,
) -> None:  # fmt: skip
    """One block of rows, scores s (B, H, rows, keys), into the sums; s is changed."""
    keys, at = index[block.keys], q_index[block.rows]
    seen = block.allowed
    if seen is None:
        seen = torch.ones(1, 1, s.shape[2], s.shape[3], dtype=torch.bool, device=s.device)
    each = _by_head(seen, s.shape[1])
    visible = each.sum(3)
    lse = result.lse[:, :, block.rows]
    blind = (lse == -torch.inf) | (visible == 0)
    lse = lse.masked_fill(blind, torch.inf)
    p = torch.exp(s - lse[..., None])  # 0 in blind rows
    sums.columns[:, :, block.keys] += p.sum(2)
    sums.seen = _grown(sums.seen, seen, s.shape[1])
    sums.seen[:, :, block.keys] += each.sum(2)
    sums.rows = sums.rows + (visible > 0).sum(2)
    # All sums that are linear in p come from one product, with a column for each.
    cells = 0 if sums.maps is None else sums.maps.shape[-1]
    columns = p.new_zeros(len(keys), cells + 2)
    columns[:, 0], columns[:, 1] = 1.0, (keys - keys[:1]).to(p.dtype)
    if cells:
        columns[torch.arange(len(keys)), 2 + keys * cells // len(index)] = 1.0
    linear = p @ columns
    mass = linear[..., 0]
    # -sum p log p = lse sum p - sum p s, where a key that isn't seen has p = 0
    inner = (p.unsqueeze(-2) @ s.masked_fill_(s == -torch.inf, 0.0).unsqueeze(-1))[..., 0, 0]
    entropy = (lse.masked_fill(blind, 0.0) * mass - inner).clamp_min(0.0)
    sums.add("entropy", entropy)
    sums.add("spread", entropy / visible.clamp_min(2).log())
    far = at[:, None] - keys
    if bool((seen & (far < 0)).any()):  # later keys are seen too
        sums.add("distance", (p * far.abs().to(p.dtype)).sum(-1))
    else:
        sums.add("distance", (at - keys[:1]).to(p.dtype) * mass - linear[..., 1])
    low = max(0, int(at[0]) - wanted.near - block.keys.start)
    high = max(low, int(at[-1]) + wanted.near + 1 - block.keys.start)
    band = far[:, low:high].abs() <= wanted.near
    sums.add("near", (p[..., low:high] * band).sum(-1))
    first = p[..., : max(0, wanted.sinks - block.keys.start)]
    sums.add("sink", first.sum(-1))
    out = result.out[:, :, block.rows].to(p.dtype)
    rest = out - first @ head[:, :, : first.shape[-1]]
    whole_ = out.norm(dim=-1)
    sums.add("no_op", (rest.norm(dim=-1) / whole_.clamp_min(1e-30)) * (whole_ > 0))
    if sums.maps is not None:
        size = (len(q_index) / cells) * (len(index) / cells)
        row_cell = (at - q_index[0]) * cells // len(q_index)
        sums.maps.index_add_(2, row_cell, linear[..., 2:] / size)


def _by_head(seen: Tensor, heads: int) -> Tensor:
    """(1 or B, 1 or Hq, rows, keys)."""
    if seen.shape[1] in (1, heads):
        return seen
    return seen.repeat_interleave(heads // seen.shape[1], 1)


def _grown(sums: Tensor, seen: Tensor, heads: int) -> Tensor:
    """Counters with an entry for each batch entry and head that the mask tells apart."""
    shape = (max(len(sums), len(seen)), 1 if seen.shape[1] == 1 and sums.shape[1] == 1 else heads)
    return sums if sums.shape[:2] == shape else sums.expand(*shape, -1).clone()


def _cosines(q: Tensor, k: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    """Mean cosine of all queries with the sinks' keys, and with all others."""
    work = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    mean = functional.normalize(q.to(work), dim=-1).mean(2)
    keys = functional.normalize(k.to(work), dim=-1).repeat_interleave(group, 1)
    rest = keys[:, :, sinks:].mean(2) if k.shape[2] > sinks else torch.zeros_like(mean)
    return (mean * keys[:, :, :sinks].mean(2)).sum(-1), (mean * rest).sum(-1)


def effective_rank(x: Tensor) -> Tensor:
    """exp(entropy of sigma / sum sigma) over singular values of x (..., n, m), Roy and Vetterli."""
    x = x.double()
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(share).sum(-1).exp().float()


def density(p: Tensor, mass: float) -> Tensor:
    """Mean share of its visible keys that a query needs for this part of its mass; p (..., n, L).

    A key counts as visible if it has any weight in fp32.
    """
    order = p.sort(-1, descending=True).values.cumsum(-1)
    total = order[..., -1:]
    needed = (order < mass * total).sum(-1) + 1
    visible = (p > 0).sum(-1)
    some = visible > 0
    share = (needed / visible.clamp_min(1)).masked_fill(~some, 0.0)
    return share.sum(-1) / some.sum(-1).clamp_min(1)


def sink_rate(importance: Tensor, key: int = 0, eps: float = EPS) -> float:
    """Share of heads and sequences whose key has an importance above eps; (..., Lkv)."""
    return float((importance[..., key] > eps).float().mean())


def similarity(sampled: list[Tensor], skip: int = 0) -> Tensor:
    """Cosines of layers' sampled maps, (layers, layers), mean over rows.

    Args:
        sampled: of each layer, (n, Lkv).
        skip: keys at the start that are left out: sinks make all layers look alike.
    """
    maps = torch.stack([functional.normalize(one[..., skip:].float(), dim=-1) for one in sampled])
    return torch.einsum("anl,bnl->ab", maps, maps) / maps.shape[1]


def uniform_importance(length: int, key: int) -> float:
    """Alpha of a key (from 0) under uniform causal attention: mean of 1 / i over i > key."""
    return math.fsum(1 / i for i in range(key + 1, length + 1)) / (length - key)
