"""RCMHA: relative attention over queries, keys and values that a short convolution has mixed.

    q, k, v = conv(x W_q), conv([mem ; x] W_k), conv([mem ; x] W_v + b_v)
    score_ij = ((q_i + u) . k_j + q_i . E[P + o] + beta[P + o]) / sqrt(d),    o = j - M - i
    out_i = sum_j softmax_j(score_ij) v_j        over the keys with o <= 0

o is the distance from query i of the segment to key j, of which the first M are memory: 0 is the
token itself, negative the past. E (2P, h, d), beta (2P, h) and u (h, d) are learnt, and all start
at zero. Sugiharto, Aradea and Mubarok 2023, arXiv 2308.03429, as their code has it: the convolution
is Primer's (So et al. 2021, arXiv 2109.08668), relative scores and memory are those of
Transformer-XL (Dai et al. 2019, arXiv 1901.02860) with learnt keys for distances.

What the paper compares is one attention with parts left out:

    RCMHA  rcmha                       RMHA  rcmha(kernel=1)
    MDHA   rcmha(relative=False)       MHA   rcmha(kernel=1, relative=False)

(MDHA and MHA want absolute positions at the input, such as `position="learned"` of a model.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.rcmha.convolution import HeadConvolution
from foveate.methods.rcmha.state import CarriedState, Memory
from foveate.ops import AttentionOutput, Layout, Mask, RelativeBias, attention, blocks
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.base import positions
from foveate.ops.masks.checks import whole
from foveate.parts.attention import AttentionRecipe, Heads, mask_layout, remember
from foveate.parts.context import Context
from foveate.parts.mixer import pairs_seen
from foveate.parts.state import State, Stateful
from foveate.parts.tokens import tokens_of

Segments = Literal["carry", "reset"]
Seen = list[Tensor | None]


@dataclass(frozen=True)
class RCMHA(AttentionRecipe):
    """Depthwise convolutions on the heads, relative scores, and a memory of earlier segments.

    It takes the place of rotary positions: a layer with it turns nothing. A token's convolution
    takes in only what `ctx.mask` lets it see, so it doesn't cross padding or packed documents.
    Without a causal mask queries see later keys too (rows P + 1 ... of E); the convolution looks
    back all the same.

    Segments: a model that is called with a cache goes on from what the cache holds, and gradients
    stay within the new tokens. "carry" keeps keys and values behind the convolution, and its last
    inputs: decoding equals the whole sequence at once, and two segments are one. "reset" does as
    the paper's code: it keeps the layer's input, makes keys and values of it anew (so that W_k and
    W_v learn from the memory too), and the convolution starts from zeros at the memory's oldest
    token, and at the segment's first query.

    Attributes:
        kernel: taps of the convolution, the token's own included; 1 is none.
        reach: P; farther keys count as P away. E and beta hold 2 P h (d + 1) numbers.
        relative: scores by distance, E, beta and u; without it keys have no order.
        shared_heads: one filter for each channel of a head; False is Primer's own, one for each
            channel of every head.
        value_bias: b_v (the paper's maps have no other bias but that of the output:
            `out_bias=True` of the layer, `attention_out_bias` of a model).
        memory: M, most tokens that a segment sees before its own; None is all. The paper's model
            has 32, in segments of 2.
        segment_conv: "carry" or "reset".

    Raises:
        InputError: a number below its least, or an unknown segment_conv.
    """

    kernel: int = 3
    reach: int = 4096
    relative: bool = True
    shared_heads: bool = True
    value_bias: bool = True
    memory: int | None = None
    segment_conv: Segments = "carry"

    def __post_init__(self) -> None:
        whole("RCMHA", "kernel", self.kernel, least=1)
        whole("RCMHA", "reach", self.reach, least=1)
        if self.memory is not None:
            whole("RCMHA", "memory", self.memory, least=1)
        if self.segment_conv not in get_args(Segments):
            raise InputError(
                f"RCMHA(segment_conv={self.segment_conv!r}) is unknown; "
                f"{nearest(str(self.segment_conv), get_args(Segments))}"
            )

    @override
    def build(self, heads: Heads) -> RelativeConvolutional:
        return RelativeConvolutional(self, heads)


class RelativeConvolutional(Stateful, nn.Module):
    """RCMHA in a layer; see the module's text.

    Args:
        recipe: the hyper-parameters.
        heads: sizes of the layer.

    Attributes:
        conv_q, conv_k, conv_v: the convolutions; None where kernel is 1.
        value_bias: b_v (Hkv, Dv), or None.
        key_bias: u (Hq, D); None where nothing is relative, as the next two.
        distances: E (2P, Hq, D).
        distance_bias: beta (2P, Hq).
    """

    rotary = False

    def __init__(self, recipe: RCMHA, heads: Heads) -> None:
        nn.Module.__init__(self)
        self.recipe, self.heads = recipe, heads
        self.conv_q, self.conv_k, self.conv_v = (
            None if recipe.kernel == 1 else HeadConvolution(
                count, width, recipe.kernel, shared_heads=recipe.shared_heads
            )
            for count, width in (
                (heads.query, heads.key_dim), (heads.kv, heads.key_dim), (heads.kv, heads.value_dim)
            )
        )  # fmt: skip
        self.value_bias: nn.Parameter | None = None
        if recipe.value_bias:
            self.value_bias = nn.Parameter(torch.empty(heads.kv, heads.value_dim))
        self.key_bias: nn.Parameter | None = None
        self.distances: nn.Parameter | None = None
        self.distance_bias: nn.Parameter | None = None
        if recipe.relative:
            self.key_bias = nn.Parameter(torch.empty(heads.query, heads.key_dim))
            self.distances = nn.Parameter(torch.empty(2 * recipe.reach, heads.query, heads.key_dim))
            self.distance_bias = nn.Parameter(torch.empty(2 * recipe.reach, heads.query))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All that isn't a filter starts at zero: no order but that of the mask and the filters."""
        for x in (self.value_bias, self.key_bias, self.distances, self.distance_bias):
            if x is not None:
                nn.init.zeros_(x)

    # -- whole sequences ---------------------------------------------------------------------------
    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        """All tokens at once; the last Lq ones where there are more keys, such as a memory.

        Shapes as in a call.

        Raises:
            InputError: ctx has a bias or a softcap, which these scores have no place for; or the
                queries aren't the last tokens of the keys, one after the other.
        """
        self._check(q, k, v, ctx, k.shape[2])
        return self._whole(q, k, v, ctx, k.shape[2])

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, total: int) -> AttentionOutput:
        """The convolutions from zeros on; keys are the last ones of the `total` that ctx counts."""
        where = self._last(ctx, q, k, total)
        past = k.shape[2] - q.shape[2]
        of_keys = self._seen(k, 0, replace(where, q_positions=where.kv_positions))
        of_queries = of_keys if not past else self._seen(q, max(past, 0), where)
        q = self._mixed(self.conv_q, q, None, of_queries)
        k = self._mixed(self.conv_k, k, None, of_keys)
        v = self._mixed(self.conv_v, self._biased(v), None, of_keys)
        return self._attend(q, k, v, ctx, total)

    @staticmethod
    def _last(ctx: Context, q: Tensor, k: Tensor, total: int) -> Context:
        """The context with positions of the last keys, where these aren't all of them."""
        held = k.shape[2]
        if held == total or _plain(ctx):
            return ctx
        q_pos, k_pos = positions(
            q.shape[2], total, ctx.q_positions, ctx.kv_positions, device=q.device
        )
        return replace(ctx, q_positions=q_pos, kv_positions=k_pos[:, total - held :])

    # -- segments and decoding ---------------------------------------------------------------------
    @override
    def new_state(self) -> CarriedState | Memory:
        recipe = self.recipe
        if recipe.segment_conv == "reset":
            return Memory(self.heads.dim, recipe.memory)
        return CarriedState(self.heads, recipe.kernel - 1, recipe.memory)

    @override
    def recalled(self, x: Tensor, x_kv: Tensor, state: State) -> Tensor:
        """Behind the memory, where keys and values are made of it anew.

        Raises:
            InputError: keys come from another sequence.
        """
        if not isinstance(state, Memory):
            return x_kv
        if x_kv is not x:
            raise InputError(
                "rcmha(segment_conv='reset') keeps the layer's own input as its memory; with x_kv "
                "there is none."
            )
        if state.hidden is None or len(state.hidden) != len(x):  # `step` refuses another batch
            return x
        return torch.cat((state.hidden.to(x.dtype), x), 1)

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """The next n tokens; with "reset" k and v are also those of the memory before them."""
        total = len(state) + q.shape[2]
        self._check(q, k, v, ctx, total)
        if state.batch not in (None, len(q)):
            raise InputError(
                f"rcmha: the state holds {state.batch} sequences, but {len(q)} go on; reorder it."
            )
        if isinstance(state, Memory):
            if ctx.hidden is None:
                raise InputError(
                    "rcmha(segment_conv='reset') keeps the layer's input, and ctx.hidden has none; "
                    "call it by foveate.Attention."
                )
            result = self._whole(q, k, v, ctx, total)
            state.take(ctx.hidden)
            return result
        assert isinstance(state, CarriedState)
        v = self._biased(v)
        seen = self._seen(q, len(state), ctx)
        before = state.before
        mixed = self._mixed(self.conv_q, q, before.get("q"), seen)
        keys, values = state.take(
            self._mixed(self.conv_k, k, before.get("k"), seen),
            self._mixed(self.conv_v, v, before.get("v"), seen),
        )
        result = self._attend(mixed, keys, values, ctx, total)
        state.go_on(q=q, k=k, v=v)
        return result

    # -- parts -------------------------------------------------------------------------------------
    def _check(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, total: int) -> None:
        check_tensors(q, k, v)
        for name in ("bias", "softcap"):
            if getattr(ctx, name) is not None:
                raise InputError(
                    f"rcmha: ctx.{name} has no place in scores that are relative; expected None."
                )
        if not _at_the_end(ctx, q.shape[2], total, q.device):
            raise InputError(
                f"rcmha: distances and the convolution go by the order of tokens; expected the "
                f"{q.shape[2]} queries to be the last of the {total} keys, at positions that count "
                "up by one."
            )

    def _seen(self, x: Tensor, past: int, ctx: Context) -> Seen:
        """For each distance which tokens of x (B, H, n, D) may take in the one so far before."""
        return [pairs_seen(x[:, 0], past, d, ctx) for d in range(1, self.recipe.kernel)]

    @staticmethod
    def _mixed(
        conv: HeadConvolution | None, x: Tensor, before: Tensor | None, seen: Seen
    ) -> Tensor:
        return x if conv is None else conv(x, before, seen)

    def _biased(self, v: Tensor) -> Tensor:
        return v if self.value_bias is None else v + self.value_bias.to(v.dtype)[:, None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, total: int) -> AttentionOutput:
        """Over keys that are the last ones of `total`."""
        mask, layout, causal = self._visible(q, k, ctx, total)
        options = ctx.options
        if self.key_bias is not None:
            options["bias"] = self.by_distance(q, k.shape[2], ctx.scale, causal=causal)
            q = q + self.key_bias.to(q.dtype)[:, None]
        return attention(q, k, v, mask, layout=layout, **options)

    def _visible(
        self, q: Tensor, k: Tensor, ctx: Context, total: int
    ) -> tuple[Mask | None, Layout | None, bool]:
        """The mask or the layout of this call, and whether no query sees a later key."""
        n, held = q.shape[2], k.shape[2]
        if _plain(ctx):
            return ctx.mask, None, ctx.mask is not None or n == 1
        where = self._last(ctx, q, k, total)
        causal = tokens_of(q, k, where).causal
        if held < total and ctx.mask is not None:  # it may say that it is for all of them
            return _elements(ctx.mask, where), None, causal
        if ctx.q_positions is None and ctx.kv_positions is None:
            return ctx.mask, None, causal
        return None, mask_layout(ctx.mask, q, k, where), causal

    def by_distance(
        self, q: Tensor, keys: int, scale: float | None = None, *, causal: bool = True
    ) -> RelativeBias:
        """(q_i . E[P + o] + beta[P + o]) scaled, for the distances o that occur.

        The op aligns it with the keys, as Transformer-XL's shift of a padded matrix does.

        Args:
            q: (B, Hq, Lq, D), behind the convolution, without u.
            keys: Lkv; the last query stands with the last key.
            scale: on the scores; None is D ** -0.5.
            causal: no query sees a later key, so that no o is above 0.

        Returns:
            A table (B, Hq, Lq, R), R at most the number of distances, in fp32 or wider.
        """
        assert self.distances is not None
        assert self.distance_bias is not None
        reach = self.recipe.reach
        low = -min(reach, max(keys - 1, 0))
        high = 0 if causal else min(reach - 1, max(q.shape[2] - 1, 0))
        wide = torch.promote_types(q.dtype, torch.float32)
        rows = slice(reach + low, reach + high + 1)
        table = q.to(wide) @ self.distances[rows].to(wide).permute(1, 2, 0)
        table = table + self.distance_bias[rows].to(wide).T[:, None]
        return RelativeBias(table * (q.shape[3] ** -0.5 if scale is None else scale), low)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return repr(self.recipe)


def _at_the_end(ctx: Context, n: int, total: int, device: torch.device) -> bool:
    """Whether the n queries are the last of `total` keys, at positions that count up by one."""
    if n > total:
        return False
    if ctx.q_positions is None and ctx.kv_positions is None:
        return True

    def look() -> bool:
        q, k = positions(n, total, ctx.q_positions, ctx.kv_positions, device=device)
        return bool((q == k[:, total - n :]).all()) and bool((k.diff() == 1).all())

    return remember(ctx, (_at_the_end, n, total, device), look)


def _plain(ctx: Context) -> bool:
    """Whether the last keys, however many, are seen as the mask says of whole sequences."""
    here = ctx.q_positions is None and ctx.kv_positions is None
    return here and (ctx.mask is None or ctx.mask.spec == "causal()")


def _elements(mask: Mask, ctx: Context) -> Mask:
    """The mask over queries and keys at the positions of ctx, (1 or B, n) and (1 or B, m)."""
    assert ctx.q_positions is not None
    assert ctx.kv_positions is not None
    batches, heads = mask.groups()
    rows = []
    for b in range(max(batches, len(ctx.q_positions), len(ctx.kv_positions))):
        q, k = (p[b if len(p) > 1 else 0] for p in (ctx.q_positions, ctx.kv_positions))
        rows.append(torch.stack([mask._element(q[:, None], k, b, h) for h in range(heads)]))
    return blocks(torch.stack(rows), 1)
