"""Attentions whose rows need not sum to one, so that a head that wants nothing needs no sink.

Section 5.2 of the survey by Su et al. 2026 (arXiv 2604.10098): with the softmax, a head with
nothing to attend to must still put its mass somewhere, and parks it on the first token. Not here:

    clipped-softmax     clip((zeta - gamma) softmax(s) + gamma, 0, 1)          arXiv 2306.12929
    softpick            relu(e^s - 1) / (sum |e^s - 1| + eps)                  arXiv 2504.20966
    sigmoid-attention   sigma(s + c), c = -log T                               arXiv 2409.04431
    elu-attention       elu(s) + 1, or (elu(q) + 1) . (elu(k) + 1)             arXiv 2410.10781
    entmax              sparsemax or 1.5-entmax: sums to one, with exact zeros arXiv 1905.05702

T is the number of keys that a query sees, so that a decoded token gets what it gets in the whole
sequence. Each runs over any pattern that keeps its queries in order, visiting the pattern's tiles
alone; rows of weights are made and made again in the backward, never all of them held.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from foveate.methods.naming import make_attention
from foveate.methods.sinks import weights
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.ops.weighted import Weigh, weighted
from foveate.parts.attention import Attention, Pattern, clock, mask_layout
from foveate.parts.context import Context


@dataclass(frozen=True)
class _Normaliser(Attention):
    """Weights of another kind over the pairs of a pattern.

    Attributes:
        pattern: which keys a query sees, a pattern of the catalog that keeps queries in their
            order, such as "sink-window(window=256)".
    """

    pattern: str = "full"
    _seen: Pattern = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        seen = make_attention(self.pattern)
        name = type(self).__name__
        if not isinstance(seen, Pattern) or seen.evicts:
            raise InputError(
                f"{name}(pattern={self.pattern!r}): expected a pattern that only says which keys "
                "are seen, such as full or sink-window."
            )
        object.__setattr__(self, "_seen", seen)

    @property
    @abstractmethod
    def weigh(self) -> Weigh:
        """From rows of scores to weights."""

    def mapped(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys whose products are the scores."""
        return q, k

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend; shapes as in `Attention`. There is no log-sum-exp: lse is NaN.

        Raises:
            InputError: the model asks for sink logits or dropout, which mean nothing here.
        """
        ctx = Context() if ctx is None else ctx
        for name, asked in (("sink_logits", ctx.sink_logits is not None), ("dropout", ctx.dropout)):
            if asked:
                raise InputError(
                    f"{type(self).__name__} doesn't take {name}: its rows are no softmax. Use "
                    "attention='full' with it, or leave it out."
                )
        none = torch.full(q.shape[:3], math.nan, dtype=torch.promote_types(q.dtype, torch.float32))
        none = none.to(q.device)
        if not q.shape[0]:
            return AttentionOutput(v.new_zeros(*q.shape[:3], v.shape[3]), none)
        start = clock(q, ctx)
        with torch.no_grad():
            if self._seen.is_dense(q, k, ctx):
                layout = mask_layout(ctx.mask, q, k, ctx)
            else:
                layout = self._seen.layout(q, k, v, ctx)
        built = clock(q, ctx)
        mapped_q, mapped_k = self.mapped(q, k)
        out = weighted(
            mapped_q, mapped_k, v.to(mapped_q.dtype), self.weigh, layout=layout,
            scale=ctx.scale, softcap=ctx.softcap, bias=ctx.bias,
        ).to(v.dtype)  # fmt: skip
        if ctx.stats is not None and not torch.compiler.is_compiling():
            ctx.stats(
                layer=ctx.layer,
                layout=layout,
                build_seconds=built - start,
                attend_seconds=clock(q, ctx) - built,
            )
        return AttentionOutput(out, none)


def _finite(name: str, **numbers: Any) -> None:
    for field_, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise InputError(f"{name}({field_}={value!r}): expected a finite number.")


@dataclass(frozen=True)
class ClippedSoftmax(_Normaliser):
    """clip((zeta - gamma) softmax(s) + gamma, 0, 1): exact zeros and ones at finite scores.

    Bondarenko et al. 2023, arXiv 2306.12929, equation 4.

    Attributes:
        zeta: at least 1; above it weights reach 1.
        gamma: at most 0; below it weights reach 0.
        alpha: gamma = -alpha / T instead, T the keys that the query sees (paper: 2 to 4).

    Raises:
        InputError: zeta below 1, gamma above 0, or alpha below 0.
    """

    zeta: float = 1.1
    gamma: float = -0.1
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("ClippedSoftmax", zeta=self.zeta, gamma=self.gamma, alpha=self.alpha or 0)
        if self.zeta < 1 or self.gamma > 0 or (self.alpha or 0) < 0:
            raise InputError(
                f"ClippedSoftmax(zeta={self.zeta}, gamma={self.gamma}, alpha={self.alpha}): "
                "expected zeta of 1 or more, gamma of 0 or less, alpha of 0 or more."
            )

    @property
    @override
    def weigh(self) -> Weigh:
        return partial(weights.clipped, zeta=self.zeta, gamma=self.gamma, alpha=self.alpha)


@dataclass(frozen=True)
class Softpick(_Normaliser):
    """relu(e^s - 1) / (sum |e^s - 1| + eps): zero for every score that isn't positive.

    Zuhri et al. 2025, arXiv 2504.20966.

    Attributes:
        eps: of the denominator.

    Raises:
        InputError: eps isn't above 0.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("Softpick", eps=self.eps)
        if self.eps <= 0:
            raise InputError(f"Softpick(eps={self.eps}): expected a number above 0.")

    @property
    @override
    def weigh(self) -> Weigh:
        return partial(weights.softpick, eps=self.eps)


@dataclass(frozen=True)
class SigmoidAttention(_Normaliser):
    """sigma(s + c) for each pair on its own.

    Ramapuram et al. 2024, arXiv 2409.04431; without a bias and with `normalise`, a variant of Gu et
    al. 2024, arXiv 2410.10781.

    Attributes:
        bias: c; None is -log T, T the keys that the query sees.
        normalise: divide by the row's sum (sinks come back then).
    """

    bias: float | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("SigmoidAttention", bias=self.bias or 0)

    @property
    @override
    def weigh(self) -> Weigh:
        return _perhaps(partial(weights.sigmoid, bias=self.bias), self.normalise)


@dataclass(frozen=True)
class EluAttention(_Normaliser):
    """elu(s) + 1 for each pair, or the kernel (elu(q) + 1) . (elu(k) + 1), not normalised.

    Gu et al. 2024, arXiv 2410.10781, section 7.

    Attributes:
        kernel: map queries and keys, not their products. The products still take `scale`.
        normalise: divide by the row's sum (sinks come back then).
    """

    kernel: bool = False
    normalise: bool = False

    @override
    def mapped(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not self.kernel:
            return q, k
        work = torch.promote_types(q.dtype, torch.float32)
        return functional.elu(q.to(work)) + 1.0, functional.elu(k.to(work)) + 1.0

    @property
    @override
    def weigh(self) -> Weigh:
        return _perhaps((lambda s, _: s) if self.kernel else weights.elu, self.normalise)


@dataclass(frozen=True)
class Entmax(_Normaliser):
    """Sparsemax (alpha 2) or 1.5-entmax: rows sum to one, and most weights are exactly 0.

    Martins and Astudillo 2016, arXiv 1602.02068; Peters et al. 2019, arXiv 1905.05702.

    Attributes:
        alpha: 1.5 or 2.

    Raises:
        InputError: another alpha.
    """

    alpha: float = 1.5

    known: ClassVar[dict[float, Weigh]] = {1.5: weights.entmax15, 2.0: weights.sparsemax}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha not in self.known:
            raise InputError(f"Entmax(alpha={self.alpha!r}): expected 1.5 or 2.0.")

    @property
    @override
    def weigh(self) -> Weigh:
        return self.known[self.alpha]


def _perhaps(weigh: Weigh, normalise: bool) -> Weigh:
    if not normalise:
        return weigh
    return lambda s, visible: weights.normalised(weigh(s, visible), visible)
