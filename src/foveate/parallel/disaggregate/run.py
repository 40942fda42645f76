"""Decoding with attention and experts apart: what each rank runs, and the same in one process.

    plan = Plan(attention=2, ffn=1)
    result = serve(model, requests, plan, store=store)      # on each of plan.size ranks
    alone = serve_alone(model, requests, Plan())            # the same loop, without other ranks

Step-3's attention-FFN disaggregation (AFD), arXiv 2507.19427. Tested with gloo on CPUs; the two
directions are process groups of their own, as NCCL needs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from foveate.models.causal_lm import FoveateForCausalLM
from foveate.nn.moe import MoE, Router
from foveate.ops.errors import InputError
from foveate.parallel.disaggregate.batch import Request
from foveate.parallel.disaggregate.decoder import (
    Decoded,
    Decoder,
    check_model,
    check_requests,
)
from foveate.parallel.disaggregate.experts import FFNPart
from foveate.parallel.disaggregate.link import AttentionLink, FFNLink, LocalLink, make_groups
from foveate.parallel.disaggregate.message import Back, Forth
from foveate.parallel.disaggregate.plan import Plan
from foveate.parallel.disaggregate.stages import Pace, Trace, at_least
from foveate.parallel.disaggregate.watch import RankLostError, Watch


@dataclass
class Served:
    """What a rank gives back.

    name: the rank's; decoded: of an attention rank, None of others; parameters: numbers that it
    needs of the model; events: of every rank, by name, on attention-0 if they were traced.
    """

    name: str
    decoded: Decoded | None = None
    parameters: int = 0
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def serve(
    model: FoveateForCausalLM,
    requests: Sequence[Request],
    plan: Plan,
    *,
    store: distributed.Store,
    end: int | None = None,
    told: Callable[[str, list[int]], None] | None = None,
    keep_logits: bool = False,
    traced: bool = False,
    pace: Pace | None = None,
    release: bool = False,
) -> Served:
    """Run this rank's part until all requests are decoded.

    Call it on all ranks of the default process group, with the same model and requests. Attention
    rank a takes requests a, a + N_A, ... and returns what they produced.

    Args:
        model: the whole model, in its dtype, in eval mode and on this rank's device.
        requests: prompts; see `Request`.
        plan: who does what.
        store: shared by all ranks and outliving each of them, such as that of `rendezvous`.
        end: a token that ends a sequence.
        told: called on an attention rank with (id, tokens) when a sequence is finished.
        keep_logits: whether to return the logits of all produced tokens.
        traced: whether to keep what each stage took.
        pace: least lengths of the stages, for measuring the pipeline itself.
        release: whether to free the weights that this rank doesn't need; the model is then of no
            other use.

    Raises:
        InputError: the group's size isn't the plan's, the model can't be taken apart, or requests
            don't fit.
        RankLostError: another rank died or stalled: its name, and what this rank had finished.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if size != plan.size:
        raise InputError(
            f"serve: the plan has {plan.size} ranks ({', '.join(plan.names)}), the group {size}."
        )
    check_model(model)
    check_requests(requests, model.config.vocab_size)
    name = plan.name(rank)
    watch, trace = Watch(store, name, plan.patience), Trace(name, traced)
    pace = Pace() if pace is None else pace
    forth, back, device = *layouts(model, plan), model.lm_head.weight.device
    served = Served(name)
    decoder: Decoder | None = None
    others = [other for other in plan.names if other != name]
    try:
        with watch:
            groups = watch.call(lambda: make_groups(plan, rank), *others)
            given = (forth, back, groups, watch, trace, pace, device)
            if rank < plan.attention:
                link = AttentionLink(plan, *given)
                decoder = Decoder(model, plan, link, end=end, told=told, keep_logits=keep_logits,
                                  trace=trace, pace=pace)  # fmt: skip
                mine = nn.ModuleList(
                    [*decoder.layers, decoder.embedding, decoder.norm, decoder.head]
                )
                served.parameters = _count(mine)
                if release:
                    _free(block.feedforward for block in model.model.blocks)
                served.decoded = decoder.run(requests[rank :: plan.attention])
            else:
                parts = parts_of(model, plan, rank - plan.attention)
                served.parameters = _count(parts)
                if release:
                    _free([model])
                _compute(parts, FFNLink(plan, rank, *given), plan, trace, pace)
            watch.wait(watch.call(lambda: distributed.barrier(async_op=True), *others), *others)
            if traced:
                served.events = _events(watch, trace, plan)
    except RankLostError as error:
        finished = None if decoder is None else decoder.out.tokens
        raise RankLostError(error.rank, error.reason, finished) from error
    except Exception as error:
        watch.confess(error)
        raise
    return served


@torch.no_grad()
def serve_alone(
    model: FoveateForCausalLM,
    requests: Sequence[Request],
    plan: Plan | None = None,
    *,
    end: int | None = None,
    told: Callable[[str, list[int]], None] | None = None,
    keep_logits: bool = False,
) -> Decoded:
    """The same loop in one process: as on one attention and one FFN rank, bit by bit.

    Raises:
        InputError: the model can't be taken apart, or requests don't fit.
    """
    plan = Plan() if plan is None else plan
    check_model(model)
    plan = Plan(micro_batches=plan.micro_batches, rows=plan.rows, dispatch=plan.dispatch)
    forth, _ = layouts(model, plan)
    device = model.lm_head.weight.device
    link = LocalLink(plan, parts_of(model, plan, 0), forth, device)
    return Decoder(model, plan, link, end=end, told=told, keep_logits=keep_logits).run(requests)


def layouts(model: FoveateForCausalLM, plan: Plan) -> tuple[Forth, Back]:
    """The messages of a model."""
    dim, dtype = model.config.hidden_size, model.lm_head.weight.dtype
    experts = [b.feedforward for b in model.model.blocks if isinstance(b.feedforward, MoE)]
    top_k = max((layer.router.top_k for layer in experts), default=0)
    return Forth(plan, dim, top_k, dtype), Back(plan, dim, dtype)


def parts_of(model: FoveateForCausalLM, plan: Plan, index: int) -> nn.ModuleList:
    """What FFN rank `index` keeps of each layer."""
    layers = [block.feedforward for block in model.model.blocks]
    return nn.ModuleList(FFNPart(layer, plan, index) for layer in layers)  # type: ignore[arg-type]


@torch.no_grad()
def _compute(parts: nn.ModuleList, link: FFNLink, plan: Plan, trace: Trace, pace: Pace) -> None:
    """The FFN side: in the order of the attention side, until nobody has anything left."""
    live = list(range(plan.micro_batches))
    turn = -1
    while live:
        turn += 1
        for layer, part in enumerate(parts):
            for m in list(live):
                batch = link.get(m, layer, turn)
                with at_least(pace.ffn), trace.span("ffn", m, layer=layer, rows=len(batch.tokens)):
                    tokens = batch.tokens
                    y = part(tokens, batch.routes) if len(tokens) else tokens
                if link.respond(m, batch, y):
                    live.remove(m)
    link.close()


def _events(watch: Watch, trace: Trace, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """All ranks' events on the first one, through the store; the others get only their own."""
    watch.store.set(f"trace/{trace.name}", json.dumps(list(trace.events)))
    if trace.name != plan.names[0]:
        return {trace.name: list(trace.events)}
    watch.store.set_timeout(timedelta(seconds=watch.patience))
    return {
        name: json.loads(watch.call(partial(watch.store.get, f"trace/{name}"), name))
        for name in plan.names
    }


def _free(modules: Iterable[nn.Module]) -> None:
    """Let go of weights; routers stay, which are the attention side's."""
    for module in modules:
        routers = [m for m in module.modules() if isinstance(m, Router)]
        kept = {id(p) for router in routers for p in router.parameters()}
        for p in module.parameters():
            if id(p) not in kept:
                p.data = p.data.new_empty(0)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
