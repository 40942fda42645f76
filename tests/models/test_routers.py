"""Routers of the catalog in whole models: decoding, padding, gradients, saving, refusals."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate import catalog
from foveate.ops.errors import InputError

pytest.importorskip("transformers")
from foveate.models import (  # noqa: E402
    FoveateConfig,
    FoveateEncoderConfig,
    FoveateForCausalLM,
    FoveateForSequenceClassification,
)

ROUTERS = [row.key for row in catalog.rows() if row.kind == "router"]
ROUTERS += ["attention-smoe(heads='learned')", "attention-smoe(heads='posterior')"]
SHARING = [key for key in ROUTERS if key.startswith(("similarity", "attention"))]
SIZES = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "moe_layers": [0, 1], "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "router_renormalize": True, "router_balance": 0.01, "router_balance_per_slot": True,
}  # fmt: skip


def model_of(router="top-k", **more):
    torch.manual_seed(0)
    given = SIZES | {"projection": "gqa(kv_heads=2)", "router": router} | more
    return FoveateForCausalLM(FoveateConfig(**given)).eval().double()


def ids_of(length=15):
    return torch.randint(1, 40, (2, length))


@pytest.mark.parametrize("router", ROUTERS)
def test_steps_equal_the_whole_sequence_after_chunks_beams_and_cuts(router):
    model, ids = model_of(router), ids_of()
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache()
        parts = [model(ids[:, :6], past_key_values=cache).logits]
        parts.append(model(ids[:, 6:10], past_key_values=cache).logits)  # a chunk
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(10, 15)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)
        assert len(cache.layers[0].held) == 15
        assert cache.bytes() == 2 * 15 * 8 * cache.elements_per_token
        cache.crop(-5)  # taken back, and on with the other row
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(ids.flip(0)[:, 10:], past_key_values=cache).logits
        torch.testing.assert_close(swapped, whole.flip(0)[:, 10:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("router", SHARING)
@pytest.mark.parametrize("projection", ["sqa", "mla(latent=16, rope_dim=4)", "mfa-kr(head_dim=8)"])
def test_any_projection_with_plain_heads_decodes_alike(router, projection):
    model, ids = model_of(router, projection=projection), ids_of(9)
    with torch.no_grad():
        cache, whole = model.new_cache(), model(ids).logits
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("router", SHARING)
def test_padding_changes_nothing_on_either_side(router):
    model, ids = model_of(router), ids_of(9)
    with torch.no_grad():
        wanted = model(ids).logits
        for front in (True, False):
            more = torch.zeros(2, 4, dtype=torch.int64)
            padded = torch.cat((more, ids) if front else (ids, more), 1)
            found = model(padded, attention_mask=(padded > 0).long()).logits
            own = found[:, 4:] if front else found[:, :9]
            torch.testing.assert_close(own, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("router", SHARING)
def test_packed_sequences_do_not_share(router):
    model, ids = model_of(router), ids_of(12)[:1]
    at = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(ids, position_ids=at, use_cache=False).logits
        for part in (slice(0, 5), slice(5, 12)):
            alone = model(ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("router", SHARING)
def test_outputs_and_choices_do_not_see_later_tokens(router):
    model, ids = model_of(router), ids_of()
    other = ids.clone()
    other[:, 10] = (ids[:, 10] + 5) % 40
    seen = []
    for block in model.model.layers:
        block.feedforward.router.register_forward_hook(
            lambda _, __, routed: seen.append(routed.chosen)
        )
    with torch.no_grad():
        one, two = model(ids).logits, model(other).logits
    torch.testing.assert_close(one[:, :10], two[:, :10], atol=1e-12, rtol=0)
    for before, after in zip(seen[:2], seen[2:]):
        assert torch.equal(before[:, :10], after[:, :10])


@pytest.mark.parametrize("router", ROUTERS)
def test_everything_is_trained_and_checkpoints_of_activations_change_nothing(router):
    model, ids = model_of(router).train(), ids_of()
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        assert "expert_balance_loss" in out.aux
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], grad, msg=name)


@pytest.mark.parametrize("router", ["similarity-smoe", "attention-smoe"])
def test_bf16(router):
    model, ids = model_of(router), ids_of()
    with torch.no_grad():
        wanted = model.float()(ids).logits
        out = model.bfloat16()(ids)
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.logits.dtype == torch.bfloat16
    assert generated.shape == (2, 18)
    agreed = torch.nn.functional.cosine_similarity(out.logits.float(), wanted, dim=-1)
    assert agreed.median() > 0.98


def test_a_model_is_saved_with_its_router(tmp_path):
    model, ids = model_of(["similarity-smoe(tau=3.0)", "smoe-dropout"]), ids_of()
    model.model.layers[1].feedforward.router.scores.advance(0.5)
    model.save_pretrained(tmp_path)
    held = FoveateForCausalLM.from_pretrained(tmp_path).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(held(ids).logits, model(ids).logits)


@pytest.mark.parametrize("router", SHARING)
def test_an_encoder_shares_over_all_real_tokens(router):
    torch.manual_seed(0)
    config = FoveateEncoderConfig(**SIZES, router=router, num_labels=3)
    model = FoveateForSequenceClassification(config).eval().double()
    ids = ids_of(9)
    padded = torch.cat((ids, torch.zeros(2, 3, dtype=torch.int64)), 1)
    with torch.no_grad():
        wanted = model(ids).logits
        found = model(padded, attention_mask=(padded > 0).long()).logits
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    model.train()(ids, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_similarity_stands_behind_a_mixer_and_attention_weights_do_not():
    sizes = {"mixer": "grassmann", "router": "similarity-smoe"}
    model, ids = model_of(**sizes), ids_of(9)
    with torch.no_grad():
        cache, whole = model.new_cache(), model(ids).logits
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)
    with pytest.raises(InputError, match="mixer"):
        model_of("attention-smoe", mixer="grassmann")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"projection": "moh(shared=1, active=2)"}, "chooses heads"),
        ({"projection": "sqa(variant='lsqa', global_tokens=2)"}, "merges"),
        ({"projection": "tpla(latent=16, rope_dim=4)"}, "merges"),
        ({"attention": "lucid"}, "use a pattern"),
        ({"router": "full"}, "no router"),
        ({"router": ["top-k"]}, "1 texts for 2 layers"),
    ],
)
def test_what_has_no_weights_is_refused_by_name(more, said):
    with pytest.raises(InputError, match=said):
        model_of(**({"router": "attention-smoe"} | more))


def test_a_cache_of_another_kind_is_refused():
    model, plain = model_of("attention-smoe"), model_of()
    with pytest.raises(InputError, match="new_cache"):
        model(ids_of(), past_key_values=plain.new_cache())


@pytest.mark.parametrize("router", ROUTERS)
def test_under_autocast_routing_stays_in_fp32(router):
    model, ids = model_of(router).float(), ids_of()
    wanted = model(ids, use_cache=False).logits
    found = []
    for block in model.model.layers:
        block.feedforward.router.register_forward_hook(lambda _, __, routed: found.append(routed))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, use_cache=False)
        model.train()(ids).aux["expert_balance_loss"].backward()
    assert all(routed.probs.dtype == torch.float32 for routed in found)
    for routed in found:
        total = routed.probs.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))  # no rounding of bf16
    agreed = torch.nn.functional.cosine_similarity(out.logits.float(), wanted, dim=-1)
    assert agreed.median() > 0.99


@pytest.mark.parametrize("router", SHARING)
def test_beams_of_a_padded_batch_are_those_of_each_prompt_alone(router):
    model, ids = model_of(router), ids_of(6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids[:1, :3]), 1)
    both = torch.cat((padded, ids[1:]))
    given = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    found = model.generate(both, attention_mask=(both > 0).long(), **given)
    for row, prompt in zip(found, (ids[:1, :3], ids[1:])):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)
        assert row[-4:].tolist() == alone[0, -4:].tolist()


class Largest(TorchDispatchMode):
    """The most numbers that any op gave back."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


@pytest.mark.parametrize("router", ["similarity-smoe", "attention-smoe"])
def test_no_matrix_of_all_pairs_is_held(router):
    model = model_of(router, num_hidden_layers=1, moe_layers=[0]).float().train()
    ids, length = torch.randint(1, 40, (1, 700)), 700
    with Largest() as seen:
        model(ids, labels=ids).loss.backward()
    assert seen.numbers < length * length / 4


def test_what_a_block_kept_of_its_attention_goes_with_it():
    model = model_of("attention-smoe").train()
    kept = []
    attention = model.model.layers[0].attention.attention
    object.__setattr__(
        attention, "is_dense", lambda q, *a: kept.append(weakref.ref(q)) or whole(q, *a)
    )
    whole = type(attention).is_dense.__get__(attention)
    gc.disable()
    try:
        with torch.no_grad():
            model(ids_of())
        assert kept
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_ranks_that_hold_some_of_the_tokens_or_experts_refuse_it():
    from foveate.parallel.context import ContextParallel, run_local, use
    from foveate.parallel.disaggregate.experts import check_feedforward

    model = model_of("similarity-smoe", router_balance=0.0)

    def rank(links):
        with pytest.raises(InputError, match="'top-k'"):
            use(model, ContextParallel(links, "ring", "zigzag"))

    run_local(1, rank)
    for router in ("attention-smoe", "xmoe"):
        layer = model_of(router).model.layers[0].feedforward
        with pytest.raises(InputError, match="layer 3's router"):
            check_feedforward(layer, 3)


def test_a_router_is_no_attention_to_use_on_a_trained_model():
    from foveate.methods import make_attention

    with pytest.raises(InputError, match="router"):
        make_attention("similarity-smoe")
