"""The gate of Gaussian adaptive attention, in its two published forms.

x is weighted by how far each entry lies from the mean of its group: the entries along one axis, of
one head; heads are contiguous parts of that axis. No queries, no keys: out = x w(x).

    form="mixture"   mu, s2 = mean, unbiased variance + eps (1e-8)
                     y_k = (x - (mu + delta_k)) / sqrt(s2)                        k = 1 ... K
                     w = prod_k exp(-y_k^2 / (2 c_k^2)) / sqrt(2 pi c_k^2), then w / sum(w)
                     delta_k, c_k: one number for each head and Gaussian

    form="density"   mu, s2 = mean, |mean(x^2) - mean(x)^2| + 1e-8
                     y = (x - (mu + delta)) / sqrt(s2 + 1e-5)
                     w = exp(-y^2 / (2 c))                                        in (0, 1]
                     delta, c: one number for each head and feature (the last axis)

The first is the published package, the second what all published figures were made with: c is a
variance there and not a width, and nothing makes the weights sum to 1. A product of Gaussians is
one Gaussian, so that K > 1 widens nothing; several modes need several heads. Ioannides et al. 2024,
arXiv 2401.11143; about 10 K n d FLOPs, and a few numbers to learn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole

FORMS = ("mixture", "density")
EPS = 1e-8
SLACK = 1e-5  # the density form's second eps, under the root
LEAST = 1e-3  # of |c|: at 0 every weight would vanish


class GaussianGate(nn.Module):
    """out = x w(x); see the module's text.

    Args:
        heads: parts of the axis, each with its own statistics and parameters; the last one takes
            what is left over.
        gaussians: K; 1 in the density form.
        form: "mixture" or "density".
        axis: of x, along which a group lies.
        features: size of the last axis of x; the density form needs it.
        compat: as the package treats padding and tiny weights: padding is zeroed for the
            statistics but counted and weighted, passes through unchanged, and sums below eps are
            raised to it. Else padding isn't there at all and comes out as 0.

    Attributes:
        delta: offsets, from 0: (heads, K), or in the density form (heads, features); (1, features)
            if the axis is the last one.
        c: widths, likewise; drawn as exp(N(0, 1)), or 2 in the density form.

    Raises:
        InputError: what doesn't fit together.
    """

    def __init__(
        self,
        heads: int = 1,
        gaussians: int = 1,
        form: str = "mixture",
        axis: int = 1,
        features: int | None = None,
        *,
        compat: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise InputError(f"GaussianGate(form={form!r}) is unknown; {nearest(form, FORMS)}")
        self.heads = whole("GaussianGate", "heads", heads, least=1)
        self.gaussians = whole("GaussianGate", "gaussians", gaussians, least=1)
        self.form, self.axis, self.compat = form, axis, compat
        shape = (heads, gaussians)
        if form == "density":
            if gaussians > 1 or features is None:
                raise InputError(
                    "GaussianGate(form='density'): it has one Gaussian for each feature; give "
                    "features, and gaussians=1."
                )
            shape = (
                1 if axis == -1 else heads,
                whole("GaussianGate", "features", features, least=1),
            )
        self.delta = nn.Parameter(torch.empty(shape))
        self.c = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """No offset; widths drawn, or 2."""
        self.delta.zero_()
        if self.form == "density":
            self.c.fill_(2.0)
        else:
            self.c.normal_().exp_()

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Weigh x; see `weights`."""
        weighed = x * self.weights(x, real).to(x.dtype)
        if real is None:
            return weighed
        real = _beside(real, x)
        return torch.where(real, weighed, x if self.compat else 0)

    def weights(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """W(x), of the shape of x, in fp32 or wider; 0 on padding.

        Args:
            x: any shape of 2 axes or more. In the density form an axis between the gate's and the
                last one is time: statistics are of the mean over it.
            real: bool, (B, n) along axis 1 of x, False on padding; with compat any shape that
                broadcasts to x.

        Raises:
            InputError: the axis has no two entries for each head, or shapes don't fit.
        """
        self._check(x, real)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if real is None or bool(real.all()):
            return self._all(wide, None)
        if self.compat:
            return self._all(wide, _beside(real, x))
        return self._real_alone(wide, real)

    def _real_alone(self, x: Tensor, real: Tensor) -> Tensor:
        """Along axis 1, as if there were no padding: heads share a sequence's real entries."""
        counts = real.sum(1, keepdim=True)
        if int(counts.min()) < self.heads:
            raise InputError(
                f"GaussianGate: {int(counts.min())} real entries can't be split into {self.heads} "
                "heads; take fewer heads."
            )
        head_of = ((real.cumsum(1) - 1) // (counts // self.heads)).clamp(max=self.heads - 1)
        x = torch.where(_beside(real, x), x, 0)
        weights = torch.zeros_like(x)
        for head in range(self.heads):
            mine = _beside(real & (head_of == head), x)
            weights = torch.where(mine, self._head(head, x, x, mine, 1, []), weights)
        return weights

    def _all(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Head by head; padding, if told, is 0 for the statistics but counted."""
        axis = self.axis % x.dim()
        size = x.shape[axis] // self.heads
        if not size:
            raise InputError(
                f"GaussianGate: {x.shape[axis]} entries along the axis can't be split into "
                f"{self.heads} heads; take fewer heads."
            )
        sizes = [size] * (self.heads - 1) + [x.shape[axis] - size * (self.heads - 1)]
        seen = x if real is None else torch.where(real, x, 0)
        parts = zip(x.split(sizes, axis), seen.split(sizes, axis))
        found = [self._head(h, *part, None, axis, sizes) for h, part in enumerate(parts)]
        weights = torch.cat(found, axis)
        return weights if real is None else torch.where(real, weights, 0)

    def _head(
        self, head: int, x: Tensor, seen: Tensor, mine: Tensor | None, axis: int, sizes: list[int]
    ) -> Tensor:
        """Weights of one head's x by the statistics of `seen`, or of those that are `mine`."""
        if self.form == "mixture":
            count = _count(seen, mine, axis)
            mean = _sum(seen, mine, axis) / count
            spread = _sum((seen - mean).square(), mine, axis) / (count - 1).clamp(min=1)
            logs = self._logs(head, (x - mean)[..., None], (spread + EPS).rsqrt()[..., None])
            if mine is not None:
                logs = logs.masked_fill(~mine, -torch.inf)
            total = logs.logsumexp(axis, keepdim=True)
            if self.compat:
                total = total.clamp(min=math.log(EPS))
            return (logs - total).exp()
        time = tuple(range(axis + 1, x.dim() - 1))
        if time:
            seen = seen.mean(time, keepdim=True)
        count = _count(seen, mine, axis)
        mean = _sum(seen, mine, axis) / count
        spread = (_sum(seen.square(), mine, axis) / count - mean.square()).abs() + EPS
        return density(x, mean, spread, *self.parameters_of(head, axis == x.dim() - 1, sizes))

    def _logs(self, head: int, off: Tensor, scale: Tensor) -> Tensor:
        """Log of the product of densities; off and scale (..., 1)."""
        delta, c = self.delta[head].to(off.dtype), self.c[head].to(off.dtype)
        squares = c.square().clamp(min=LEAST**2)
        y = (off - delta) * scale
        return -(y.square() / squares + squares.log() + math.log(2 * math.pi)).sum(-1) / 2

    def parameters_of(self, head: int, last: bool, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """The density form's delta and c of a head; its part of them if they lie along the axis."""
        if not last:
            return self.delta[head], self.c[head]
        start = sum(sizes[:head])
        part = slice(start, start + sizes[head])
        row = head if len(self.delta) > 1 else 0  # an axis that is the last one of this x alone
        return self.delta[row, part], self.c[row, part]

    def _check(self, x: Tensor, real: Tensor | None) -> None:
        if x.dim() < 2 or not -x.dim() <= self.axis < x.dim():
            raise InputError(
                f"GaussianGate: x {tuple(x.shape)} has no axis {self.axis} beside another one."
            )
        if self.form == "density" and x.shape[-1] != self.delta.shape[-1]:
            raise InputError(
                f"GaussianGate(features={self.delta.shape[-1]}): x has {x.shape[-1]} features."
            )
        if real is None or self.compat:
            return
        if self.axis != 1 or x.dim() < 3 or real.shape != x.shape[:2] or real.dtype != torch.bool:
            raise InputError(
                f"GaussianGate: expected real as bool {tuple(x.shape[:2])} along axis 1 of three "
                f"or more, got {real.dtype} {tuple(real.shape)} and axis {self.axis}."
            )

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"heads={self.heads}, gaussians={self.gaussians}, form={self.form}, axis={self.axis}"


def density(x: Tensor, mean: Tensor, spread: Tensor, delta: Tensor, c: Tensor) -> Tensor:
    """exp(-y^2 / (2 c)) with y = (x - (mean + delta)) / sqrt(spread + SLACK)."""
    delta, c = delta.to(x.dtype), c.to(x.dtype).clamp(min=LEAST)
    y = (x - (mean + delta)) * (spread + SLACK).rsqrt()
    return (-y.square() / (2 * c)).exp()


def _sum(x: Tensor, mine: Tensor | None, axis: int) -> Tensor:
    return (x if mine is None else torch.where(mine, x, 0)).sum(axis, keepdim=True)


def _count(x: Tensor, mine: Tensor | None, axis: int) -> Tensor:
    if mine is None:
        return x.new_tensor(x.shape[axis])
    return mine.sum(axis, keepdim=True).to(x.dtype)


def _beside(real: Tensor, x: Tensor) -> Tensor:
    """(B, n) as (B, n, 1, ...); what has all axes of x stays."""
    return real if real.dim() == x.dim() else real[(...,) + (None,) * (x.dim() - real.dim())]
