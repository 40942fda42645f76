"""The attention side: micro-batches take turns, layer by layer, while others are under way.

    for each layer, for each micro-batch:  take its FFN result, add it, attend, send

With one micro-batch either side waits for the other; with three, attention works on one, the FFN
side on another, and the third travels. A pass through all layers gives one token for each row of a
micro-batch, or takes in one chunk of a prompt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.models.causal_lm import FoveateForCausalLM
from foveate.models.masking import Seen, seen_by
from foveate.models.position import positioned
from foveate.nn import Attention, Block
from foveate.nn.moe import MoE, Router
from foveate.ops.errors import InputError
from foveate.parallel.disaggregate.batch import MicroBatch, Request, Running, Step
from foveate.parallel.disaggregate.experts import Routes, check_feedforward, route
from foveate.parallel.disaggregate.link import Link
from foveate.parallel.disaggregate.message import Head
from foveate.parallel.disaggregate.plan import Plan
from foveate.parallel.disaggregate.stages import Pace, Trace, at_least
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache


def check_model(model: FoveateForCausalLM) -> None:
    """Refuse models whose layers can't be taken apart.

    Raises:
        InputError: a mixer, a reference stream, register tokens, a cache that isn't made of tokens,
            a feed-forward layer that can't be split, or a model in training mode.
    """
    if model.training:
        raise InputError("disaggregate: the model is in training mode; call model.eval() before.")
    if model.model.reference is not None:
        raise InputError("disaggregate: a model with a reference stream can't be taken apart.")
    if model.model.registers is not None:
        raise InputError(
            "disaggregate: the model has register tokens, which its ranks don't put before a "
            "request; take a model without."
        )
    for i, block in enumerate(model.model.blocks):
        if not isinstance(block.attention, Attention) or block.attention_norm is None:
            raise InputError(
                f"disaggregate: layer {i} has a mixer; expected attention in every layer."
            )
        if not isinstance(block.attention.new_cache(), TokenCache):
            raise InputError(
                f"disaggregate: layer {i} decodes from a state of its own, which can't join or "
                "leave a batch; expected an attention over cached keys."
            )
        check_feedforward(block.feedforward, i)


class AttentionHalf(nn.Module):
    """A block without its feed-forward layer: what an attention rank keeps of it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        assert isinstance(block.attention, Attention)
        self.attention_norm, self.attention = block.attention_norm, block.attention
        self.feedforward_norm = block.feedforward_norm
        self.router: Router | None = None
        if isinstance(block.feedforward, MoE):
            self.router = block.feedforward.router

    def forward(self, x: Tensor, ctx: Context, cache: TokenCache) -> tuple[Tensor, Tensor]:
        """Add attention to x (B, L, dim); the sum, and its norm, which goes to the experts."""
        assert self.attention_norm is not None
        x = x + self.attention(self.attention_norm(x), ctx=ctx, cache=cache).y
        return x, self.feedforward_norm(x)


@dataclass
class Flight:
    """A micro-batch's pass: what it works on, its x so far, and its context."""

    step: Step | None
    x: Tensor
    ctx: Context
    begun: int


class Pass(NamedTuple):
    """A pass that is over: which micro-batch, "decode", "prompt" or "idle", when it ended (s)."""

    micro_batch: int
    kind: str
    ended: float


@dataclass
class Decoded:
    """What an attention rank produced.

    tokens by request id, new ones only; logits (new, vocab) by id if they were kept; its passes in
    order; most bytes of cache at once.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)
    cache_bytes: int = 0

    def seconds_per_token(self) -> list[float]:
        """TPOT as measured: between a micro-batch's decoding passes, in the order of their ends."""
        last: dict[int, Pass] = {}
        found = []
        for one in self.passes:
            before = last.get(one.micro_batch)
            if before is not None and before.kind == one.kind == "decode":
                found.append(one.ended - before.ended)
            last[one.micro_batch] = one
        return found


class Decoder:
    """Greedy decoding of requests on one attention rank.

    Args:
        model: the whole model; only the attention side's parts are used.
        plan: all ranks.
        link: to the FFN side.
        end: a token that ends a sequence.
        told: called with (id, tokens) as soon as a sequence is finished.
        keep_logits: whether to keep the logits of all produced tokens.
    """

    def __init__(
        self,
        model: FoveateForCausalLM,
        plan: Plan,
        link: Link,
        *,
        end: int | None = None,
        told: Callable[[str, list[int]], None] | None = None,
        keep_logits: bool = False,
        trace: Trace | None = None,
        pace: Pace | None = None,
    ) -> None:
        check_model(model)
        inner = model.model
        self.embedding, self.positions = inner.embed_tokens, inner.embed_positions
        self.layers = [AttentionHalf(block) for block in inner.blocks]
        self.norm, self.head, self.vocab = inner.norm, model.lm_head, model.config.vocab_size
        self.plan, self.link, self.end, self.told = plan, link, end, told
        self.keep_logits = keep_logits
        self.trace = Trace("local", on=False) if trace is None else trace
        self.pace = Pace() if pace is None else pace
        self.device = self.head.weight.device
        kinds = [layer.attention.projection.fields for layer in self.layers]
        self.batches = [
            MicroBatch(kinds, plan.rows, self.device) for _ in range(plan.micro_batches)
        ]
        self.queue: deque[Request] = deque()
        self.out = Decoded()

    @torch.no_grad()
    def run(self, requests: Sequence[Request]) -> Decoded:
        """Decode all requests, taking them in as there is room.

        Raises:
            InputError: a token or a position that the model doesn't know, or an id twice.
            RankLostError: from the link, when another rank is lost.
        """
        check_requests(requests, self.vocab, self.positions)
        self.queue.extend(requests)
        live = list(range(self.plan.micro_batches))
        flights: dict[int, Flight] = {}
        turn = -1
        while live:
            turn += 1
            for layer, half in enumerate(self.layers):
                for m in list(live):
                    if m in flights:
                        reply = self.link.take(m)
                        if reply.done:
                            live.remove(m)
                            continue
                        flights[m].x = flights[m].x + reply.rows.view_as(flights[m].x)
                    with at_least(self.pace.attention):
                        if layer == 0:
                            if m in flights:
                                self._end(m, flights[m])
                            flights[m] = self._begin(m, turn)
                        rows, routes = self._stage(m, layer, half, flights[m])
                    done = layer == 0 and not self.queue and not any(b.load for b in self.batches)
                    self.link.post(Head(layer, m, turn, len(rows), done), rows, routes)
        self.link.close()
        return self.out

    def _begin(self, m: int, turn: int) -> Flight:
        """Let waiting requests join, and start the micro-batch's pass."""
        batch = self.batches[m]
        least = min(other.load for other in self.batches)
        while self.queue and self.queue[0].after <= turn and batch.load < self.plan.rows:
            if batch.load > least:
                break  # another micro-batch has more room
            batch.join(self.queue.popleft())
        step = batch.next()
        begun = time.monotonic_ns()
        if step is None:
            width = self.embedding.weight.shape[1]
            return Flight(None, self.embedding.weight.new_zeros(0, 1, width), Context(), begun)
        tokens = self.embedding(step.ids)
        new = step.ids.shape[1]
        seen: Seen = seen_by(step.attention_mask, None, len(tokens), step.past, new)
        ctx = Context(
            mask=seen.mask,
            q_positions=seen.q_positions,
            kv_positions=seen.kv_positions,
            phase="decode" if step.prompt is None else "prefill",
            embeddings=tokens,
        )
        x = positioned(self.positions, tokens, step.past, seen, None)
        return Flight(step, x, ctx, begun)

    def _stage(
        self, m: int, layer: int, half: AttentionHalf, flight: Flight
    ) -> tuple[Tensor, Routes | None]:
        """Attention of one layer; what the experts get of it (n, dim), and which of them."""
        with self.trace.span("attention", m, layer=layer, rows=len(flight.x)):
            if flight.step is None:
                return flight.x.flatten(0, 1), None
            flight.ctx.layer = layer
            flight.x, inner = half(flight.x, flight.ctx, flight.step.caches[layer])
            rows = inner.flatten(0, 1)
            return rows, route(half.router, rows)

    def _end(self, m: int, flight: Flight) -> None:
        """Choose tokens; finished sequences leave and are told of."""
        step = flight.step
        if step is not None:
            with self.trace.span("head", m):
                logits = self.head(self.norm(flight.x[:, -1]))
                held = sum(batch.bytes() for batch in self.batches)
                self.out.cache_bytes = max(self.out.cache_bytes, held)
                for one in self.batches[m].took(step, logits, self.end, self.keep_logits):
                    self._finish(one)
        kind = "idle" if step is None else "decode" if step.prompt is None else "prompt"
        self.out.passes.append(Pass(m, kind, time.monotonic()))

    def _finish(self, one: Running) -> None:
        name = one.request.id
        self.out.tokens[name] = one.produced
        if self.keep_logits:
            self.out.logits[name] = torch.stack(one.logits)
        if self.told is not None:
            self.told(name, one.produced)


def check_requests(
    requests: Sequence[Request], vocab: int, positions: nn.Embedding | None = None
) -> None:
    """Refuse ids that repeat, tokens outside of the vocabulary, and more than learned positions.

    Raises:
        InputError: so.
    """
    names = [request.id for request in requests]
    if len(set(names)) < len(names):
        raise InputError("requests: expected different ids, so that outputs can be told apart.")
    for request in requests:
        wrong = [token for token in request.ids if not 0 <= token < vocab]
        if wrong:
            raise InputError(
                f"Request({request.id!r}): token {wrong[0]} is outside of the vocabulary of "
                f"{vocab}."
            )
        length = len(request.ids) + request.new - 1  # the last new token isn't read again
        if positions is not None and length > positions.num_embeddings:
            raise InputError(
                f"Request({request.id!r}): {len(request.ids)} tokens and {request.new} new ones "
                f"don't fit into the {positions.num_embeddings} positions that this model has "
                "learned."
            )
