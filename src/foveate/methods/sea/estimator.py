"""SEA's estimator: from q, k and v to a compressed attention of width K and two gates.

    Vi = [I, v],  C = Performer(q, k, Vi),  h = GELU(LayerNorm([C, v] W_e))          (L, 2 D)
    image = h W_d as c channels of width K / f for each head                         (c H, L, K / f)
    S = CNN(image) over (queries, bins), heads as channels                           (H, L, K)
    (s1, s2) = h W_g

Causal: c = 2, f = 4, I is a learnt table of positions, and the CNN sees the rows t - 8 ... t.
Bidirectional: c = 4, f = 2, and I is the identity resized to the valid tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.methods.sea import performer
from foveate.methods.sea.performer import Sums

REACH = 8  # earlier rows that a causal row of the CNN sees
_STEP = 2  # rows between the taps of its convolutions


class Estimate(NamedTuple):
    """scores (B, H, L, K) before their softmax; gates (B, H, L, 2), before their sigmoid."""

    scores: Tensor
    gates: Tensor


class Past(NamedTuple):
    """What a causal estimate goes on from: the Performer's sums, and the last rows of the image.

    rows (B, c H, REACH, K / f), normalised, 0 where there was no token.
    """

    sums: Sums
    rows: Tensor


class Encoder(nn.Module):
    """h W_e, W_d and W_g, shared by all heads.

    Args:
        dims: D of keys and Dv of values.
        channels: c.
        width: K / f.
    """

    def __init__(self, dims: tuple[int, int], channels: int, width: int) -> None:
        super().__init__()
        inner = 2 * dims[0]
        self.channels, self.width = channels, width
        self.enter = nn.Linear(dims[0] + 2 * dims[1], inner)
        self.norm = nn.LayerNorm(inner)
        self.rows = nn.Linear(inner, channels * width)
        self.gates = nn.Linear(inner, 2)

    def forward(self, context: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, H, L, D + Dv) and v -> image (B, c H, L, K / f), gates (B, H, L, 2)."""
        h = F.gelu(self.norm(self.enter(torch.cat((context, v), -1))))
        image = self.rows(h).unflatten(-1, (self.channels, self.width))
        return image.permute(0, 1, 3, 2, 4).flatten(1, 2), self.gates(h)


class CausalCNN(nn.Module):
    """LayerNorm, two 3x3 convolutions over rows t - 4, t - 2 and t, width x 4, 1x1, LayerNorm."""

    def __init__(self, heads: int, channels: int, width: int, factor: int) -> None:
        super().__init__()
        inner = channels * heads
        self.out_width = width * factor
        self.factor = factor
        self.norm_in = nn.LayerNorm(width)
        self.one, self.two = (
            nn.Conv2d(inner, inner, 3, padding=(0, _STEP), dilation=_STEP) for _ in range(2)
        )
        self.last = nn.Conv2d(inner, heads, 1, padding=(0, 1))
        self.norm_out = nn.LayerNorm(self.out_width)

    def forward(self, image: Tensor, before: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, n, K) of n new rows, and the last rows, for the next call.

        Args:
            image: (B, c H, n, K / f).
            before: (B, c H, REACH, K / f), normalised rows before them.
            at: (B, n) index of each new row in its sequence, negative on padding.
        """
        rows = self.norm_in(image) * (at >= 0)[:, None, :, None]
        rows = torch.cat((before, rows), 2)
        # Rows before the first token are 0 for both convolutions.
        earlier = at[:, :1] - torch.arange(REACH // 2, 0, -1, device=at.device)
        real = torch.cat((earlier, at), 1) >= 0
        x = torch.relu(self.one(rows)) * real[:, None, :, None]
        x = torch.relu(self.two(x))
        x = self.last(x.repeat_interleave(self.factor, -1))
        x = F.adaptive_avg_pool2d(x, (x.shape[2], self.out_width))
        return self.norm_out(x), rows[:, :, -REACH:]


class BidirectionalCNN(nn.Module):
    """Three 3x3 convolutions, half the rows between the first and the last, resized to (L, K)."""

    def __init__(self, heads: int, channels: int, width: int, factor: int) -> None:
        super().__init__()
        inner = channels * heads
        self.out_width = width * factor
        self.one = nn.Conv2d(inner, inner, 3, stride=(2, 1), padding=1)
        self.two = nn.Conv2d(inner, inner, 3, padding=1)
        self.last = nn.Conv2d(inner, heads, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, c H, L, K / f) -> scores (B, H, L, K)."""
        x = torch.relu(self.two(torch.relu(self.one(image))))
        x = self.last(x.repeat_interleave(2, 2))
        size = (image.shape[2], self.out_width)
        mode = "bilinear" if self.out_width >= x.shape[3] else "area"
        return F.interpolate(x, size, mode=mode)


class Estimator(nn.Module):
    """See the module's text.

    Args:
        heads: H.
        dims: D and Dv.
        width: K.
        divisor: nbf.
        causal: the form.
        max_length: rows of the table of positions (causal).
        redraw: training calls after which W is drawn anew.
    """

    w: Tensor
    calls: Tensor

    def __init__(
        self,
        heads: int,
        dims: tuple[int, int],
        width: int,
        divisor: float,
        *,
        causal: bool,
        max_length: int,
        redraw: int,
    ) -> None:
        super().__init__()
        self.heads, self.dims, self.width, self.causal = heads, dims, width, causal
        self.max_length, self.redraw = max_length, redraw
        channels, factor = (2, 4) if causal else (4, 2)
        self.features = performer.feature_count(dims[0], divisor)
        self.register_buffer("w", performer.draw(self.features, dims[0]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.encoder = Encoder(dims, channels, width // factor)
        cnn = CausalCNN if causal else BidirectionalCNN
        self.cnn = cnn(heads, channels, width // factor, factor)
        if causal:
            self.positions = nn.Parameter(torch.randn(max_length, dims[0]))

    def reset_parameters(self) -> None:
        """Start the table of positions afresh, N(0, 1)."""
        if self.causal:
            nn.init.normal_(self.positions)

    @torch.no_grad()
    def count_call(self) -> None:
        """Count a training call; each `redraw`-th draws W anew."""
        self.calls += 1
        if int(self.calls) % self.redraw == 0:
            self.w.copy_(performer.draw(self.features, self.dims[0]))

    def new_past(self, like: Tensor, batch: int, work: torch.dtype) -> Past:
        """What there is before the first token; sums in dtype `work`."""
        encoder = self.encoder
        rows = like.new_zeros(batch, encoder.channels * self.heads, REACH, encoder.width)
        shape = (batch, self.heads, self.features)
        sums = like.new_zeros(*shape, sum(self.dims), dtype=work)
        return Past(Sums(sums, like.new_zeros(shape, dtype=work)), rows)

    def causally(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, past: Past
    ) -> tuple[Estimate, Past]:
        """The estimate of new tokens, and what the next goes on from.

        Args:
            q: (B, H, n, D).
            k: (B, H, n, D).
            v: (B, H, n, Dv).
            at: (B, n) their index in the sequence, negative on padding.
            past: of earlier tokens.
        """
        real = (at >= 0)[:, None, :, None]
        v = v * real
        place = self.positions[at.clamp_min(0)][:, None].expand(-1, self.heads, -1, -1)
        kept = past.sums.ones.dtype
        # Decoding adds one token at a time to long sums, in their wide dtype.
        work = kept if q.shape[2] == 1 else torch.promote_types(q.dtype, torch.float32)
        w, before = self.w, Sums(*(x.to(work) for x in past.sums))
        phi_q, phi_k = (performer.relu_features(x.to(work), w.to(work)) for x in (q, k))
        values = torch.cat((place.to(work), v.to(work)), -1)
        context, sums = performer.causal(phi_q, phi_k * real, values, before)
        image, gates = self.encoder(context.to(v.dtype), v)
        scores, rows = self.cnn(image, past.rows, at)
        return Estimate(scores, gates), Past(Sums(*(x.to(kept) for x in sums)), rows)

    def at_once(self, q: Tensor, k: Tensor, v: Tensor) -> Estimate:
        """The bidirectional estimate of whole sequences without padding; shapes as above."""
        length, work = q.shape[2], torch.promote_types(q.dtype, torch.float32)
        place = resized_identity(length, self.dims[0]).to(q.device, work)
        values = torch.cat((place.expand(*q.shape[:2], -1, -1), v.to(work)), -1)
        w = self.w.to(work)
        context = performer.bidirectional(
            performer.softmax_features(q.to(work), w, keys=False),
            performer.softmax_features(k.to(work), w, keys=True),
            values,
        )
        image, gates = self.encoder(context.to(v.dtype), v)
        return Estimate(self.cnn(image), gates)


def resized_identity(length: int, dim: int) -> Tensor:
    """(length, dim): the identity's rows at positions 0 ... dim - 1, linearly between them."""
    at = torch.arange(length, dtype=torch.float64) / max(1, length - 1) * (dim - 1)
    return (1 - (at[:, None] - torch.arange(dim, dtype=torch.float64)).abs()).clamp_min(0)
