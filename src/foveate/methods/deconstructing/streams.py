"""The variants whose queries and keys don't come from the layer's own input.

    O = softmax(Q K^T / sqrt(d)) V,   V = H W_V,   then W_O, causal, rotary positions on Q and K

    static-emb-qk   Q, K = e W_Q, e W_K     e: the input's token embeddings, in every layer
    rnd-emb-qk      Q, K = X W_Q, X W_K     X: fixed random embeddings, through the blocks so far
    fixed-seq-qk    likewise                X: a fixed sequence of tokens, through the blocks

The maps of the last two don't depend on the input: they are computed once for a whole batch, whose
values stand side by side as one wide value head, and a cache keeps V alone. See `parts.reference`
for how a model runs the second stream; nothing is detached, gradients flow through it.

Source: arXiv 2510.11602, variants StaticEmbQK, RndEmbQK, FixedSeqQK. It doesn't say whether e is
normalised, nor the deviation of the random embeddings: `norm` and `sigma` are ours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.full import Full
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache, token_field
from foveate.parts.mixer import Mixer, MixerRecipe, MixerSizes
from foveate.parts.projection import join_heads, positive, split_heads
from foveate.parts.reference import Reference
from foveate.parts.state import State

NORMS = ("input", "layer", "none")
_WIDE = 256  # numbers of a value row in one call


@dataclass(frozen=True)
class StaticEmbQK(MixerRecipe):
    """Queries and keys of every layer are those of the token embeddings; see the module's text.

    Attributes:
        norm: of the embeddings: "input" is the block's norm in front of the layer, "layer" a
            LayerNorm without weights, "none" takes them as they are.
        kv_heads: heads of keys and values; None is as many as query heads.

    Raises:
        InputError: an unknown norm, or kv_heads below 1.
    """

    norm: str = "input"
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError(f"StaticEmbQK(norm={self.norm!r}): {nearest(str(self.norm), NORMS)}")
        _check_kv("StaticEmbQK", self.kv_heads)

    def build(self, sizes: MixerSizes) -> StaticMixer:
        """The mixer of a layer."""
        return StaticMixer(sizes, self.kv_heads, self.norm)


@dataclass(frozen=True)
class RndEmbQK(MixerRecipe):
    """Queries and keys of fixed random embeddings, one for each position; see the module's text.

    Attributes:
        length: of the random sequence: no input may be longer.
        sigma: standard deviation of the embeddings.
        seed: that they are drawn from, once; the model keeps them with its weights.
        kv_heads: heads of keys and values; None is as many as query heads.

    Raises:
        InputError: a number out of its range.
    """

    length: int = 2048
    sigma: float = 0.02
    seed: int = 0
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        whole("RndEmbQK", "length", self.length, least=1)
        whole("RndEmbQK", "seed", self.seed, least=0)
        positive("RndEmbQK", sigma=self.sigma)
        _check_kv("RndEmbQK", self.kv_heads)

    def build(self, sizes: MixerSizes) -> ReferenceMixer:
        """The mixer of a layer."""
        stream = Reference("random", self.length, self.sigma, self.seed)
        return ReferenceMixer(sizes, self.kv_heads, stream)


@dataclass(frozen=True)
class FixedSeqQK(MixerRecipe):
    """Queries and keys of one fixed sequence of tokens; see the module's text.

    The tokens are told to the model, `model.set_reference(ids)`, and kept with its weights; the
    paper's are the first 2048 of FineWeb. Their embeddings are the model's own.

    Attributes:
        length: of the sequence: no input may be longer.
        kv_heads: heads of keys and values; None is as many as query heads.

    Raises:
        InputError: a number out of its range.
    """

    length: int = 2048
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        whole("FixedSeqQK", "length", self.length, least=1)
        _check_kv("FixedSeqQK", self.kv_heads)

    def build(self, sizes: MixerSizes) -> ReferenceMixer:
        """The mixer of a layer."""
        return ReferenceMixer(sizes, self.kv_heads, Reference("tokens", self.length))


def _check_kv(name: str, kv_heads: int | None) -> None:
    if kv_heads is not None:
        whole(name, "kv_heads", kv_heads, least=1)


class Entries(State):
    """The entries of all tokens, as a projection's cache keeps them; see `State`.

    Args:
        fields: of one token.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self.tokens = TokenCache(fields)

    def __len__(self) -> int:
        """Tokens held."""
        return len(self.tokens)

    @property
    def batch(self) -> int | None:
        """Rows of the batch; None while nothing is held."""
        return next((len(x) for x in self.tokens.entries.values()), None)

    def bytes(self) -> int:
        """Bytes held by all rows together."""
        return self.tokens.bytes()

    def reset(self) -> None:
        """Forget everything."""
        self.tokens.reset()

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from row rows[b]."""
        self.tokens.reorder(rows)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.tokens.truncate(length)


class _Heads(Mixer):
    """Four maps and softmax attention, with queries and keys from somewhere else."""

    def __init__(self, sizes: MixerSizes, kv_heads: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads = sizes.num_heads, kv_heads or sizes.num_heads
        if self.heads % self.kv_heads:
            raise InputError(
                f"kv_heads={self.kv_heads}: expected a divisor of the {self.heads} query heads."
            )
        self.dim, self.width = sizes.dim, sizes.width
        self.rope_dim = self.width
        self.attention: Attention = Full()
        self.q = nn.Linear(self.dim, self.heads * self.width, bias=False)
        self.k = nn.Linear(self.dim, self.kv_heads * self.width, bias=False)
        self.v = nn.Linear(self.dim, self.kv_heads * self.width, bias=False)
        self.out = nn.Linear(self.heads * self.width, self.dim, bias=False)

    def full(self, x: Tensor, ctx: Context) -> Tensor:
        """All tokens at once, x (B, L, dim)."""
        return self._run(x, ctx, None)

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """The next tokens."""
        assert isinstance(state, Entries)
        return self._run(x, ctx, state)

    @abstractmethod
    def _run(self, x: Tensor, ctx: Context, state: Entries | None) -> Tensor:
        """The new tokens x (B, n, dim) behind those in the state."""

    def turned(self, source: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of source (B, n, dim), rotated to positions `at`, (n,) or (B, n)."""
        q = split_heads(self.q(source), self.heads)
        k = split_heads(self.k(source), self.kv_heads)
        if self.rope is None:
            return q, k
        return self.rope.rotate(q, at), self.rope.rotate(k, at)


class StaticMixer(_Heads):
    """StaticEmbQK in one layer: an ordinary cache of keys and values.

    Args:
        sizes: of the layer.
        kv_heads: None is as many as query heads.
        norm: of the embeddings, see `StaticEmbQK`.
    """

    def __init__(self, sizes: MixerSizes, kv_heads: int | None, norm: str) -> None:
        super().__init__(sizes, kv_heads)
        self.norm = norm

    def new_state(self) -> Entries:
        """No keys and values yet."""
        return Entries([token_field(name, self.kv_heads, self.width) for name in "kv"])

    def _run(self, x: Tensor, ctx: Context, state: Entries | None) -> Tensor:
        past, new = 0 if state is None else len(state), x.shape[1]
        at = ctx.q_positions
        if at is None:
            at = torch.arange(past, past + new, device=x.device)
        q, k = self.turned(self._source(x, ctx), at)
        held = {"k": k, "v": split_heads(self.v(x), self.kv_heads)}
        if state is not None:
            held = state.tokens.append(held)
        out = self.attention(q, held["k"], held["v"], ctx).out
        return self.out(join_heads(out))

    def _source(self, x: Tensor, ctx: Context) -> Tensor:
        e = ctx.embeddings
        if e is None or e.shape != x.shape:
            raise InputError(
                f"static-emb-qk: expected the token embeddings {tuple(x.shape)} in ctx.embeddings, "
                f"got {None if e is None else tuple(e.shape)}; foveate's models set them."
            )
        if self.norm == "layer":
            return functional.layer_norm(e, e.shape[-1:])
        if self.norm == "none":
            return e
        if ctx.input_norm is None:
            raise InputError(
                "static-emb-qk(norm='input'): the block's norm isn't in ctx.input_norm; foveate's "
                "blocks set it. Outside of one use norm='layer'."
            )
        return ctx.input_norm(e)


class ReferenceMixer(_Heads):
    """RndEmbQK or FixedSeqQK in one layer.

    Args:
        sizes: of the layer.
        kv_heads: None is as many as query heads.
        reference: the stream that queries and keys come from.
    """

    def __init__(self, sizes: MixerSizes, kv_heads: int | None, reference: Reference) -> None:
        super().__init__(sizes, kv_heads)
        self.reference = reference

    def new_state(self) -> Entries:
        """No values yet; keys are the stream's."""
        return Entries([token_field("v", self.kv_heads, self.width)])

    def _run(self, x: Tensor, ctx: Context, state: Entries | None) -> Tensor:
        maps = ctx.reference
        if maps is None:
            raise InputError(
                f"layer {ctx.layer} takes its queries and keys from a reference stream, which "
                "isn't in ctx.reference; use a model such as foveate.models.FoveateForCausalLM."
            )
        v = split_heads(self.v(x), self.kv_heads)
        if maps.recording:
            q, k = self.turned(x, torch.arange(x.shape[1], device=x.device))
            maps.by_layer[ctx.layer] = (q, k)
            return self.out(join_heads(self.attention(q, k, v, ctx).out))
        if state is not None:
            v = state.tokens.append({"v": v})["v"]
        q, k = maps.of(ctx.layer, v.shape[2])
        return self.out(join_heads(self._attend(q, k, v, x.shape[1], ctx)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, new: int, ctx: Context) -> Tensor:
        """The heads' outputs (B, Hq, n, D): by the batch's common maps where it has them."""
        length = v.shape[2]
        shared = ctx.mask is None or ctx.mask.groups()[0] == 1
        if shared and ctx.q_positions is None and ctx.kv_positions is None:
            q, k = q[:, :, length - new : length], k[:, :, :length]
            step = max(1, _WIDE // self.width)
            return torch.cat([self._wide(q, k, some, ctx) for some in v.split(step)])
        rows = (
            torch.arange(length, device=v.device) if ctx.kv_positions is None else ctx.kv_positions
        )
        at = rows[..., length - new :] if ctx.q_positions is None else ctx.q_positions
        q, k = _at(q, at, len(v)), _at(k, rows, len(v))
        return self.attention(q, k, v, ctx).out

    def _wide(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """Attention whose weights (B' of 1) serve all sequences: their values side by side."""
        batch, width = len(v), v.shape[3]
        side = v.permute(1, 2, 0, 3).flatten(2)[None]
        out = self.attention(q, k, side, ctx).out
        return out[0].unflatten(2, (batch, width)).permute(2, 0, 1, 3)


def _at(x: Tensor, places: Tensor, batch: int) -> Tensor:
    """Rows of x (1, H, n, D) at places, (L,) or (B, L): (B, H, L, D); padding takes the first."""
    found = x[0][:, places.clamp_min(0)]  # (H, L, D) or (H, B, L, D)
    return found.movedim(0, 1) if places.dim() == 2 else found[None].expand(batch, -1, -1, -1)
