"""A small model of Step-3's shape and requests that join and leave, for the tests of AFD."""

from __future__ import annotations

import time

import torch
from torch import distributed

from foveate.models import FoveateConfig, FoveateForCausalLM
from foveate.parallel.disaggregate import Pace, Plan, RankLostError, Request, serve
from foveate.parallel.spawn import Place

VOCAB = 64
# (prompt tokens, new tokens, first pass): they come and go at different times, one at once.
SHAPES = [(5, 4, 0), (1, 7, 0), (9, 3, 0), (3, 6, 2), (7, 1, 3), (2, 5, 3), (6, 8, 5), (4, 3, 20)]


def tiny_step3(dtype: torch.dtype = torch.float32, layers: int = 4) -> FoveateForCausalLM:
    """MFA; dense layers at both ends, between them 5 experts, 3 a token, and a shared one."""
    torch.manual_seed(0)
    config = FoveateConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        projection="mfa(head_dim=8, query_rank=16)",
        moe_layers=list(range(1, layers - 1)),
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=24,
        initializer_range=0.2,
    )
    return FoveateForCausalLM(config).to(dtype).eval()


def some_requests() -> list[Request]:
    draw = torch.Generator().manual_seed(1)
    return [
        Request(f"r{i}", tuple(torch.randint(0, VOCAB, (n,), generator=draw).tolist()), new, after)
        for i, (n, new, after) in enumerate(SHAPES)
    ]


def one_by_one(model: FoveateForCausalLM, request: Request) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits of one request, whole sequence by whole sequence."""
    ids, found = list(request.ids), []
    with torch.no_grad():
        for _ in range(request.new):
            found.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(found[-1].argmax()))
    return ids[len(request.ids) :], torch.stack(found)


def plans_of(place: Place, plans: list[Plan]) -> list[dict]:
    """All plans one after the other; what an attention rank decoded, what a rank holds."""
    model, found = tiny_step3(), []
    for i, plan in enumerate(plans):
        store = distributed.PrefixStore(f"plan{i}", place.store)
        served = serve(
            model, some_requests(), plan, store=store, keep_logits=True, traced=i == 0,
            release=i == len(plans) - 1,
        )  # fmt: skip
        decoded = served.decoded
        found.append(
            {
                "name": served.name,
                "parameters": served.parameters,
                "events": served.events,
                "tokens": {} if decoded is None else decoded.tokens,
                "logits": {} if decoded is None else decoded.logits,
                "left": sum(p.numel() for p in model.parameters()),
            }
        )
    return found


def paced(place: Place, seconds: float, layers: int) -> dict[int, list[float]]:
    """Seconds per token of each number of micro-batches, with stages of a set length."""
    model = tiny_step3(layers=layers)
    pace = Pace(attention=seconds, ffn=seconds, forth=seconds / 2, back=seconds / 2)
    found = {}
    for b in (1, 3):
        requests = [Request(f"r{i}", (1, 2), 9) for i in range(2 * b)]
        store = distributed.PrefixStore(f"b{b}", place.store)
        plan = Plan(micro_batches=b, rows=2)
        served = serve(model, requests, plan, store=store, pace=pace)
        if served.decoded is not None:
            found[b] = served.decoded.seconds_per_token()
    return found


def until_lost(place: Place, plan: Plan) -> dict:
    """Decode without end, until another rank is lost; what is then known here."""
    model = tiny_step3()
    requests = [Request("short-0", (1, 2), 3), Request("short-1", (3,), 2)]
    requests += [Request(f"long-{i}", (1,), 100_000) for i in range(4)]
    told: dict[str, list[int]] = {}

    def tell(name: str, tokens: list[int]) -> None:
        told[name] = tokens
        place.store.set(f"told/{name}", "yes")

    try:
        serve(model, requests, plan, store=place.store, told=tell)
    except RankLostError as error:
        place.store.set(f"ended/{place.name}", str(time.time()))
        return {"rank": error.rank, "text": str(error), "finished": error.finished, "told": told}
    raise AssertionError("it ended without an error")
