"""TPLA on two processes: what each keeps and moves, beside plain MLA with its heads split.

One layer of DeepSeek-V3's latent (512 columns and 64 rotary ones) under a narrow model. Both are
prefilled and then decode token by token on two ranks; their caches are measured, the numbers that
they sum are counted, and the logits are compared with those of one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foveate.papers.harness import Found, Trial, at_most, ratio

if TYPE_CHECKING:
    from foveate.models import FoveateForCausalLM

MLA2, TPLA2 = "MLA on 2 ranks", "TPLA on 2 ranks"
PROMPT, STEPS = 24, 8


def latents(trial: Trial) -> Found:
    """Run both on two processes."""
    from foveate.parallel.spawn import run

    trial.tell(0.0, "starting two processes")
    return run(rank_of, ("rank-0", "rank-1"), (trial.seed,), timeout=300)["rank-1"]


@torch.no_grad()
def rank_of(place: object, seed: int) -> Found:
    """What one of the two processes finds."""
    from foveate.models import FoveateConfig, FoveateForCausalLM, to_tpla
    from foveate.parallel.latent import latent_part

    torch.manual_seed(seed)
    config = FoveateConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        projection="mla(latent=512, rope_dim=64, head_dim=32)",
        initializer_range=0.1,
    )
    mla = FoveateForCausalLM(config).double().eval()
    ids = torch.randint(0, 64, (1, PROMPT + STEPS))
    whole = {MLA2: mla, TPLA2: to_tpla(mla, calibration=ids)}
    return {arm: _found(latent_part(model), model, ids) for arm, model in whole.items()}


def _found(part: FoveateForCausalLM, model: FoveateForCausalLM, ids: torch.Tensor) -> dict:
    from foveate.parallel.latent import traffic

    mine, cache, before = _logits(part, ids)
    alone, _, _ = _logits(model, ids)
    return {
        "cached bytes": float(cache),
        "numbers summed for a token": float((traffic(part).summed - before) / STEPS),
        "largest difference from one process": float((mine - alone).abs().max()),
    }


def _logits(model: FoveateForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Logits of a prompt and of tokens one by one; bytes cached; numbers summed by the prompt."""
    from foveate.parallel.latent import traffic

    cache = model.new_cache()
    parts = [model(ids[:, :PROMPT], past_key_values=cache).logits]
    before = traffic(model).summed
    for at in range(PROMPT, PROMPT + STEPS):
        parts.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(parts, 1), cache.bytes(), before


LATENT_CHECKS = (
    ratio(MLA2, TPLA2, 1.8, "cached bytes", exact=True),
    ratio(MLA2, TPLA2, 1.0, "numbers summed for a token", exact=True),
    at_most(
        "largest difference from one process",
        lambda at: max(at[arm]["largest difference from one process"] for arm in (MLA2, TPLA2)),
        1e-10,
        exact=True,
    ),
)
