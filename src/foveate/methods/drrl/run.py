"""Running DR-RL: segment by segment, in the causal and in the whole form.

A batch is taken apart into sequences of equal padding, so that segments count from each sequence's
first real token, and within a segment into sequences of equal rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.methods.drrl.control import Decider, Spectra
from foveate.methods.drrl.costs import Shape, relative
from foveate.methods.drrl.lowrank import (
    Projected,
    gram,
    grouped,
    grouped_gram,
    joint_maps,
    of_gram,
    separate_left,
    spectrum,
)
from foveate.methods.drrl.memory import Memory
from foveate.methods.drrl.method import DRRL
from foveate.methods.drrl.reward import Seen, judged, reward
from foveate.ops import AttentionOutput, attention, causal
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full, sees_later
from foveate.parts.tokens import tokens_of

Rows = Tensor | slice


def attend(
    method: DRRL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    decider: Decider | None = None,
) -> AttentionOutput:
    """A whole sequence, or the last queries of one; shapes as in `Attention.__call__`.

    Raises:
        InputError: a mask or an option that has no meaning here.
    """
    check_tensors(q, k, v)
    check(method, ctx)
    decider = Decider(method, ctx.layer, q.shape[3]) if decider is None else decider
    decider.generator = ctx.generator
    out = v.new_zeros(*q.shape[:3], v.shape[3])
    lse = out.new_full(out.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    if not q.numel() or not k.shape[2]:
        return AttentionOutput(out, lse)
    seen_later, groups = spans(method, q, k, ctx)
    x = ctx.hidden
    for rows, start, stop in groups:
        first = max(start, k.shape[2] - q.shape[2])  # of its queries, among the keys
        before = k.shape[2] - q.shape[2]
        some = slice(first - before, stop - before)
        every: Rows = slice(None) if len(rows) == len(q) else rows  # no copies where it's all of it
        here = (q[every, :, some], k[every, :, start:stop], v[every, :, start:stop])
        inputs = None if x is None else x[every, some]
        if method.form == "causal":
            got = in_order(decider, *here, inputs, ctx, Memory.empty(), (start, stop))
        else:
            got = at_once(decider, *here, inputs, ctx, not seen_later, (start, stop))
        if len(rows) == len(q) and stop - first == q.shape[2]:
            return got
        at = torch.arange(first - before, stop - before, device=q.device)
        place = (rows[:, None, None], torch.arange(q.shape[1], device=q.device)[:, None], at)
        out = out.index_put(place, got.out.to(out.dtype))
        lse = lse.index_put(place, got.lse.to(lse.dtype))
    return AttentionOutput(out, lse)


def check(method: DRRL, ctx: Context) -> None:
    """Refuse what isn't a matter of rank."""
    if ctx.bias is not None:
        raise InputError("drrl: a bias on the scores isn't of low rank; use another method.")


def spans(
    method: DRRL, q: Tensor, k: Tensor, ctx: Context
) -> tuple[bool, list[tuple[Tensor, int, int]]]:
    """Whether tokens see later ones; and (rows of the batch, first real key, end) of equal ones.

    Raises:
        InputError: another mask than causal or everyone, or padding between real tokens.
    """
    tokens = tokens_of(q, k, ctx)
    if not is_causal_or_full(ctx, tokens):
        raise InputError(
            f"drrl cuts the sequence into segments and takes a causal mask or none (padding "
            f"aside), got {ctx.mask!r}."
        )
    later = sees_later(ctx, tokens)
    decoding = q.shape[2] < k.shape[2]
    if later and method.form == "causal" and not (decoding and q.shape[2] == 1):
        raise InputError(
            'drrl(form="causal") makes its bases of earlier tokens: give mask=causal(), or use '
            'form="whole" for tokens that see later ones.'
        )
    if method.form == "whole" and q.shape[2] != k.shape[2]:
        raise InputError(
            'drrl(form="whole") truncates the queries and keys of a whole sequence and can\'t '
            'decode; form="causal" can.'
        )
    if method.basis == "joint" and decoding:
        raise InputError(
            'drrl(basis="joint") needs the queries of all tokens, and this call has only the last '
            'ones: decode with foveate.Attention, which keeps a state, or with basis="separate".'
        )
    real = tokens.k_real
    count, length = real.sum(1), real.shape[1]
    start = real.int().argmax(1)
    stop = start + count
    inside = torch.arange(length, device=real.device)
    if not torch.equal((inside >= start[:, None]) & (inside < stop[:, None]), real):
        raise InputError("drrl: padding between real tokens; put it in front or behind.")
    found: dict[tuple[int, int], list[int]] = {}
    for b in range(len(q)):
        at = b if len(real) > 1 else 0
        found.setdefault((int(start[at]), int(stop[at])), []).append(b)
    groups = [
        (torch.tensor(rows, device=q.device), low, high)
        for (low, high), rows in found.items()
        if high > max(low, length - q.shape[2])
    ]
    return later, groups


# -- the causal form ------------------------------------------------------------------------------
def in_order(
    decider: Decider,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor | None,
    ctx: Context,
    memory: Memory,
    key: object,
) -> AttentionOutput:
    """The last queries of k's tokens, real ones alone; `memory` holds what came before.

    Args:
        decider: who decides.
        q: (B, Hq, m, d), of the last m tokens.
        k: (B, Hkv, n, d), of all.
        v: (B, Hkv, n, Dv).
        x: (B, m, D), inputs of the layer at the queries' tokens, or None.
        ctx: scale and options.
        memory: changed in place.
        key: of these rows, for the layers of the forward.
    """
    method, size = decider.method, decider.method.segment
    length, first = k.shape[2], k.shape[2] - q.shape[2]
    parts: list[AttentionOutput] = []
    for number in range(memory.length // size, -(-length // size)):
        low, high = max(number * size, memory.length), min((number + 1) * size, length)
        # A rule needs no history: only segments that are run have to be decided.
        due = high > first or method.learns or method.refresh == "doubling"
        if number and low == number * size and due:
            _boundary(decider, k, memory, number, key)
        rows = slice(max(low, first) - first, high - first)
        if rows.stop > rows.start and high > first:
            now = (q[:, :, rows], k[:, :, :high], v[:, :, :high])
            parts.append(_segment(decider, *now, ctx, memory, number))
            memory.take(
                None if x is None else x[:, rows],
                q[:, :, rows] if _keeps_queries(method) else None,
            )
        memory.length = high
    return AttentionOutput(
        torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2)
    )


def _keeps_queries(method: DRRL) -> bool:
    return method.basis == "joint" or (method.learns and method.guard == "sound")


@torch.no_grad()
def _grow(decider: Decider, k: Tensor, memory: Memory, number: int) -> None:
    """Take the finished segments into the Gram matrices, and make the basis anew where it's due."""
    method, end = decider.method, number * decider.method.segment
    new = gram(k[:, :, memory.counted : end])
    memory.gram_k = new if memory.gram_k is None else memory.gram_k + new
    if memory.q is not None and _keeps_queries(method):
        more = grouped_gram(memory.q, k.shape[1])
        memory.gram_q = more if memory.gram_q is None else memory.gram_q + more
    memory.counted = end
    if method.refresh == "doubling" and memory.right is not None and end < 2 * memory.made:
        return
    memory.made, memory.projected = end, None
    spectrum_k = of_gram(memory.gram_k)
    memory.sigma_k = spectrum_k.sigma
    memory.sigma_q = None if memory.gram_q is None else of_gram(memory.gram_q).sigma
    if method.basis == "joint":
        assert memory.gram_q is not None
        maps = joint_maps(memory.gram_q, memory.gram_k)
        memory.left, memory.right, memory.sigma_s = maps.left, maps.right, maps.sigma
    else:
        memory.left = memory.right = spectrum_k.w


def _boundary(decider: Decider, k: Tensor, memory: Memory, number: int, key: object) -> None:
    """Between two segments: the basis, then the next segment's rank."""
    _grow(decider, k, memory, number)
    assert memory.sigma_k is not None
    joint = decider.method.basis == "joint"
    cut = memory.sigma_s if joint else memory.sigma_k
    assert cut is not None
    spectra = Spectra([cut], memory.sigma_q, memory.sigma_k, memory.made, False, joint)
    chained = decider.method.previous == "layer"
    if chained:
        memory.action = decider.of_below(key, number, k)
    if memory.action is None:
        memory.action = decider.first(len(k), k.device)
    memory.before = memory.action
    memory.action = decider.decide(spectra, memory.x, memory.action)
    if chained:
        decider.below[decider.layer, key, number] = memory.action
    memory.x = memory.q = None


def _segment(
    decider: Decider,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    memory: Memory,
    number: int,
) -> AttentionOutput:
    """Rows of one segment, each sequence at its rank."""
    width = q.shape[3]
    if not number:
        return _core(q, k, v, ctx, width, True)
    assert memory.action is not None
    assert memory.left is not None
    assert memory.right is not None
    left, ranks = memory.left, decider.ranks.to(q.device)
    needed = [int(r) for r in ranks[memory.action] if r < width]
    if decider.judges and memory.before is not None:
        needed += [int(r) for r in ranks[memory.before] if r < width]
    right = None
    if needed:
        if memory.projected is None:
            memory.projected = Projected(memory.right)
        right = memory.projected.upto(k, max(needed))

    def factors(rows: Rows, rank: int) -> tuple[Tensor, Tensor]:
        if rank >= width:
            return q[rows], k[rows]
        assert right is not None
        return grouped(q[rows], left[rows][..., :rank], k.shape[1]), right[rows][..., :rank]

    return _by_rank(decider, memory.action, memory.before, factors, (q, k, v), ctx, True)


# -- the whole form -------------------------------------------------------------------------------
def at_once(
    decider: Decider,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor | None,
    ctx: Context,
    ordered: bool,
    key: object,
) -> AttentionOutput:
    """All tokens, truncated as a whole; segments of queries have ranks of their own.

    Args:
        decider, q, k, v, x, ctx, key: as `in_order`.
        ordered: whether tokens see only earlier ones (and, through the basis, all others).
    """
    method, width = decider.method, q.shape[3]
    joint, most = method.basis == "joint", max(method.ranks)
    with torch.no_grad():
        if joint:
            left, right, sigma = joint_maps(grouped_gram(q, k.shape[1]), gram(k))
            spectra = Spectra([sigma], None, sigma, q.shape[2], True, True)
        else:
            of_q, of_k = (spectrum(y, method.svd, most) for y in (q, k))
            group = of_q.sigma.unflatten(1, (k.shape[1], -1))
            # Of grouped heads the longest singular values speak, head by head.
            spectra = Spectra(
                [of_q.sigma, of_k.sigma], group.amax(2), of_k.sigma, q.shape[2], True, False
            )
            left, right = of_q.w, of_k.w
    columns = min(most, width)
    keys = k @ right[..., :columns].to(k.dtype)
    action = decider.first(len(q), q.device)
    parts = []
    for number, low in enumerate(range(0, q.shape[2], method.segment)):
        high = min(low + method.segment, q.shape[2])
        if method.previous == "layer":
            action = decider.of_below(key, number, q)
        before = action
        action = decider.decide(spectra, None if x is None else x[:, low:high], before)
        if method.previous == "layer":
            decider.below[decider.layer, key, number] = action
        end = high if ordered else k.shape[2]
        mine = q[:, :, low:high]

        def factors(
            rows: Rows, rank: int, mine: Tensor = mine, end: int = end
        ) -> tuple[Tensor, Tensor]:
            if rank >= width:
                return mine[rows], k[rows, :, :end]
            if joint:
                lower = grouped(mine[rows], left[rows][..., :rank], k.shape[1])
            else:
                lower = separate_left(mine[rows], left[rows], right[rows], rank)
            return lower, keys[rows, :, :end, :rank]

        now = (mine, k[:, :, :end], v[:, :, :end])
        parts.append(_by_rank(decider, action, before, factors, now, ctx, ordered))
    return AttentionOutput(
        torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2)
    )


# -- rows of one segment --------------------------------------------------------------------------
def _by_rank(
    decider: Decider,
    action: Tensor,
    before: Tensor | None,
    factors: Callable[[Rows, int], tuple[Tensor, Tensor]],
    now: tuple[Tensor, Tensor, Tensor],
    ctx: Context,
    ordered: bool,
) -> AttentionOutput:
    """Each sequence at its rank; q, k and v are the rows, the keys so far, and their values."""
    q, _, v = now
    ranks = decider.ranks.to(q.device)
    taken = ranks[action]
    rows, keys = q.shape[2], v.shape[2]
    decider.ran.append((taken, rows * keys - (rows * (rows - 1) // 2 if ordered else 0)))
    out: AttentionOutput | None = None
    for rank in taken.unique().tolist():
        some = (taken == rank).nonzero()[:, 0]
        alone = len(some) == len(taken)
        pick: Rows = slice(None) if alone else some
        got = _core(*factors(pick, rank), v[pick], ctx, q.shape[3], ordered)
        if alone:
            out = got
            break
        if out is None:
            empty = got.out.new_zeros(len(taken), *got.out.shape[1:])
            out = AttentionOutput(empty, got.lse.new_zeros(len(taken), *got.lse.shape[1:]))
        out = AttentionOutput(
            out.out.index_copy(0, some, got.out), out.lse.index_copy(0, some, got.lse)
        )
    assert out is not None
    if decider.judges:
        earlier = taken if before is None else ranks[before]
        _judge(decider, taken, earlier, factors, now, ctx, ordered)
    return out


@torch.no_grad()
def _judge(
    decider: Decider,
    taken: Tensor,
    earlier: Tensor,
    factors: Callable[[Rows, int], tuple[Tensor, Tensor]],
    now: tuple[Tensor, Tensor, Tensor],
    ctx: Context,
    ordered: bool,
) -> None:
    """Rewards of a decision, (B,); one pass at full rank is needed for them."""
    q, k, v = now
    method, width = decider.method, q.shape[3]
    scale = width**-0.5 if ctx.scale is None else ctx.scale
    shape = Shape(0, q.shape[1], k.shape[1], width, v.shape[3])
    found = q.new_zeros(len(q), dtype=torch.float32)
    for pair in torch.stack((taken, earlier), 1).unique(dim=0).tolist():
        rows = ((taken == pair[0]) & (earlier == pair[1])).nonzero()[:, 0]
        seen = Seen(q[rows], k[rows], v[rows], scale, ordered, k.shape[2] - q.shape[2])
        like, moved = judged(seen, factors(rows, pair[0]), factors(rows, pair[1]), method.sim)
        share = relative(shape, q.shape[2], k.shape[2], pair[0])
        flops = torch.full_like(like, share)
        found[rows] = reward(like, flops, moved, method.alpha, method.beta, method.gamma).float()
    decider.rewards.append(found)


def _core(
    left: Tensor, right: Tensor, v: Tensor, ctx: Context, width: int, ordered: bool
) -> AttentionOutput:
    """softmax(left right^T scale) v; the scale is that of the heads' own width."""
    options = ctx.options | {"scale": width**-0.5 if ctx.scale is None else ctx.scale}
    return attention(left, right, v, causal() if ordered else None, **options)
