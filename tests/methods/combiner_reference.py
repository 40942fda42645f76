"""Combiner by its definition: lists of direct tokens and spans for every query, in loops."""

from __future__ import annotations

import torch
from torch import Tensor


def blocks(size: int):
    def lists(i, length, causal):
        own = i // size
        last = i + 1 if causal else min(length, (own + 1) * size)
        direct = list(range(own * size, last))
        spans = []
        for r in range(-(-length // size)):
            if r < own or (r > own and not causal):
                spans.append(list(range(r * size, min(length, (r + 1) * size))))
        return direct, spans

    return lists


def prefix_spans(i):
    """The binary decomposition of [0, i), lengths of 2 and more; and i - 1 where i is odd."""
    spans = []
    for bit in range(1, i.bit_length()):
        if i >> bit & 1:
            start = (i >> (bit + 1)) << (bit + 1)
            spans.append(list(range(start, start + (1 << bit))))
    return ([i - 1] if i % 2 else []), spans


def logsparse(i, length, causal):
    more, spans = prefix_spans(i)
    direct = [*more, i]
    if not causal:
        back, mirrored = prefix_spans(length - 1 - i)
        direct += [length - 1 - j for j in back]
        spans += [[length - 1 - j for j in span] for span in mirrored]
    return direct, spans


def cross(i, m, length, causal):
    """The own row and column."""
    r, c = divmod(i, m)
    seen = [j for j in range(length) if (j // m == r or j % m == c) and (j <= i or not causal)]
    return r, c, seen


def _kept(spans):
    return [span for span in spans if span]


def vertical(m: int):
    def lists(i, length, causal):
        r, c, direct = cross(i, m, length, causal)
        spans = []
        for other in range(m):
            if other != c:
                column = [j for j in range(length) if j % m == other]
                spans.append([j for j in column if j // m < r])
                if not causal:
                    spans.append([j for j in column if j // m > r])
        return direct, _kept(spans)

    return lists


def horizontal(m: int):
    def lists(i, length, causal):
        r, c, direct = cross(i, m, length, causal)
        spans = []
        for other in range(-(-length // m)):
            if other < r or (other > r and not causal):
                row = [j for j in range(length) if j // m == other]
                spans += [[j for j in row if j % m < c], [j for j in row if j % m > c]]
        return direct, _kept(spans)

    return lists


def clusters(ids: list[int]):
    def lists(i, length, causal):
        seen = range(i + 1) if causal else range(length)
        direct = [j for j in seen if ids[j] == ids[i]]
        spans = [[j for j in seen if ids[j] == c] for c in sorted(set(ids)) if c != ids[i]]
        return direct, _kept(spans)

    return lists


def weights(
    q: Tensor, k: Tensor, lists, causal=True, *, queries=None, keys=None, log_count=False
) -> Tensor:
    """P (L, L) of one head, float64: step 1 to 3 of the definition, q (L, D), k (L, D)."""
    length, scale = len(q), q.shape[1] ** -0.5
    queries = queries or (lambda x: x.amax(0))
    keys = keys or queries
    p = torch.zeros(length, length, dtype=q.dtype)
    for i in range(length):
        direct, spans = lists(i, length, causal)
        assert sorted(direct + [j for s in spans for j in s]) == list(
            range(i + 1 if causal else length)
        )
        logits, rows = [], []
        for j in direct:
            logits.append(q[i] @ k[j] * scale)
            rows.append(torch.nn.functional.one_hot(torch.tensor(j), length).to(q.dtype))
        for span in spans:
            inner = torch.softmax(k[span] @ queries(q[span]) * scale, 0)
            extra = torch.tensor(float(len(span))).log() if log_count else 0.0
            logits.append(q[i] @ keys(k[span]) * scale + extra)
            row = torch.zeros(length, dtype=q.dtype)
            row[span] = inner
            rows.append(row)
        p[i] = torch.softmax(torch.stack(logits), 0) @ torch.stack(rows)
    return p


def combined(q: Tensor, k: Tensor, v: Tensor, lists, causal=True, **more) -> Tensor:
    """(B, Hq, L, Dv) of (B, Hq, L, D), (B, Hkv, L, D), (B, Hkv, L, Dv); `lists` may be by head."""
    group = q.shape[1] // k.shape[1]
    out = []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            one = lists[b][h // group] if isinstance(lists, list) else lists
            p = weights(q[b, h], k[b, h // group], one, causal, **more)
            out.append(p @ v[b, h // group])
    return torch.stack(out).view(*q.shape[:3], v.shape[3])
