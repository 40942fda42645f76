"""The attention of a Routing Transformer's layer.

For routing heads, with q = LN(q), k = LN(k) (k = q where shared):

    members of cluster c: the w tokens with the largest mu_c . x
    out_i = sum over the clusters of i of softmax(scale q_i . k_j over the cluster's j) v_j / number

arXiv 2003.05997, section 4 and algorithm 1; the released code's details.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.routing_transformer.centroids import Centroids, layer_norm
from foveate.methods.routing_transformer.clusters import (
    Clusters,
    average,
    cluster_layout,
    gather_clusters,
    in_tiles,
    pick,
    with_memory,
)
from foveate.methods.routing_transformer.recipe import RoutingTransformer
from foveate.methods.routing_transformer.relative import Embeddings, attend_clusters
from foveate.methods.routing_transformer.state import RoutingState
from foveate.methods.routing_transformer.step import step
from foveate.ops import AttentionOutput, Layout, Mask, attention, window, with_sinks
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.parts.attention import Heads, mask_layout
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.state import State, Stateful
from foveate.parts.tokens import Tokens, tokens_of


class RoutingAttention(Stateful, nn.Module):
    """Local heads first, then routing heads; made by `RoutingTransformer.build`.

    In training (`module.training`) it leaves `commitment_loss` in `ctx.aux` and moves its
    centroids, after routing with the old ones. Centroids are buffers, one set for each key/value
    head that routes.

    Args:
        hyper: see `RoutingTransformer`.
        heads: sizes of the layer.

    Raises:
        InputError: `local` isn't a whole number of groups of query heads.
    """

    def __init__(self, hyper: RoutingTransformer, heads: Heads) -> None:
        nn.Module.__init__(self)
        self.hyper, self.heads = hyper, heads
        group = heads.query // heads.kv
        local = heads.query if heads.layer < hyper.skip_first else hyper.local
        if local is None:
            local = heads.kv // 2 * group if heads.kv > 1 else heads.query // 2
        if local > heads.query or (heads.kv > 1 and local % group):
            raise InputError(
                f"routing-transformer(local={local}): expected up to {heads.query} query heads, in "
                f"whole groups of the {group} that share a key/value head."
            )
        self.local, self.routed = local, heads.query - local
        self.local_kv = local // group if heads.kv > 1 else min(local, 1)
        self.routed_kv = heads.kv - self.local_kv if heads.kv > 1 else min(self.routed, 1)
        self.centroids: Centroids | None = None
        self.memory: nn.ParameterList | None = None
        self.relative: nn.ParameterList | None = None
        if not self.routed:
            return
        if hyper.assignment == "nearest":
            self.centroids = Centroids(
                self.routed_kv,
                hyper.clusters,
                heads.key_dim,
                update=hyper.update,
                init=hyper.init,
                decay=hyper.decay,
                micro_batches=hyper.micro_batches,
            )
        if hyper.memory:
            size = hyper.clusters * hyper.memory
            self.memory = _tables(
                (self.routed_kv, size, heads.key_dim), (self.routed_kv, size, heads.value_dim)
            )
        if hyper.relative:
            size = hyper.relative
            self.relative = _tables(
                (self.routed, size, heads.key_dim), (self.routed, size, heads.value_dim)
            )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh memories and embeddings; centroids begin afresh by themselves."""
        for tables in (self.memory, self.relative):
            for table in tables or ():
                nn.init.normal_(table, std=table.shape[-1] ** -0.5)

    # -- all tokens at once -----------------------------------------------------------------------
    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        """All tokens at once; shapes as in `Attention.__call__`.

        Raises:
            InputError: a mask that is neither causal nor full, a bias, new tokens without the state
                that holds the earlier ones, or sizes that aren't the layer's.
        """
        self._check(q, k, v, ctx)
        if not q.shape[0] or not q.shape[2]:
            return attention(q, k, v, **ctx.options)
        tokens = tokens_of(q, k, ctx)
        self._check_mask(ctx, tokens, q.shape[2], k.shape[2])
        outs, lses = [], []
        if self.local:
            seen = self.local_attend(q, k[:, : self.local_kv], v[:, : self.local_kv], ctx)
            outs.append(seen.out)
            lses.append(seen.lse)
        if self.routed:
            outs.append(self._routed(*self.of_routing(q, k, v), ctx, tokens))
            lses.append(outs[-1].new_full(outs[-1].shape[:3], torch.nan, dtype=torch.float32))
        lse = torch.cat([x.to(lses[0].dtype) for x in lses], 1)
        return AttentionOutput(torch.cat(outs, 1), lse)

    def layouts(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context
    ) -> tuple[Layout | None, Layout | None]:
        """What the local heads and the routing heads visit, to count it; None without such heads.

        The second one's queries are gathered rows, one for each cluster that a query is in.
        """
        tokens = tokens_of(q, k, ctx)
        local = routed = None
        if self.local:
            local = mask_layout(self._local_mask(ctx), q, k, ctx, 128)
        if self.routed:
            q, k, v = self.of_routing(q, k, v)
            causal = _is_causal(ctx, tokens)
            q, keys, v = self._normal(q, k, v, causal)
            clusters, _ = self._clusters(self.scores(q, keys), tokens, causal)
            filled, tile = in_tiles(clusters)
            routed = cluster_layout(filled, tile, k.shape[2] + self._memories)
        return local, routed

    def local_attend(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, *, all_keys: bool = False
    ) -> AttentionOutput:
        """The local heads: own block and the one before, and the one behind if not causal.

        Args:
            q: (B, Hq, Lq, D), of which the first heads count.
            k: (B, local heads, Lkv, D).
            v: likewise.
            ctx: of the call.
            all_keys: all of these keys are seen.
        """
        options = ctx.options
        if ctx.sink_logits is not None:
            options["sink_logits"] = ctx.sink_logits[: self.local]
        q = q[:, : self.local]
        if all_keys:
            return attention(q, k, v, **options)
        mask = self._local_mask(ctx)
        if ctx.q_positions is None and ctx.kv_positions is None:
            return attention(q, k, v, mask, **options)
        return attention(q, k, v, layout=mask_layout(mask, q, k, ctx), **options)

    def of_routing(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads that route."""
        first = self.heads.kv - self.routed_kv
        return q[:, self.local :], k[:, first:], v[:, first:]

    def shares(self, causal: bool) -> bool:
        """Whether keys are the queries."""
        return causal if self.hyper.shared is None else self.hyper.shared

    def sees_own(self, shared: bool) -> bool:
        """Whether a query may see its own key beside others."""
        return not shared if self.hyper.own is None else self.hyper.own

    def routing_options(self, q: Tensor, ctx: Context) -> dict[str, object]:
        """What the model asks of the routing heads' attention; sinks are put in by `sunk`."""
        options = ctx.options
        if self.hyper.scale is not None:
            options["scale"] = self.hyper.scale
        elif options["scale"] is None:
            options["scale"] = q.shape[3] ** -0.5
        return options | {"sink_logits": None}

    def sunk(self, result: AttentionOutput, ctx: Context) -> Tensor:
        """The output of all routing heads with the model's sinks, if it has some."""
        if ctx.sink_logits is None:
            return result.out
        return with_sinks(result, ctx.sink_logits[self.local :]).out

    def scores(self, q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of normalised queries, and of keys where they are others, with all centroids."""
        if self.centroids is not None:
            return self.centroids.scores(q), None if k is None else self.centroids.scores(k)
        # Members drawn at random are the same for the queries and keys of a group.
        wide = torch.promote_types(q.dtype, torch.float32)
        size = (q.shape[0], self.routed_kv, self.hyper.clusters, q.shape[2])
        drawn = torch.rand(size, device=q.device, dtype=wide)
        if k is not None and k.shape[2] != q.shape[2]:
            other = torch.rand((*size[:3], k.shape[2]), device=q.device, dtype=wide)
        else:
            other = drawn
        return drawn.repeat_interleave(
            q.shape[1] // self.routed_kv, 1
        ), None if k is None else other

    # -- the routing heads ------------------------------------------------------------------------
    def _routed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, tokens: Tokens) -> Tensor:
        causal = _is_causal(ctx, tokens)
        q, keys, v = self._normal(q, k, v, causal)
        told = [(q, _padding(tokens.q_real))]
        if keys is not None:
            told.append((keys, _padding(tokens.k_real)))
        if self.centroids is not None and self.training:
            self.centroids.begin(told)
        scores = self.scores(q, keys)
        with torch.no_grad():
            clusters, alike = self._clusters(scores, tokens, causal)
        out = self.attend(q, q if keys is None else keys, v, clusters, ctx, alike)
        if self.centroids is not None and self.training:
            near = [self.centroids.nearest(x) for x in scores if x is not None]
            for (x, real), mine in zip(told, near, strict=True):
                for name, loss in self.centroids.losses(x, real, self.hyper.beta, mine).items():
                    ctx.aux[name] = ctx.aux[name] + loss if name in ctx.aux else loss
            self.centroids.learn(told, near)
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, clusters: Clusters, ctx: Context, alike: int = 1
    ) -> Tensor:
        """Attend within clusters and average, (B, H, Lq, Dv); `alike` clusters stand for one."""
        filled, tile = in_tiles(clusters)
        rows, length = filled.rows, q.shape[2]
        options = self.routing_options(q, ctx)
        eps = self.hyper.eps / alike
        if self.relative is not None:
            if not self.shares(True) or ctx.softcap is not None or ctx.sink_logits is not None:
                raise InputError(
                    "routing-transformer(relative=...): softcap and sinks aren't defined with it."
                )
            v = v.repeat_interleave(self.routed // self.routed_kv, 1)
            table = Embeddings(*self.relative)
            scale = float(options["scale"])  # type: ignore[arg-type]
            out, saw = attend_clusters(q, k, v, clusters, table, scale)
            return average(out, saw, clusters.rows, length, eps)
        if self.memory is not None:
            k, v = (_behind(x, table) for x, table in zip((k, v), self.memory, strict=True))
        if k.shape[1] != v.shape[1]:
            v = v.repeat_interleave(k.shape[1] // v.shape[1], 1)
        layout = cluster_layout(filled, tile, k.shape[2])
        result = attention(pick(q, rows), k, v, layout=layout, **options)  # type: ignore[arg-type]
        saw = result.lse > -torch.inf
        return average(self.sunk(result, ctx), saw, rows, length, eps)

    def _normal(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Normalised queries, keys (None where they are the queries), and values."""
        if self.shares(causal):
            if q.shape[2] != k.shape[2]:
                raise InputError(
                    f"routing-transformer(shared=True): keys are the queries, but there are "
                    f"{q.shape[2]} queries and {k.shape[2]} keys; expected shared=False or None."
                )
            return layer_norm(q), None, v
        return layer_norm(q), layer_norm(k), v

    def _clusters(
        self, found: tuple[Tensor, Tensor | None], tokens: Tokens, causal: bool
    ) -> tuple[Clusters, int]:
        """Who is where, and how many clusters each of them stands for."""
        hyper = self.hyper
        form = hyper.form
        if form == "auto":
            form = "sequence" if self.training or not causal else "prefix"
        if form == "prefix" and not causal:
            raise InputError(
                "routing-transformer(form='prefix'): a prefix is defined by a causal mask; leave "
                "form out for attention to everything."
            )
        if form == "prefix" and hyper.window is None:
            raise InputError(
                "routing-transformer(window=None): outside of training causal routing takes the "
                "members of each query's prefix, whose number must not grow with it; give window=."
            )
        scores, key_scores = found
        lengths = (scores.shape[3], (scores if key_scores is None else key_scores).shape[3])
        w = [hyper.window or -(-n // hyper.clusters) for n in lengths]
        alike = 1
        if max(lengths) <= min(w) and self.memory is None:
            # All tokens are in all clusters, which are then one and the same.
            alike = hyper.clusters
            scores = scores[:, :, :1]
            key_scores = None if key_scores is None else key_scores[:, :, :1]
        if key_scores is not None and key_scores.shape[1] != scores.shape[1]:
            key_scores = key_scores.repeat_interleave(scores.shape[1] // key_scores.shape[1], 1)
        counts = (min(w[0], lengths[0]), min(w[1], lengths[1]))
        clusters = gather_clusters(
            scores,
            key_scores,
            counts,
            (_padding(tokens.q_real), _padding(tokens.k_real)),
            causal=causal,
            prefix=form == "prefix",
            own=self.sees_own(key_scores is None),
        )
        if self.memory is not None:
            clusters = with_memory(clusters, lengths[1], hyper.memory)
        return clusters, alike

    @property
    def _memories(self) -> int:
        return self.hyper.memory * self.hyper.clusters

    def _local_mask(self, ctx: Context) -> Mask:
        near = window(1, 1, block=self.hyper.block)
        return near if ctx.mask is None else ctx.mask & near

    # -- decoding ---------------------------------------------------------------------------------
    @override
    def new_state(self) -> State:
        """An empty state.

        Raises:
            InputError: `window` is None.
        """
        return RoutingState(self)

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """The next tokens, routed among those before them; see `foveate.methods...step`."""
        assert isinstance(state, RoutingState)
        self._check(q, k, v, ctx)
        return step(self, q, k, v, ctx, state)

    @override
    def extra_repr(self) -> str:
        return repr(self.hyper)

    # -- what is refused --------------------------------------------------------------------------
    def _check(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> None:
        check_tensors(q, k, v)
        have, heads = (q.shape[1], k.shape[1], q.shape[3], v.shape[3]), self.heads
        want = (heads.query, heads.kv, heads.key_dim, heads.value_dim)
        tables = self.memory is not None or self.relative is not None
        if have[:3] != want[:3] or (tables and have != want):
            raise InputError(
                f"routing-transformer was built for (query heads, key heads, key width, value "
                f"width) {want}, got {have}."
            )
        if ctx.bias is not None:
            raise InputError(
                "routing-transformer: a bias on the scores has no place in clusters, whose members "
                "are gathered; use rotary positions, or relative=R for distances inside clusters."
            )

    def _check_mask(self, ctx: Context, tokens: Tokens, q_len: int, kv_len: int) -> None:
        if not is_causal_or_full(ctx, tokens):
            raise InputError(
                "routing-transformer is defined for causal attention and for attention to "
                "everything, but the mask is neither (a sliding window or packed documents, for "
                "example); call it per document."
            )
        if tokens.causal and q_len != kv_len and ctx.mask is not None:
            raise InputError(
                f"routing-transformer: {q_len} causal queries on {kv_len} keys: which clusters new "
                "tokens are in depends on earlier queries, which keys don't tell; decode with the "
                "layer's own cache, foveate.Attention(...).new_cache()."
            )


def _is_causal(ctx: Context, tokens: Tokens) -> bool:
    """Without a mask a single query, too, sees everything because it may, not by its place."""
    return ctx.mask is not None and tokens.causal


def _padding(real: Tensor) -> Tensor | None:
    """None where all tokens are real, which is faster."""
    return None if bool(real.all()) else real


def _behind(x: Tensor, table: Tensor) -> Tensor:
    """Put behind x (B, H, L, D) a table's rows (Hkv, m, D)."""
    table = table.to(x.dtype).repeat_interleave(x.shape[1] // len(table), 0)
    return torch.cat((x, table.expand(len(x), -1, -1, -1)), 2)


def _tables(*sizes: tuple[int, ...]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.empty(size)) for size in sizes)
