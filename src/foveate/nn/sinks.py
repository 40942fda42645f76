"""What lets a head of a softmax layer do nothing, without parking its mass on a token.

    sink logits       P_ij = e^{s_ij} / (e^b + sum_j e^{s_ij}), b one for each query head: 0 is
                      "softmax off by one", or learnt as in gpt-oss
    key/value bias    one more key k' and value v' that every query sees, without a position:
                      softmax([q . k' scale, s]) [v'; V]; v' = 0 is "K-bias"; v' alone is added
    gate              o' = o * sigmoid(x W_g) before the map out of the heads, x the layer's input

Sections 5.1 to 5.3 of Su et al. 2026, arXiv 2604.10098. K- and V-biases are those of Gu et al. 2024
(arXiv 2410.10781) and Sun et al. 2024 (arXiv 2402.17762), gates those of Qiu et al. 2025 (arXiv
2505.06708). All work in any phase: the extra logit or key is put in by the lse, once, behind
whatever pattern the layer runs, and no cache holds it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from foveate.nn.stateful import heads_of
from foveate.ops import AttentionOutput, with_key
from foveate.ops.errors import InputError, nearest
from foveate.parts.again import Beside
from foveate.parts.attention import Attention, Heads, Pattern
from foveate.parts.context import Context
from foveate.parts.projection import Projection

LOGITS = ("one", "learned")
KV_BIASES = ("key", "value", "key-value", "key-shared", "value-shared", "key-value-shared")
GATES = ("head", "element")
DEVIATION = 0.02  # of fresh logits, keys and values


class Sinks(nn.Module):
    """The options of one layer; None where it has none of a kind.

    Args:
        heads: sizes of the layer.
        logits: "one" (b = 0, fixed) or "learned".
        kv_bias: "key", "value" or "key-value" for each query head, or with "-shared" for all.
        gate: "head" (W_g is dim x Hq) or "element" (dim x Hq Dv).

    Attributes:
        logits: (Hq,), or None.
        key: k', (Hq or 1, D), or None.
        value: v', (Hq or 1, Dv), or None.
        gate: W_g, or None.

    Raises:
        InputError: an unknown option.
    """

    logits: Tensor | None

    def __init__(
        self, heads: Heads, logits: str | None, kv_bias: str | None, gate: str | None
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("sink_logits", logits, LOGITS), ("kv_bias", kv_bias, KV_BIASES), ("gate", gate, GATES)
        ):  # fmt: skip
            if value is not None and value not in known:
                raise InputError(
                    f"Attention({name}={value!r}) is unknown; {nearest(str(value), known)}"
                )
        self.heads = heads.query
        if logits == "learned":
            self.logits = nn.Parameter(torch.empty(heads.query))
        else:
            self.register_buffer("logits", torch.zeros(heads.query) if logits else None)
        parts = (kv_bias or "").split("-")
        rows = 1 if "shared" in parts else heads.query
        self.key = nn.Parameter(torch.empty(rows, heads.key_dim)) if "key" in parts else None
        self.value = nn.Parameter(torch.empty(rows, heads.value_dim)) if "value" in parts else None
        width = heads.query * (heads.value_dim if gate == "element" else 1)
        self.gate = nn.Linear(heads.dim, width, bias=False) if gate else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh logits, keys and values: normal, deviation 0.02. The gate is a plain linear map."""
        for made in (self.logits, self.key, self.value):
            if isinstance(made, nn.Parameter):
                made.normal_(0.0, DEVIATION)

    def around(self, attention: Attention) -> Attention:
        """The attention with k' and v' beside its keys."""
        if self.key is None and self.value is None:
            return attention
        return Extra(attention, self.key, self.value)

    def weighed(self, ctx: Context) -> Beside | None:
        """From a result of the real keys to the one in which k' has its part; None without k'.

        For whoever applies the layer's weights to other values, which v' isn't among.
        """
        return None if self.key is None else partial(put, self.key, None, ctx.scale, ctx.softcap)

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        """Heads' outputs (B, Hq, Lq, Dv) times their gates from x (B, Lq, dim)."""
        if self.gate is None:
            return o
        logits = self.gate(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gates = torch.sigmoid(logits).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return (o * gates.to(o.dtype)).to(o.dtype)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"logits={self.logits is not None}, heads={self.heads}"


class Extra(Attention):
    """Another attention and one more key that all see, put in by the lse."""

    def __init__(self, inner: Attention, key: Tensor | None, value: Tensor | None) -> None:
        self.inner, self.key, self.value = inner, key, value

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend; shapes as in `Attention`."""
        ctx = Context() if ctx is None else ctx
        result = self.inner(q, k, v, ctx)
        if self.key is None:
            assert self.value is not None
            return AttentionOutput(result.out + self.value[:, None].to(v.dtype), result.lse)
        return put(self.key, self.value, ctx.scale, ctx.softcap, q, result)


def put(
    key: Tensor,
    value: Tensor | None,
    scale: float | None,
    softcap: float | None,
    q: Tensor,
    result: AttentionOutput,
) -> AttentionOutput:
    """Put k' and v' (Hq or 1, width) beside the keys of a result for q; v' None is 0."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    work = result.lse.dtype
    score = (q.to(work) * key[:, None].to(work)).sum(-1) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    return with_key(result, score, None if value is None else value[:, None])


def sinks_of(
    attention: Attention,
    projection: Projection,
    dim: int,
    logits: str | None,
    kv_bias: str | None,
    gate: str | None,
) -> Sinks | None:
    """The options of a layer, checked against what it is made of; None without any.

    Raises:
        InputError: an option that this attention or projection can't have.
    """
    if logits is None and kv_bias is None and gate is None:
        return None
    name = type(attention).__name__
    if (logits or kv_bias) and not isinstance(attention, Pattern):
        asked = "sink_logits" if logits else "kv_bias"
        raise InputError(
            f"Attention(attention={name}, {asked}=...): that is for softmax over a pattern, such "
            'as attention="full" or "sink-window"; leave it out with this one.'
        )
    absorbs = projection.absorbs("prefill") or projection.absorbs("decode")
    if absorbs and (kv_bias or gate == "element"):
        asked = "kv_bias" if kv_bias else "gate='element'"
        raise InputError(
            f"Attention(projection={type(projection).__name__}, {asked}): its absorbed form has "
            "heads of another width, which one set of weights can't be for; take "
            "sink_logits or gate='head'."
        )
    return Sinks(heads_of(projection, dim, 0), logits, kv_bias, gate)
