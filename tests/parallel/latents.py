"""A small model with latent attention, and what each rank of a group makes of it."""

from __future__ import annotations

import torch
from torch import distributed

from foveate.methods.tpla import TPLA
from foveate.models import FoveateConfig, FoveateForCausalLM, to_tpla
from foveate.parallel.latent import LatentPart, latent_part, traffic
from foveate.parallel.spawn import Place

R, ROPE, DIM, LAYERS, HEADS = 32, 4, 48, 2, 8
PROMPT, CHUNK, STEPS = 9, 3, 4
# name -> (form, groups, transform, prefill-decode separation)
CASES = {
    "mla": ("mla", 1, "identity", True),
    "pca": ("all", 2, "pca", True),
    "hadamard": ("all", 2, "hadamard", True),
    "identity": ("all", 2, "identity", True),
    "together": ("all", 2, "pca", False),
    "gla": ("blocks", 2, "identity", True),
    "four": ("all", 4, "hadamard", True),
    "halves": ("all", 2, "identity", False),
}


def mla_model() -> FoveateForCausalLM:
    torch.manual_seed(0)
    projection = f"mla(latent={R}, rope_dim={ROPE}, head_dim=6)"
    config = FoveateConfig(vocab_size=50, hidden_size=DIM, num_hidden_layers=LAYERS,
                           num_attention_heads=HEADS, projection=projection,
                           initializer_range=0.3)  # fmt: skip
    model = FoveateForCausalLM(config).double().eval()
    for block in model.model.blocks:
        block.attention.projection.kv_norm.weight.data.uniform_(0.5, 2.0)
    return model


def equal_halves(model: FoveateForCausalLM) -> FoveateForCausalLM:
    """c = (z, z), and equal halves of W_UK and W_UV: oracle 4 (a)."""
    for block in model.model.blocks:
        p = block.attention.projection
        with torch.no_grad():
            p.kv_norm.weight.fill_(1.0)
            p.kv_down.weight[R // 2 : R] = p.kv_down.weight[: R // 2]
            p.kv_up.weight[:, R // 2 :] = p.kv_up.weight[:, : R // 2]
    return model


def model_of(case: str) -> FoveateForCausalLM:
    """The whole model of a case, in one process."""
    form, groups, transform, apart = CASES[case]
    model = mla_model()
    if form == "mla":
        return model
    if case == "halves":
        model = equal_halves(model)
    recipe = TPLA(groups=groups, heads=form, pd_sep=apart)
    text = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    return to_tpla(model, recipe, transform, text, generator=draw)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """ids (2, n), and which are real: the second row has padding in front."""
    n = PROMPT + CHUNK + STEPS
    ids = torch.randint(0, 50, (2, n), generator=torch.Generator().manual_seed(3))
    real = torch.ones(2, n, dtype=torch.long)
    real[1, :2] = 0
    return ids, real


@torch.no_grad()
def through(model: FoveateForCausalLM) -> dict:
    """A prompt in two chunks, then token by token: logits, cached bytes, numbers moved a token."""
    ids, real = tokens()
    cache, parts, at = model.new_cache(), [], 0
    for new in (PROMPT, CHUNK, *([1] * STEPS)):
        if at == PROMPT + CHUNK:
            for module in model.modules():
                if isinstance(module, LatentPart):
                    module.traffic.reset()
        given = real[:, : at + new]
        out = model(ids[:, at : at + new], attention_mask=given, past_key_values=cache)
        parts.append(out.logits)
        at += new
    moved = traffic(model)
    return {
        "logits": torch.cat(parts, 1),
        "bytes": cache.bytes(),
        "summed": moved.summed / (2 * STEPS * LAYERS),
        "gathered": moved.gathered,
    }


def sizes_of(case: str) -> tuple[int, ...]:
    """The group sizes that a case is run on."""
    if case == "four":
        return (4,)
    return (2,) if case in ("hadamard", "identity", "together") else (2, 4)


def on_ranks(place: Place) -> dict[tuple[str, int], dict]:
    """Every case on its groups."""
    pair = distributed.new_group([0, 1])
    found = {}
    for case in CASES:
        model = model_of(case)
        for size in sizes_of(case):
            if place.rank < size:
                found[case, size] = through(latent_part(model, pair if size == 2 else None))
    return found
