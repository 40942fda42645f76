"""What a layer keeps and computes for each token: the formulas behind Step-3's tables 2 and 3 (E4).

For one new token at a context of n tokens, with b bytes for each cached number:

    grouped heads  BYTES = 2 h_kv d b n      F_attn = 4 h d n      F_lin = 2 (2 D h d + 2 D h_kv d)
    MLA            BYTES = (r + d_r) b n     F_attn = 4 h (r + d_r) n
                   F_lin = 2 (D r_q + r_q h (d_h + d_r) + D (r + d_r) + r h (d_h + d_v) + h d_v D)
    MFA            BYTES = 2 C b n           F_attn = 4 m C n
                   F_lin = 2 (D r_q + r_q m C + 2 D C + m C D)
    feed-forward   F_ffn = 2 * 3 D * activated width

A window bounds n. A linear layer has a state of constant size in place of a cache; it is read and
written, so its bytes count twice. MLA is counted as it decodes, absorbed; the report takes r + d_r
for the value product too, kernels need r (`value="latent"`).

Source: StepFun 2025, arXiv 2507.19427, section 3; formulas as reconstructed from its tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole


@dataclass(frozen=True)
class Mixing:
    """One attention or linear layer, without its feed-forward.

    Attributes:
        kind: "heads", "mla", "mfa", "index" (keys by which another part picks tokens) or "linear".
        weights: numbers that a token is multiplied with, F_lin / 2.
        kv: numbers cached for each token.
        pair: FLOPs of one query token with one cached token, all heads, as it decodes.
        window: tokens seen at most; None is all.
        reads: tokens read at most, of all that are kept; None is all.
        chunked: the window is a chunk that begins anew, and doesn't slide.
        prefill_pair: FLOPs of such a pair in a prompt, where that has a form of its own.
        state: numbers of a state of constant size.
        state_bytes: of each of them.
        state_flops: for each token.
        kv_bytes: bytes of each cached number; None is as the caller says.
        heads: query heads, which ranks split.
        kv_heads: cached heads, which ranks split as far as there are any; 0 is a shared entry.
        latent, rope: of an MLA's entry.
        width: of all queries and outputs together; what a token needs of memory in passing.
    """

    kind: Literal["heads", "mla", "mfa", "index", "linear"]
    weights: int
    kv: int = 0
    pair: int = 0
    window: int | None = None
    chunked: bool = False
    prefill_pair: int | None = None
    state: int = 0
    state_bytes: int = 4
    state_flops: int = 0
    kv_bytes: float | None = None
    heads: int = 1
    kv_heads: int = 0
    latent: int = 0
    rope: int = 0
    width: int = 0
    reads: int | None = None

    def kept(self, context: int) -> int:
        """Tokens that the cache of a sequence of this length holds."""
        return context if self.window is None else min(context, self.window)

    def seen(self, context: int) -> int:
        """Cached tokens that a new token reads at this context."""
        kept = self.kept(context)
        return kept if self.reads is None else min(kept, self.reads)

    def bytes(self, context: int, each: float) -> float:
        """Bytes of cache and state that a new token reads (and, of a state, writes)."""
        each = each if self.kv_bytes is None else self.kv_bytes
        return self.kv * each * self.seen(context) + 2 * self.state * self.state_bytes

    def held(self, context: int, each: float) -> float:
        """Bytes that a sequence of this length keeps."""
        each = each if self.kv_bytes is None else self.kv_bytes
        return self.kv * each * self.kept(context) + self.state * self.state_bytes

    def flops(self, context: int) -> int:
        """F_attn of a new token."""
        return self.pair * self.seen(context) + self.state_flops

    def prefill_flops(self, tokens: int) -> int:
        """F_attn of a whole prompt; every token sees itself and those before."""
        w = self.seen(tokens)
        if self.chunked:
            whole, rest = divmod(tokens, w) if w else (0, 0)
            pairs = whole * (w * (w + 1) // 2) + rest * (rest + 1) // 2
        else:
            pairs = w * (w + 1) // 2 + (tokens - w) * w
        pair = self.pair if self.prefill_pair is None else self.prefill_pair
        return pair * pairs + self.state_flops * tokens

    def on_rank(self, ranks: int, groups: int = 1) -> Mixing:
        """What one of `ranks` tensor-parallel ranks holds and computes of the cache.

        Heads are split; a cached head that fewer ranks share is copied, and so is the whole entry
        of MLA and MFA. With `groups` of its latent (TPLA) a rank holds r / groups + d_r numbers and
        runs h / (ranks / groups) heads on them. Weights are left as they are.

        Raises:
            InputError: numbers below 1 or that don't divide, or groups of something without a
                latent.
        """
        whole("on_rank", "ranks", ranks, least=1)
        whole("on_rank", "groups", groups, least=1)
        if groups > 1:
            if self.kind != "mla":
                raise InputError("Groups split a latent: they need MLA, this layer has none.")
            if self.latent % groups or ranks % groups:
                raise InputError(
                    f"{groups} groups must divide the latent, {self.latent}, and {ranks} ranks."
                )
        own = ranks // groups
        if self.kind == "linear":
            split = -(-self.heads // ranks) / self.heads
            return replace(
                self, state=round(self.state * split), state_flops=round(self.state_flops * split)
            )
        if self.heads % own:
            raise InputError(f"{own} ranks don't divide {self.heads} query heads.")
        mine = self.heads // own
        if self.kind == "heads":
            kept = -(-self.kv_heads // own)
            return replace(
                self, heads=mine, kv_heads=kept, kv=self.kv // self.kv_heads * kept,
                pair=self.pair // self.heads * mine,
            )  # fmt: skip
        if groups == 1:
            return replace(self, heads=mine, pair=self.pair // self.heads * mine)
        part = self.latent // groups
        value = self.pair // self.heads // 2 - (self.latent + self.rope)  # what the values count
        value = part + (value - self.latent)
        return replace(
            self, heads=mine, latent=part, kv=part + self.rope,
            pair=2 * mine * (part + self.rope + value),
        )  # fmt: skip


@dataclass(frozen=True)
class FeedForward:
    """Dense width, experts, or both (a shared expert).

    Attributes:
        dense: width that every token runs, the shared experts' included.
        expert: width of a routed expert, 0 where there are none.
        experts: routed ones.
        top_k: of them, that a token runs.
        matrices: 3 gated, 2 not.
    """

    dense: int = 0
    expert: int = 0
    experts: int = 0
    top_k: int = 0
    matrices: int = 3

    @property
    def activated(self) -> int:
        """Width that a token runs."""
        return self.dense + self.top_k * self.expert

    @property
    def width(self) -> int:
        """Width that is stored."""
        return self.dense + self.experts * self.expert

    @property
    def sparsity(self) -> float:
        """S: activated over all experts, shared ones in both (F2); 1 without experts."""
        return self.activated / self.width if self.experts else 1.0

    def touched(self, tokens: int) -> float:
        """Width that some of `tokens` run, where each draws its experts evenly."""
        if not self.experts:
            return self.dense
        missed = (1 - self.top_k / self.experts) ** tokens
        return self.dense + self.experts * self.expert * (1 - missed)


@dataclass(frozen=True)
class Layer:
    """One block: what mixes tokens (mostly one, none, or two side by side) and a feed-forward."""

    mixing: tuple[Mixing, ...]
    feedforward: FeedForward | None


@dataclass(frozen=True)
class Model:
    """A decoder, as far as its costs go.

    Attributes:
        name: of the model.
        dim: D.
        layers: from the first to the last.
        vocab: tokens.
        tied: the head is the embedding.
    """

    name: str
    dim: int
    layers: tuple[Layer, ...]
    vocab: int
    tied: bool = False

    @property
    def mixing(self) -> list[Mixing]:
        """All layers' mixing."""
        return [one for layer in self.layers for one in layer.mixing]

    def bytes(self, context: int, each: float = 1.0) -> float:
        """BYTES: of cache and states that one token reads at this context."""
        return sum(one.bytes(context, each) for one in self.mixing)

    def held(self, context: int, each: float = 1.0) -> float:
        """Bytes of cache and states that a sequence of this length keeps."""
        return sum(one.held(context, each) for one in self.mixing)

    def attention(self, context: int) -> int:
        """F_attn: of QK^T and PV, for one token at this context."""
        return sum(one.flops(context) for one in self.mixing)

    @property
    def linear(self) -> int:
        """F_lin: of the projections around attention, for one token."""
        return 2 * sum(one.weights for one in self.mixing)

    @property
    def feedforward(self) -> int:
        """F_ffn: for one token; the router is ignored."""
        return 2 * sum(self._ffn(layer, "activated") for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Of all matrices, embedding and head; norms, biases and routers are left out."""
        inner = sum(one.weights for one in self.mixing)
        inner += sum(self._ffn(layer, "width") for layer in self.layers)
        return inner + self.dim * self.vocab * (1 if self.tied else 2)

    def touched(self, tokens: int) -> float:
        """Of the parameters those that a step over `tokens` reads, one row of embedding apart."""
        inner = float(sum(one.weights for one in self.mixing)) + self.dim * self.vocab
        for layer in self.layers:
            if layer.feedforward is not None:
                part = layer.feedforward
                inner += self.dim * part.matrices * part.touched(tokens)
        return inner

    @property
    def sparsity(self) -> float:
        """S of the sparsest layer; 1 for a dense model."""
        found = [layer.feedforward.sparsity for layer in self.layers if layer.feedforward]
        return min(found, default=1.0)

    def _ffn(self, layer: Layer, which: str) -> int:
        part = layer.feedforward
        return 0 if part is None else self.dim * part.matrices * int(getattr(part, which))


def grouped(
    dim: int,
    heads: int,
    kv_heads: int,
    width: int,
    *,
    value: int | None = None,
    window: int | None = None,
    chunked: bool = False,
    kv_bytes: float | None = None,
    gate: bool = False,
) -> Mixing:
    """MHA, GQA or MQA.

    Args:
        dim: D.
        heads: h.
        kv_heads: h_kv.
        width: d of queries and keys.
        value: of values; None is `width`.
        window, chunked, kv_bytes: see `Mixing`.
        gate: outputs are gated by a map of x of the queries' size.
    """
    value = width if value is None else value
    out = heads * value
    weights = dim * (heads * width * (2 if gate else 1) + kv_heads * (width + value) + out)
    return Mixing(
        "heads", weights, kv_heads * (width + value), 2 * heads * (width + value), window, chunked,
        kv_bytes=kv_bytes, heads=heads, kv_heads=kv_heads, width=heads * width + out,
    )  # fmt: skip


def mla(
    dim: int,
    heads: int,
    query_rank: int | None,
    latent: int = 512,
    rope: int = 64,
    width: int = 128,
    head_value: int | None = None,
    value: Literal["entry", "latent"] = "entry",
) -> Mixing:
    """MLA, absorbed as it decodes and by heads in a prompt.

    Args:
        dim: D.
        heads: h.
        query_rank: r_q; None is a query without a latent.
        latent: r.
        rope: d_r.
        width: d_h.
        head_value: d_v; None is `width`.
        value: what the second product counts: the whole "entry", r + d_r, as in the report, or the
            "latent", r, as kernels do.
    """
    out = width if head_value is None else head_value
    key = width + rope
    query = dim * heads * key if query_rank is None else query_rank * (dim + heads * key)
    weights = query + dim * (latent + rope) + latent * heads * (width + out) + heads * out * dim
    entry = latent + rope
    return Mixing(
        "mla", weights, entry, 2 * heads * (entry + (entry if value == "entry" else latent)),
        prefill_pair=2 * heads * (key + out), heads=heads, latent=latent, rope=rope,
        width=heads * (key + out),
    )  # fmt: skip


def mfa(dim: int, heads: int, width: int, query_rank: int, reuse: bool = False) -> Mixing:
    """MFA; with `reuse` MFA-KR, whose values come from its keys.

    Args:
        dim: D.
        heads: m.
        width: C.
        query_rank: r_q.
        reuse: C numbers are cached, not 2 C, and N [C, C] stands in W_v's place.
    """
    weights = dim * query_rank + query_rank * heads * width + heads * width * dim
    weights += dim * width + (width * width if reuse else dim * width)
    return Mixing(
        "mfa", weights, width if reuse else 2 * width, 4 * heads * width, heads=heads,
        width=2 * heads * width,
    )  # fmt: skip


def indexer(dim: int, heads: int, width: int, query_rank: int) -> Mixing:
    """The lightning indexer of DeepSeek-V3.2: sum over its heads of w_h relu(q_h k), one key.

    Args:
        dim: D.
        heads: of its own.
        width: of its queries and its key.
        query_rank: r_q, of the latent that its queries come from.
    """
    weights = query_rank * heads * width + dim * width + dim * heads
    return Mixing("index", weights, width, 2 * heads * (width + 1), heads=heads,
                  width=heads * width)  # fmt: skip


def linear(
    weights: int, state: int, heads: int, *, each: int = 4, flops: int | None = None, width: int = 0
) -> Mixing:
    """A layer with a state of constant size.

    Args:
        weights: numbers that a token is multiplied with.
        state: numbers that it keeps.
        heads: that ranks split.
        each: bytes of each of them.
        flops: for each token; None is 10 for each number of the state, which MiniMax-M1's row in
            the report comes to.
        width: of what passes by.
    """
    return Mixing(
        "linear", weights, state=state, state_bytes=each, heads=heads, width=width,
        state_flops=10 * state if flops is None else flops,
    )  # fmt: skip
