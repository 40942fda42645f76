"""Mixture-of-head attention as a projection: multi-head, or grouped, with gates on the heads.

    y = sum_i diag(g_i) H_i W_O,i

H_i is ordinary attention of head i over all keys; g (see `gates`) says for every token which heads
count, and how much. Keys and values of all heads are made and cached: a later token may need them,
so the cache is as large as without. What is saved is the attention of (token, head) pairs with a
gate of 0, which ragged execution doesn't compute. Jin et al. 2024, arXiv 2410.11842.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor
from typing_extensions import override

from foveate.methods.gqa import GroupedProjection
from foveate.methods.moh.gates import Gates, HeadRouter, QueryRouter
from foveate.methods.moh.ragged import Ragged, key_ranges
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.balance import load_balance
from foveate.parts.context import Context, Phase
from foveate.parts.projection import QKV, Recipe, Selection, Sizes, share

RAGGED_FROM = 1024  # keys; with fewer, listing the pairs costs more than it saves
_CHOICES = {
    "gates": ("normalized", "paper"),
    "router": ("input", "query"),
    "gradient": ("selected", "all"),
    "execution": ("auto", "ragged", "dense", "kv-masked"),
}


@dataclass(frozen=True)
class MoH(Recipe):
    """Each token chooses which heads count for it; 2 Hkv D numbers cached per token.

    Attributes:
        shared: h_s, heads that always count, the first ones; None is 40% of the counting heads.
        active: K, routed heads that count for a token; None makes 75% of all heads count.
        kv_heads: Hkv; None is one for each head.
        gates: "normalized" as in the released ViT and DiT code (a fresh layer starts like plain
            attention), or as printed in the "paper".
        router: "input", linear on the layer's input; "query", for a pretrained model: the norms of
            the queries, gates of 0 and 1, no new parameters ("gates" doesn't count then).
        gradient: router="query" passes gradients to the "selected" heads' probabilities or "all".
        beta: weight of the load-balance loss; 0 for none.
        execution: "dense" computes all pairs and multiplies by the gates, "ragged" only those that
            count, "auto" chooses; "kv-masked" also drops keys of heads that a token didn't choose,
            which is another function (the paper's speed test) and can't decode.

    Raises:
        InputError: an unknown choice, or numbers of heads that don't fit.
    """

    shared: int | None = None
    active: int | None = None
    kv_heads: int | None = None
    gates: Gates = "normalized"
    router: Literal["input", "query"] = "input"
    gradient: Literal["selected", "all"] = "selected"
    beta: float = 0.01
    execution: Literal["auto", "ragged", "dense", "kv-masked"] = "auto"

    def __post_init__(self) -> None:
        for name, least in (("shared", 0), ("active", 0), ("kv_heads", 1)):
            if getattr(self, name) is not None:
                whole("MoH", name, getattr(self, name), least=least)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"MoH({name}={value!r}) is unknown; {nearest(str(value), known)}")
        if not self.beta >= 0:
            raise InputError(f"MoH(beta={self.beta!r}): expected at least 0.")

    def counts(self, heads: int) -> tuple[int, int]:
        """(h_s, K) for h heads.

        Raises:
            InputError: more than there are, none that counts, or routed heads that never do.
        """
        total = max(1, round(0.75 * heads))
        if self.shared is not None and self.active is not None:
            shared, active = self.shared, self.active
        elif self.shared is not None:
            shared = self.shared
            active = max(total - shared, min(1, heads - shared))
        elif self.active is not None:
            active = self.active
            shared = max(total - active, 0) if active < heads else 0
        else:
            shared = -(-2 * total // 5)
            active = total - shared
        routed = heads - shared
        if routed < 0 or active > routed or (routed and not active) or not shared + active:
            raise InputError(
                f"MoH(shared={shared}, active={active}): of {heads} heads {max(routed, 0)} are "
                "routed; expected between 1 and all of those to be active (or all heads shared)."
            )
        return shared, active

    @override
    def build(self, sizes: Sizes) -> MoHProjection:
        return MoHProjection(sizes, self)


class MoHProjection(GroupedProjection):
    """Mixture of heads (arXiv 2410.11842); weights as in GQA, and the router's."""

    selects: ClassVar[bool] = True

    def __init__(self, sizes: Sizes, recipe: MoH) -> None:
        heads = sizes.num_heads
        super().__init__(sizes, heads, recipe.kv_heads or heads, sizes.width)
        shared, active = recipe.counts(heads)
        self.shared, self.active, self.routed = shared, active, heads - shared
        self.beta, self.execution = recipe.beta, recipe.execution
        self.scaled = recipe.router == "query" or recipe.gates == "normalized"
        self.all_outputs = recipe.router == "query" and recipe.gradient == "all"
        self.mine = slice(0, heads)  # heads of this rank
        self.router: HeadRouter | QueryRouter
        if recipe.router == "query":
            self.router = QueryRouter(shared, self.routed, active, recipe.gradient)
        else:
            self.router = HeadRouter(sizes.dim, shared, self.routed, active, recipe.gates)

    @property
    def share_active(self) -> float:
        """Rho = (h_s + K) / h, the part of all (token, head) pairs that counts."""
        return (self.shared + self.active) / (self.shared + self.routed)

    @override
    def select(self, x: Tensor, q: Tensor, real: Tensor | None, phase: Phase) -> Selection:
        gated = self.router(q if isinstance(self.router, QueryRouter) else x)
        aux: dict[str, Tensor] = {}
        if self.routed:
            chosen = gated.active[..., self.shared :]
            kept = load_balance(gated.probs, chosen, real, scaled=self.scaled)
            aux["head_load"] = kept.load
            if phase == "train" and self.beta:
                aux["head_balance_loss"] = self.beta * kept.loss
        gates, active = (x[..., self.mine].transpose(1, 2) for x in (gated.gates, gated.active))
        return Selection(gates, active, aux)

    @override
    def attend(
        self, attention: Attention, qkv: QKV, ctx: Context, selection: Selection | None
    ) -> Tensor:
        assert selection is not None
        ranges = self._ragged(attention, qkv, ctx)
        if ranges is None:
            return super().attend(attention, qkv, ctx, selection)
        ragged = Ragged(selection.active, ranges, kv_masked=self.execution == "kv-masked")
        return super().attend(ragged, qkv, ctx, selection)

    def _ragged(self, attention: Attention, qkv: QKV, ctx: Context) -> Tensor | None:
        """The keys that each query may see, where only active pairs are computed; None is dense.

        Raises:
            InputError: the execution that was asked for can't run this call.
        """
        forced = self.execution in ("ragged", "kv-masked")
        q_len, kv_len = qkv.q.shape[2], qkv.k.shape[2]
        every, short = self.active == self.routed, kv_len < RAGGED_FROM
        if not forced and (every or short or self.execution == "dense" or not attention.exact):
            return None
        ranges = key_ranges(ctx, q_len, kv_len, qkv.q.device)
        reasons = []
        if not attention.exact:
            reasons.append("the attention isn't full attention")
        if ranges is None:
            reasons.append(
                f"the mask is {ctx.mask!r}, neither causal() nor padding(...) nor both, or the "
                "keys' positions don't count up by one"
            )
        if self.all_outputs and ctx.phase == "train":
            reasons.append("gradient='all' needs the outputs of all heads")
        if self.execution == "kv-masked":
            if q_len != kv_len:
                reasons.append("keys in the cache don't say who chose them, so it can't decode")
            if ranges is not None and bool(ranges[..., 0].any()):
                reasons.append("there is padding in front, which it can't leave out")
        if reasons and forced:
            raise InputError(
                f"MoH(execution={self.execution!r}) can't run this call: {'; '.join(reasons)}. "
                "Use execution='auto'."
            )
        return None if reasons else ranges

    @override
    def shard(self, rank: int, ranks: int) -> Self:
        """Split heads; the routers are on every rank and see all heads.

        Raises:
            InputError: the query router, which needs the queries of all heads.
        """
        if isinstance(self.router, QueryRouter):
            raise InputError(
                "shard: router='query' chooses by the queries of all heads, which no rank has."
            )
        part = super().shard(rank, ranks)
        mine = share(self.heads, rank, ranks, "query heads")
        part.mine = slice(self.mine.start + mine.start, self.mine.start + mine.stop)
        return part
