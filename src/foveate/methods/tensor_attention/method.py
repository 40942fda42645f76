"""Tensor attention on given queries, keys and values, and which form of it runs.

Alman and Song 2024, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
Attention to Kronecker Computation", arXiv 2310.04064. With entries of at most B in size, and
d = O(log n), the approximation to within 1 / poly(n) takes n^(1 + o(1)) if B = o((log n)^(1/3)),
and if B = Omega((log n)^(1/3)) nothing takes n^(3 - Omega(1)), unless SETH fails. For order k the
threshold is (log n)^(1/k) and the exponent k. That is why B is checked before anything is
approximated: R = max |logit| decides which degree is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from foveate.methods.tensor_attention import features
from foveate.methods.tensor_attention.exact import Grounds, exact
from foveate.methods.tensor_attention.polynomial import (
    KINDS,
    Polynomial,
    degree_for,
    output_error,
    polynomial,
    weight_error,
)
from foveate.ops import AttentionOutput, Mask, with_sinks
from foveate.ops.check import check_mask, check_tensors
from foveate.ops.errors import InputError
from foveate.ops.masks.base import positions
from foveate.ops.masks.checks import whole
from foveate.parts.attention import EVERYTHING, remember
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.precision import uncast
from foveate.parts.projection import positive
from foveate.parts.tokens import Tokens, tokens_of

FORMS = ("auto", "exact", "features")
_POSITIVE = 0.5  # relative error below which rounding makes no weight negative
KEPT = 1 << 20  # query-key pairs up to which a call's layouts are kept for the next call


@dataclass(frozen=True)
class Form:
    """Which form runs, and how well the approximate one must do.

    Attributes:
        form: "exact", "features" (the approximation), or "auto": exact for short sequences.
        exact_up_to: keys up to which "auto" is exact.
        degree: g of the polynomial; None takes the lowest that keeps the tolerance.
        tolerance: largest error of an output that is allowed, as a share of the largest product of
            values; guaranteed from the size of the logits, so mostly much less. Infinite takes the
            given degree as it is, wherever its weights are positive.
        polynomial: "taylor" or "chebyshev".
        radius: R that the logits are said to stay below; None measures a bound in every call. With
            it, all calls and decoding steps share one polynomial, and larger logits are refused.
        max_rank: features of a token at most.

    Raises:
        InputError: a field that doesn't fit.
    """

    form: str = "auto"
    exact_up_to: int = 512
    degree: int | None = None
    tolerance: float = 1e-3
    polynomial: str = "taylor"
    radius: float | None = None
    max_rank: int = 8192

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"TensorAttention(form={self.form!r}): expected {', '.join(FORMS)}.")
        if self.polynomial not in KINDS:
            raise InputError(
                f"TensorAttention(polynomial={self.polynomial!r}): expected {' or '.join(KINDS)}."
            )
        whole("TensorAttention", "exact_up_to", self.exact_up_to, least=0)
        whole("TensorAttention", "max_rank", self.max_rank, least=1)
        if self.degree is not None:
            whole("TensorAttention", "degree", self.degree, least=0)
        if self.tolerance != math.inf:
            positive("TensorAttention", tolerance=self.tolerance)
        if self.radius is not None:
            positive("TensorAttention", radius=self.radius)

    def is_exact(self, keys: int) -> bool:
        """Whether a call with so many keys is exact."""
        return self.form == "exact" or (self.form == "auto" and keys <= self.exact_up_to)

    def chosen(self, measured: float, width: int) -> Polynomial:
        """The polynomial for logits of at most `measured` in size and heads of this width.

        Raises:
            InputError: the logits are beyond `radius`, the degree isn't enough for them or gives
                negative weights, or so many features are more than `max_rank`.
        """
        if self.radius is not None and measured > self.radius:
            raise InputError(
                f"tensor-attention: logits may reach {measured:.3g} in size, but the polynomial "
                f"was made for {self.radius:.3g}; raise radius, keep queries and keys smaller, or "
                "take form='exact'."
            )
        reach = measured if self.radius is None else self.radius
        allowed = weight_error(self.tolerance)
        degree = self.degree
        if degree is None:
            degree = degree_for(self.polynomial, reach, allowed)
        made = polynomial(self.polynomial, degree, reach)
        error = made.error()
        if error > allowed:
            raise InputError(
                f"tensor-attention: degree {degree} is within {output_error(error):.2g} of exact "
                f"for logits of up to {reach:.3g} in size, but the tolerance is "
                f"{self.tolerance:.2g}; raise the degree or the tolerance, keep queries and keys "
                "smaller, or take form='exact'."
            )
        if made.least() <= 0:
            raise InputError(
                f"tensor-attention: the {self.polynomial} polynomial of degree {degree} isn't "
                f"positive for logits of up to {reach:.3g} in size, so its weights have no sum to "
                "divide by; take an even degree of 'taylor', or a higher one."
            )
        if features.rank(width, degree) > self.max_rank:
            raise InputError(
                f"tensor-attention: degree {degree} for logits of up to {reach:.3g} in size needs "
                f"{features.rank(width, degree)} features of heads of width {width}, more than "
                f"max_rank={self.max_rank}; take narrower heads (up to about 8), smaller queries "
                "and keys, or form='exact'."
            )
        return made

    def precision(self, p: Polynomial, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which features keep the tolerance: dtype (fp32 or wider), or fp64.

        Raises:
            InputError: fp64 isn't enough: terms of P cancel too far.
        """
        allowed, condition = min(weight_error(self.tolerance), _POSITIVE), p.condition()
        if min(p.error(), allowed / 2) + condition * torch.finfo(dtype).eps <= allowed:
            return dtype
        rounding = condition * torch.finfo(torch.float64).eps
        if rounding > allowed / 10:
            raise InputError(
                f"tensor-attention: for logits of up to {p.radius:.3g} in size the polynomial's "
                f"terms cancel so far that even fp64 is only within {output_error(rounding):.2g} "
                "of exact; keep queries and keys smaller, raise the tolerance, or take "
                "form='exact'."
            )
        return torch.float64


def tensor_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    form: Form | None = None,
    ctx: Context | None = None,
) -> AttentionOutput:
    """Attention of each query to tuples of tokens.

        out_i = sum_{j1 ... jm} softmax(scale sum_l q_il prod_s keys[s]_{js,l}) prod_s values[s]_js

    Args:
        q: (B, Hq, Lq, D).
        keys: order - 1 of them, each (B, Hkv, L, D), Hq a multiple of Hkv. The very same tensor
            twice, with the very same values, halves the work of exact causal or full attention.
        values: as many, each (B, Hkv, L, Dv).
        mask: who may see whom; a tuple is seen if each of its tokens is. None is everyone.
        scale: factor on the logits; None is 1 / D.
        form: exact, or approximate by features (causal or full masks, padding aside).
        ctx: positions, sink logits and backend; its scale isn't used.

    Returns:
        out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) over tuples, differentiable once; computed in fp32
        or wider, features in fp64 where their rounding would break the tolerance.

    Raises:
        InputError: shapes don't fit; something of ctx has no meaning here; or the approximation
            can't be had for this mask or for logits as large as these.
    """
    ctx = replace(Context() if ctx is None else ctx)
    form = Form() if form is None else form
    if mask is not None:
        ctx.mask = check_mask(mask, None)
    check(q, keys, values, ctx)
    scale = 1 / q.shape[3] if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    tied = len(keys) == 2 and keys[0] is keys[1] and values[0] is values[1]
    qs, ks, vs = q.to(wide), [k.to(wide) for k in keys], [v.to(wide) for v in values]
    if form.is_exact(keys[0].shape[2]) or not keys[0].shape[2] or not q.shape[2]:
        found = exact(qs, ks, vs, _grounds(q, keys[0], ctx, scale, tied))
    else:
        with uncast(q):
            found = _approximate(qs, ks, vs, scale, form, ctx)
    result = AttentionOutput(found.out.to(q.dtype), found.lse.to(wide))
    return result if ctx.sink_logits is None else with_sinks(result, ctx.sink_logits)


@torch.no_grad()
def bound(
    q: Tensor,
    keys: Sequence[Tensor],
    scale: float,
    q_real: Tensor | None = None,
    k_real: Tensor | None = None,
) -> float:
    """R: at least max |logit| of real tokens, in O(n d); q_real, k_real (1 or B, n), None is all.

    The smaller of sum_l max_i |q_il| prod_s max_j |keys[s]_jl| and, by Hoelder's inequality with
    order k, of max ||q_i||_k prod_s max ||keys[s]_j||_k, times the scale; for scale 1 / d both are
    at most B^k.
    """
    given = [_where(q, q_real), *(_where(k, k_real) for k in keys)]
    given = [x.double().abs() for x in given]
    if any(x.numel() == 0 for x in given):
        return 0.0
    order = len(given)
    columns, norms = torch.ones((), dtype=torch.float64, device=q.device), 1.0
    for x in given:
        columns = columns * x.amax((0, 1, 2))
        norms *= float(x.pow(order).sum(-1).max()) ** (1 / order)
    return abs(scale) * min(float(columns.sum()), norms)


def _where(x: Tensor, real: Tensor | None) -> Tensor:
    """0 on padding: x (B, H, n, D), real (1 or B, n)."""
    return x if real is None else x.masked_fill(~real[:, None, :, None], 0.0)


def check(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], ctx: Context) -> None:
    """Refuse what doesn't fit, before any work."""
    if not keys or len(keys) != len(values):
        raise InputError(
            f"tensor_attention: expected as many keys as values, at least one; got {len(keys)} "
            f"and {len(values)}."
        )
    for k, v in zip(keys, values):
        check_tensors(q, k, v)
        if k.shape != keys[0].shape or v.shape != values[0].shape:
            raise InputError("tensor_attention: all keys, and all values, must have one shape.")
    for name in ("softcap", "bias"):
        if getattr(ctx, name) is not None:
            raise InputError(f"tensor-attention has no {name}: its logits are of tuples.")
    if ctx.dropout:
        raise InputError("tensor-attention drops no weights, which it never forms; set dropout=0.")


def _grounds(q: Tensor, k: Tensor, ctx: Context, scale: float, tied: bool) -> Grounds:
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    lengths, backend = (q.shape[2], k.shape[2]), ctx.backend
    mask._check(*lengths)
    keep = lengths[0] * lengths[1] <= KEPT
    symmetric = tied and lengths[0] == lengths[1] and is_causal_or_full(ctx, tokens_of(q, k, ctx))
    if ctx.q_positions is None and ctx.kv_positions is None and not mask.tensors:
        make = _plain if keep else _plain.__wrapped__
        return make(mask, lengths, scale, symmetric, backend, keep, q.device)

    def build() -> Grounds:
        at, keys = positions(*lengths, ctx.q_positions, ctx.kv_positions, q.device)
        return Grounds(mask, at, keys, scale, symmetric, backend, keep)

    name = (_grounds, mask, lengths, scale, symmetric, backend, q.device)
    return remember(ctx, name, build)


@lru_cache(maxsize=8)
def _plain(
    mask: Mask,
    lengths: tuple[int, int],
    scale: float,
    symmetric: bool,
    backend: str,
    keep: bool,
    device: torch.device,
) -> Grounds:
    """Without positions: the layouts of short sequences are kept from call to call."""
    with torch.inference_mode(False):
        at, keys = positions(*lengths, None, None, device)
    return Grounds(mask, at, keys, scale, symmetric, backend, keep)


def _approximate(
    q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, form: Form, ctx: Context
) -> AttentionOutput:
    tokens = approximable(q, keys[0], ctx)
    # Of a padded query nobody asks for the output, but only a layer knows which these are.
    measured = bound(q, keys, scale, ctx.real, tokens.k_real)
    ctx.aux["logit_bound"] = q.new_tensor(measured)
    p = form.chosen(measured, q.shape[3])
    wide = form.precision(p, q.dtype)
    q, keys, values = q.to(wide), [k.to(wide) for k in keys], [v.to(wide) for v in values]
    real = None if bool(tokens.k_real.all()) else tokens.k_real
    if not tokens.causal:
        return features.full(q, keys, values, p, scale, real)
    past = keys[0].shape[2] - q.shape[2]
    before = None
    if past:
        old = None if real is None else real[:, :past]
        old_k, old_v = ([x[:, :, :past] for x in xs] for xs in (keys, values))
        before = features.sums(old_k, old_v, old, p.degree)
    own = None if real is None else real[:, past:]
    new_k, new_v = ([x[:, :, past:] for x in xs] for xs in (keys, values))
    return features.causal_scan(q, new_k, new_v, p, scale, own, before)[0]


def approximable(q: Tensor, k: Tensor, ctx: Context) -> Tokens:
    """The tokens of a call that features can do.

    Raises:
        InputError: the mask is neither causal nor full, or queries don't stand at the keys' end.
    """
    tokens = tokens_of(q, k, ctx)
    aligned = bool((tokens.shift == k.shape[2] - q.shape[2]).all()) and q.shape[2] <= k.shape[2]
    if not is_causal_or_full(ctx, tokens) or (tokens.causal and not aligned):
        raise InputError(
            "tensor-attention: the approximate form sums over all earlier tokens or over all, but "
            "the mask is neither causal nor full (packed documents or a window, for example); take "
            "form='exact', or call it per document."
        )
    return tokens
