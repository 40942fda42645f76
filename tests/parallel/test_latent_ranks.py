"""Latent attention over ranks: what one process gives, in a part of the cache."""

from __future__ import annotations

import latents
import pytest
import torch
from latents import CASES, CHUNK, DIM, LAYERS, PROMPT, ROPE, STEPS, R

from foveate.models import FoveateConfig, FoveateForCausalLM
from foveate.ops.errors import InputError
from foveate.parallel.latent import LatentPart, latent_part
from foveate.parallel.spawn import run

EXACT = {"atol": 1e-12, "rtol": 0}
TOKENS = 2 * (PROMPT + CHUNK + STEPS)


@pytest.fixture(scope="module")
def ranks():
    return run(latents.on_ranks, [f"rank-{i}" for i in range(4)], timeout=100)


@pytest.fixture(scope="module")
def alone():
    return {case: latents.through(latents.model_of(case)) for case in CASES}


def _of(ranks, case, size):
    return [ranks[f"rank-{i}"][case, size] for i in range(size)]


@pytest.mark.parametrize("case", CASES)
def test_oracle_9_ranks_give_what_one_process_gives(ranks, alone, case):
    for size in latents.sizes_of(case):
        for found in _of(ranks, case, size):
            torch.testing.assert_close(found["logits"], alone[case]["logits"], **EXACT)


def test_generate_with_beams_works_on_ranks(ranks):
    wanted = latents.generated(latents.model_of("pca"))
    for size in (2, 4):
        assert all(found["generated"] == wanted for found in _of(ranks, "pca", size))


def test_plain_mla_on_ranks_is_exact_and_keeps_the_whole_latent(ranks, alone):
    for size in (2, 4):
        for found in _of(ranks, "mla", size):
            assert found["bytes"] == alone["mla"]["bytes"] == TOKENS * LAYERS * 8 * (R + ROPE)


def test_cached_bytes_of_the_latent_halve_and_quarter(ranks):
    for case, size, groups in (
        ("pca", 2, 2), ("pca", 4, 2), ("four", 4, 4), ("four", 2, 4), ("gla", 2, 2),
    ):  # fmt: skip
        slices = max(1, groups // size)  # of a rank
        for found in _of(ranks, case, size):
            assert found["bytes"] == TOKENS * LAYERS * 8 * slices * (R // groups + ROPE)


def test_oracle_5_prefill_on_ranks_is_mla_exactly(ranks, alone):
    prompt, steps = slice(0, PROMPT + CHUNK), slice(PROMPT + CHUNK, None)
    for case in ("pca", "hadamard", "identity", "gla", "four"):
        for found in _of(ranks, case, latents.sizes_of(case)[-1]):
            real = latents.tokens()[1].bool()
            theirs, mine = alone["mla"]["logits"], found["logits"]
            at = real[:, prompt]
            torch.testing.assert_close(mine[:, prompt][at], theirs[:, prompt][at], **EXACT)
            assert (mine[:, steps] - theirs[:, steps]).abs().max() > 1e-4


def test_oracle_4a_equal_halves_on_ranks_are_mla_exactly(ranks):
    mla = latents.through(latents.equal_halves(latents.mla_model()))
    for size in (2, 4):
        for found in _of(ranks, "halves", size):
            torch.testing.assert_close(found["logits"], mla["logits"], **EXACT)


def test_a_decoded_token_costs_one_sum_of_the_width_and_no_gather(ranks):
    for case in CASES:
        for found in _of(ranks, case, latents.sizes_of(case)[-1]):
            assert found["summed"] == DIM + ("norm" in case)
            assert found["gathered"] == 0


def one_rank(place):
    """Refusals and a group of one, where nothing is split."""
    model = latents.model_of("pca")
    refused = {}
    plain = FoveateForCausalLM(FoveateConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1,
                                             num_attention_heads=2))  # fmt: skip
    for name, wrong in (
        ("model", lambda: latent_part(plain)),
        ("layer", lambda: LatentPart(plain.model.blocks[0].attention)),
        ("gradient", lambda: latent_part(model)(latents.tokens()[0])),
        ("softmax", lambda: latent_part(latents.exact_softmax())),
    ):
        try:
            wrong()
        except InputError as error:
            refused[name] = str(error)
    return latents.through(latent_part(model))["logits"], refused


def test_a_group_of_one_changes_nothing_and_other_layers_are_refused(alone):
    logits, refused = run(one_rank, ["only"], timeout=60)["only"]
    torch.testing.assert_close(logits, alone["pca"]["logits"], **EXACT)
    assert "no layer of this model has a latent" in refused["model"]
    assert "expected 'mla'" in refused["layer"]
    assert "torch.no_grad()" in refused["gradient"]
    assert "local norm and softmax" in refused["softmax"]
