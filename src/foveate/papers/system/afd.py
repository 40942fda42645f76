"""Attention and FFN apart, on two processes: do three micro-batches fill the pipeline?

A small model of Step-3's shape decodes on one attention and one FFN rank. Its stages are stretched
to equal lengths, t_A = t_F = c_AF + c_FA, so that the report's pipeline can be measured on any
machine; the arithmetic runs within them. With b micro-batches a token takes

    TPOT = layers * max(b t_A, b t_F, b c_AF, b c_FA, t_A + t_F + c_AF + c_FA)

so three of them give three times the throughput of one. Judged is the quickest pass: none can be
quicker than its stages, and whatever else the machine does makes some slower. The tokens are
compared with those of the same model in one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foveate.papers.harness import Found, Trial, at_least, at_most, ratio

if TYPE_CHECKING:
    from foveate.models import FoveateForCausalLM

ONE, THREE = "AFD, one micro-batch", "AFD, three micro-batches"
STAGE, LAYERS, ROWS = 0.02, 3, 2  # seconds; layers; sequences of a micro-batch
ARMS = {ONE: 1, THREE: 3}


def formula(micro_batches: int) -> float:
    """TPOT in seconds of these stages."""
    way_round = STAGE + STAGE + STAGE / 2 + STAGE / 2
    return LAYERS * max(micro_batches * STAGE, way_round)


def afd(trial: Trial) -> Found:
    """Decode on two processes with one and with three micro-batches."""
    from foveate.parallel.spawn import run

    tokens = 6 if trial.quick else 24
    trial.tell(0.0, "starting an attention and an FFN process")
    ranks = run(rank_of, ("attention-0", "ffn-0"), (trial.seed, tokens), timeout=300)
    return ranks["attention-0"]


def rank_of(place: object, seed: int, tokens: int) -> Found:
    """What one of the two processes does; figures come from the attention rank."""
    from torch import distributed

    from foveate.parallel.disaggregate import Pace, Plan, serve, serve_alone
    from foveate.parallel.disaggregate.batch import Request
    from foveate.parallel.spawn import Place

    assert isinstance(place, Place)
    model = _model(seed)
    pace = Pace(attention=STAGE, ffn=STAGE, forth=STAGE / 2, back=STAGE / 2)
    found = {}
    for arm, b in ARMS.items():
        plan = Plan(micro_batches=b, rows=ROWS)
        requests = [Request(str(i), (i, 1 + i), tokens) for i in range(ROWS * b)]
        store = distributed.PrefixStore(arm, place.store)
        decoded = serve(model, requests, plan, store=store, pace=pace).decoded
        if decoded is None:
            continue
        quickest = min(decoded.seconds_per_token())
        found[arm] = {
            "seconds a token": quickest,
            "tokens a second": ROWS * b / quickest,
            "of the formula": quickest / formula(b),
            "same tokens": float(decoded.tokens == serve_alone(model, requests, plan).tokens),
        }
    return found


def _model(seed: int) -> FoveateForCausalLM:
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(seed)
    config = FoveateConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
        projection="mfa(head_dim=8, query_rank=16)",
        moe_layers=[1],
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        initializer_range=0.2,
    )
    return FoveateForCausalLM(config).eval()


def _off(found: Found) -> float:
    return max(abs(found[arm]["of the formula"] - 1) for arm in ARMS)


AFD_CHECKS = (
    ratio(THREE, ONE, 1.5, "tokens a second"),
    at_most("seconds a token: largest part off the formula", _off, 0.1),
    at_least(
        "tokens as in one process", lambda at: min(at[arm]["same tokens"] for arm in ARMS), 1.0,
        exact=True,
    ),
)  # fmt: skip
