"""MQSA-TED: attention whose query is the mean of the last items, and distilled item transitions.

A sequence is what a user chose, in order of time. A branch with window L attends with the mean of
the last L items as its query (L = 1 is the usual one), each block of it

    hbar_t = mean of h_t, ..., h_(t-L+1)              real items only
    n = LayerNorm(hbar)
    o = LayerNorm(attention(n Wq, h Wk, h Wv) + n)    causal; keys and values from h itself
    y = o + dropout(dropout(relu(o W1)) W2)           0 at padding

and a short (L = 1) and a long branch are mixed: s = alpha s_short + (1 - alpha) s_long.
"Multi-query" means that; it has nothing to do with heads that share keys.

TED: transitions i -> j counted in the training sequences, A_ij, teach the items' vectors E alone:

    p_i = softmax(A_i / max_j A_ij / tau),  q_i = softmax(dropout(E_i sqrt(D)) E^T / tau)
    L_kd = mean over input items i of - sum_j p_ij ln q_ij

Zhu et al. 2024, arXiv 2311.01056.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from foveate.ops import attention, causal
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

ROOM = 1 << 24
"""Scores of items that are held at a time where a loss needs all of them."""


@dataclass(frozen=True)
class MQSATED:
    """Hyper-parameters; `foveate.models.sequential.SequentialRecommender` is the whole model.

    Attributes:
        dim: D, of the items' vectors.
        length: T, items of a sequence that are looked at.
        blocks: of each branch.
        heads: of each block.
        window: L of the long branch.
        alpha: share of the short branch; 1 is self-attention alone (SASRec), 0 the long one alone.
        dropout: everywhere.
        distil: weight of L_kd; 0 leaves it out.
        tau: temperature of teacher and student.
        span: items up to so many places later count as successors.
        eps: of the layer norms.

    Raises:
        InputError: a bad value.
    """

    dim: int = 64
    length: int = 50
    blocks: int = 1
    heads: int = 1
    window: int = 3
    alpha: float = 0.5
    dropout: float = 0.5
    distil: float = 0.1
    tau: float = 0.1
    span: int = 1
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("dim", "length", "blocks", "heads", "window", "span"):
            whole("MQSATED", name, getattr(self, name), least=1)
        if self.dim % self.heads:
            raise InputError(f"MQSATED: {self.heads} heads don't divide dim={self.dim}.")
        for name, low, high in (("alpha", 0.0, 1.0), ("dropout", 0.0, 0.999)):
            if not low <= getattr(self, name) <= high:
                raise InputError(
                    f"MQSATED({name}={getattr(self, name)}): expected {low:g} to {high:g}."
                )
        if not self.distil >= 0 or not self.tau > 0 or not self.eps > 0:
            raise InputError("MQSATED: expected distil of 0 or more, tau and eps above 0.")

    def self_attention(self) -> MQSATED:
        """The same without the long branch and the distillation: SASRec with this block order."""
        return replace(self, alpha=1.0, distil=0.0)

    def build(self, window: int) -> WindowQuery:
        """One block with fresh weights."""
        return WindowQuery(self.dim, window, self.heads, self.dropout, self.eps)


def windowed_mean(h: Tensor, real: Tensor, window: int, before: Tensor | None = None) -> Tensor:
    """Means over the last `window` places, of real items only; 0 where there is none.

    By prefix sums: the cost doesn't depend on the window.

    Args:
        h: (B, T, D); what stands at other than real places is not read.
        real: (B, T) bool.
        window: L.
        before: (B, L - 1, D + 1), what `recent` gave for the places before these.

    Raises:
        InputError: bad shapes, or a window below 1.
    """
    whole("windowed_mean", "window", window, least=1)
    if h.dim() != 3 or real.shape != h.shape[:2]:
        raise InputError(
            f"windowed_mean: expected h (B, T, D) and real (B, T), got {tuple(h.shape)} and "
            f"{tuple(real.shape)}."
        )
    if window == 1:
        return h.masked_fill(~real[..., None], 0)
    wide = counted(h, real)
    before = wide.new_zeros(len(h), window - 1, h.shape[2] + 1) if before is None else before
    sums = torch.cat((wide.new_zeros(len(h), 1, wide.shape[2]), before, wide), 1).cumsum(1)
    of_window = sums[:, window:] - sums[:, :-window]
    count = of_window[..., -1:].round()
    return (of_window[..., :-1] / count.clamp(min=1)).masked_fill(count == 0, 0).to(h.dtype)


def counted(h: Tensor, real: Tensor) -> Tensor:
    """H with a count of 1 behind real items, (B, T, D + 1), at least fp32; 0 at others."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    wide = torch.cat((wide, wide.new_ones(*h.shape[:2], 1)), 2)
    return wide.masked_fill(~real[..., None], 0)


class WindowState(NamedTuple):
    """What a block keeps of a sequence: k, v (B, heads, n, D / heads), recent (B, L - 1, D + 1)."""

    k: Tensor
    v: Tensor
    recent: Tensor

    def reorder(self, rows: Tensor) -> WindowState:
        """The state of these sequences, (B',) int64, repeated or dropped."""
        return WindowState(*(x[rows] for x in self))


class WindowQuery(nn.Module):
    """One block of a branch; see the module's text.

    Args:
        dim: D.
        window: L.
        heads: of the attention; there is no projection behind them.
        dropout: on attention weights and in the feed-forward network.
        eps: of the layer norms.
    """

    def __init__(
        self, dim: int, window: int, heads: int = 1, dropout: float = 0.5, eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.window, self.heads, self.dropout = window, heads, dropout
        self.query_norm, self.norm = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (self.q, self.k, self.v, self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        """H (B, T, D), real (B, T) bool -> (B, T, D), 0 at padding on whichever side."""
        n = self._query(windowed_mean(h, real, self.window), real)
        h = h.masked_fill(~real[..., None], 0)
        q, k, v = self._heads(self.q(n)), self._heads(self.k(h)), self._heads(self.v(h))
        if bool(real.all()):
            return self._behind(self._attend(q, k, v), n, real)
        # Real items to the front, in order: then none of them has padding before it, and one
        # causal layout serves all sequences.
        order = torch.argsort(~real, dim=1, stable=True)
        back = torch.argsort(order, dim=1)
        moved = (_take(x, order) for x in (q, k, v))
        return self._behind(_take(self._attend(*moved), back), n, real)

    def new_state(self, batch: int, like: Tensor | None = None) -> WindowState:
        """The state of `batch` empty sequences, of `like`'s dtype and device."""
        like = self.q.weight if like is None else like
        dim = self.q.out_features
        k = like.new_zeros(batch, self.heads, 0, dim // self.heads)
        return WindowState(k, k, counted(like.new_zeros(batch, self.window - 1, dim),
                           torch.zeros(batch, self.window - 1, dtype=torch.bool,
                                       device=like.device)))  # fmt: skip

    def step(self, h: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """The next n >= 1 items h (B, n, D), all real -> (B, n, D) and the state behind them."""
        real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        n = self._query(windowed_mean(h, real, self.window, state.recent), real)
        k = torch.cat((state.k, self._heads(self.k(h))), 2)
        v = torch.cat((state.v, self._heads(self.v(h))), 2)
        y = self._behind(self._attend(self._heads(self.q(n)), k, v), n, real)
        seen = torch.cat((state.recent, counted(h, real)), 1)
        return y, WindowState(k, v, seen[:, seen.shape[1] - (self.window - 1) :])

    @torch.no_grad()
    def looks(self, h: Tensor, real: Tensor) -> Tensor:
        """The last place's attention to each place, (B, heads, T), which sums to 1 over T."""
        n = self._query(windowed_mean(h, real, self.window), real)
        q, k = self._heads(self.q(n[:, -1:])), self._heads(self.k(h))
        scores = (q @ k.mT)[:, :, 0] * q.shape[-1] ** -0.5
        return torch.softmax(scores.masked_fill(~real[:, None], -torch.inf), -1)

    def _query(self, mean: Tensor, real: Tensor) -> Tensor:
        # A norm of zeros has a gradient of 1 / sqrt(eps): padding must not enter it.
        safe = torch.where(real[..., None], mean, torch.ones_like(mean))
        return self.query_norm(safe).masked_fill(~real[..., None], 0)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attention(q, k, v, causal(), dropout=dropout).out

    def _behind(self, attended: Tensor, n: Tensor, real: Tensor) -> Tensor:
        a = attended.transpose(1, 2).flatten(2)
        a = a * (n.abs().sum(2, keepdim=True) > 0)  # the query mask of the published code
        o = self.norm(torch.where(real[..., None], a + n, torch.ones_like(n)))
        f = self._drop(self.second(self._drop(torch.relu(self.first(o)))))
        return (o + f).masked_fill(~real[..., None], 0)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """X (B, H, T, D) with each sequence's places in another order (B, T)."""
    return x.gather(2, order[:, None, :, None].expand_as(x))


class Transitions:
    """How often item j follows item i: the teacher of TED, row by row and never dense.

    Args:
        sequences: of item numbers, in order of time; training items only.
        items: V.
        span: places between i and j, at most.

    Attributes:
        start: (V + 1,); the successors of i are entries start[i] ... start[i + 1] - 1.
        item: (n,) int64, the successor of each entry.
        count: (n,) float64, A_ij.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], items: int, span: int = 1) -> None:
        whole("Transitions", "items", items, least=1)
        whole("Transitions", "span", span, least=1)
        flat = torch.tensor([i for s in sequences for i in s], dtype=torch.int64)
        if len(flat) and not (int(flat.min()) >= 0 and int(flat.max()) < items):
            raise InputError(f"Transitions: an item isn't in 0 ... {items - 1}.")
        of = torch.repeat_interleave(torch.tensor([len(s) for s in sequences], dtype=torch.int64))
        pairs = []
        for away in range(1, span + 1):
            same = of[away:] == of[:-away]
            pairs.append((flat[:-away] * items + flat[away:])[same])
        number, count = torch.cat(pairs).unique(return_counts=True)
        self.items, self.count, self.item = items, count.double(), number % items
        self.row = number // items
        per_row = self.row.bincount(minlength=items)
        self.start = torch.cat((per_row.new_zeros(1), per_row.cumsum(0)))

    def counts(self, first: Tensor, second: Tensor) -> Tensor:
        """A of pairs (B,), (B,): int64."""
        key, wanted = self.row * self.items + self.item, first * self.items + second
        if not len(key):
            return torch.zeros_like(wanted)
        at = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
        return torch.where(key[at] == wanted, self.count[at].long(), 0)

    def teacher(self, tau: float) -> tuple[Tensor, Tensor]:
        """P in two parts: what every item gets in row i (V,), and more for each entry (n,).

        p_ij = rest_i, and rest_i + more_e where entry e is (i, j).
        """
        most = self.count.new_zeros(self.items).scatter_reduce(0, self.row, self.count, "amax")
        exp = (self.count / most[self.row] / tau - 1 / tau).exp()  # the largest is 1
        none = self.row.bincount(minlength=self.items)
        low = torch.where(most > 0, torch.tensor(-1 / tau, dtype=torch.float64).exp(), 1.0)
        total = (self.items - none) * low
        total = total.index_add(0, self.row, exp)
        rest = low / total
        return rest, exp / total[self.row] - rest[self.row]

    def dense_teacher(self, tau: float, rows: Tensor | None = None) -> Tensor:
        """P of these rows (B,), None for all: (B, V) float64; to look at and to test."""
        rest, more = self.teacher(tau)
        whole_ = rest[:, None].repeat(1, self.items)
        whole_[self.row, self.item] += more
        return whole_ if rows is None else whole_[rows]

    def targets(self, table: Tensor, tau: float) -> Tensor:
        """sum_j p_ij E_j for every item i: (V, D), differentiable in the table E (V, D)."""
        rest, more = (x.to(table) for x in self.teacher(tau))
        row, item = self.row.to(table.device), self.item.to(table.device)
        matrix = torch.sparse_coo_tensor(
            torch.stack((row, item)), more, (self.items, self.items), is_coalesced=True,
            check_invariants=False,
        )  # fmt: skip
        return rest[:, None] * table.sum(0) + torch.sparse.mm(matrix, table)

    def loss(
        self, table: Tensor, inputs: Tensor, tau: float, dropout: float = 0.0, room: int = ROOM
    ) -> Tensor:
        """L_kd of input items (n,), one row for each occurrence; gradients go to the table alone.

        Of the student's distribution only its normaliser needs all items' scores, `room` of them at
        a time; p meets ln q in the product of two vectors of width D. (The published code adds
        1e-24 to q against ln 0, which can't arise here.)
        """
        x = functional.dropout(table[inputs] * table.shape[1] ** 0.5, dropout, dropout > 0) / tau
        p_scores = (x * self.targets(table, tau)[inputs]).sum(1)
        return (log_sums(x, table, room) - p_scores).mean()


def log_sums(x: Tensor, table: Tensor, room: int = ROOM) -> Tensor:
    """Ln sum_j exp(x . E_j) for x (n, D): (n,); scores are made `room` at a time, and again in the
    backward where they are more than that.
    """
    rows = max(1, room // len(table))
    if len(x) <= rows:
        return _log_sums(x, table)
    parts = [checkpoint(_log_sums, some, table, use_reentrant=False) for some in x.split(rows)]
    return torch.cat(parts)


def _log_sums(x: Tensor, table: Tensor) -> Tensor:
    return torch.logsumexp(x @ table.T, 1)
