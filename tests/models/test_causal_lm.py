"""The causal language model: generate, saving, Auto classes and Trainer work on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from foveate import catalog
from foveate.ops.errors import InputError

transformers = pytest.importorskip("transformers")

from foveate.models import FoveateConfig, FoveateForCausalLM, FoveateModel  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GIVEN = {"tpla": "tpla(pd_sep=False)"}
KEYS = [GIVEN.get(row.key, row.key) for row in catalog.rows() if row.kind == "projection"]


def config(**options) -> FoveateConfig:
    given = {
        "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": 0.3,
    }  # fmt: skip
    return FoveateConfig(**(given | options))


def model(**options) -> FoveateForCausalLM:
    torch.manual_seed(0)
    return FoveateForCausalLM(config(**options)).eval()


def prompt(length=9, batch=2):
    return torch.randint(1, 67, (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(lm, ids, new=6):
    """Greedy decoding without a cache."""
    with torch.no_grad():
        for _ in range(new):
            logits = lm(ids, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


# -- generate --------------------------------------------------------------------------------------
@pytest.mark.parametrize("projection", KEYS)
def test_generate_decodes_with_the_projections_cache(projection):
    lm = model(projection=projection)
    out = lm.generate(
        prompt(), max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, greedy(lm, prompt()))
    cache = out.past_key_values
    assert cache.get_seq_length() == 14
    assert cache.bytes() == cache.elements_per_token * 4 * 2 * 14


@pytest.mark.parametrize("attention", ["sink-window(sinks=1, window=6)", "block-sparse"])
def test_generate_with_a_sparse_attention(attention):
    lm = model(attention=[attention, "full"])
    out = lm.generate(prompt(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 13)
    if "window" in attention:
        assert torch.equal(out, greedy(lm, prompt(), 4))


def test_generate_with_left_padding():
    lm, ids = model(projection="mla"), prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    out = lm.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(out[1:, 4:], greedy(lm, ids[1:, 4:], 5))
    assert torch.equal(out[:1], greedy(lm, ids[:1], 5))


def test_beam_search_reorders_the_cache():
    lm = model(projection="mfa-kr")
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = lm.generate(prompt(), **beams)
    assert torch.equal(with_cache, lm.generate(prompt(), use_cache=False, **beams))


def test_sampling_several_continuations():
    lm = model(projection="gqa(kv_heads=2)")
    out = lm.generate(prompt(), do_sample=True, num_return_sequences=2, max_new_tokens=3,
                      pad_token_id=0)  # fmt: skip
    assert out.shape == (4, 12)


def test_a_conversation_goes_on_from_its_cache():
    lm, ids = model(projection="mla"), prompt(12)
    cache = lm.new_cache(capacity=32)
    first = lm.generate(ids[:, :8], past_key_values=cache, max_new_tokens=3, do_sample=False,
                        pad_token_id=0)  # fmt: skip
    more = torch.cat((first, ids[:, 8:]), 1)
    second = lm.generate(more, past_key_values=cache, max_new_tokens=3, do_sample=False,
                         pad_token_id=0)  # fmt: skip
    assert torch.equal(second, greedy(lm, more, 3))


def test_assisted_decoding_crops_the_cache():
    lm, helper = model(projection="mfa"), model(projection="mqa", num_hidden_layers=1)
    helper.lm_head.weight.data += 0.2 * torch.randn_like(helper.lm_head.weight)
    out = lm.generate(prompt(batch=1), assistant_model=helper, max_new_tokens=8, do_sample=False,
                      pad_token_id=0)  # fmt: skip
    assert torch.equal(out, greedy(lm, prompt(batch=1), 8))


# -- forward ---------------------------------------------------------------------------------------
def test_loss_is_next_token_cross_entropy():
    lm, ids = model(), prompt()
    labels = ids.clone()
    labels[0, 3] = -100
    out = lm(ids, labels=labels)
    expected = functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)
    assert out.logits.shape == (2, 9, 67)
    assert isinstance(lm(ids, return_dict=False), tuple)


def test_auxiliary_losses_count_in_training():
    lm, ids = model(projection="moh(shared=1, active=2, beta=0.5)").train(), prompt()
    out = lm(ids, labels=ids)
    plain = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain + out.aux["head_balance_loss"])
    torch.testing.assert_close(lm.eval()(ids, labels=ids).loss, plain)
    lm.train()
    loads = [out.aux[f"layers.{i}.head_load"] for i in range(2)]
    one_by_one = []
    for block in lm.model.layers:
        block.attention.register_forward_hook(
            lambda module, args, kwargs, got: one_by_one.append(got.aux["head_balance_loss"]),
            with_kwargs=True,
        )
    lm(ids)
    torch.testing.assert_close(out.aux["head_balance_loss"], sum(one_by_one) / 2)
    assert all(float(load.sum()) == pytest.approx(2) for load in loads)


def test_packed_sequences_see_only_themselves():
    lm, ids = model(), prompt(10, 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    out = lm(ids, position_ids=positions).logits
    torch.testing.assert_close(out[:, :4], lm(ids[:, :4]).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, 4:], lm(ids[:, 4:]).logits, atol=1e-5, rtol=1e-5)
    masked = lm(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    assert torch.equal(masked, out)


def test_positions_beside_padding():
    lm, ids = model(), prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = lm(ids, attention_mask=mask).logits
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as transformers' generate
    assert torch.equal(lm(ids, attention_mask=mask, position_ids=positions).logits, expected)
    positions[1, 7] = 0
    with pytest.raises(InputError, match="with padding expected 0, 1, 2"):
        lm(ids, attention_mask=mask, position_ids=positions)
    with pytest.raises(InputError, match="with padding expected 0, 1, 2"):
        lm(ids, attention_mask=mask, position_ids=positions[:, :8])
    with pytest.raises(InputError, match="position_ids: expected 0, 1, 2"):
        lm(ids, attention_mask=torch.ones_like(ids), position_ids=positions)


def test_right_padding():
    lm, ids = model(), prompt()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    out = lm(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[1:, :6], lm(ids[1:, :6]).logits, atol=1e-5, rtol=1e-5)


def test_logits_to_keep_hidden_states_and_embeddings():
    lm, ids = model(), prompt()
    out = lm(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(lm(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    kept = lm(ids, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(kept, out.logits[:, [1, 4]])
    embedded = lm(inputs_embeds=lm.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, out.logits)
    torch.testing.assert_close(lm.lm_head(out.hidden_states[-1]), out.logits)


def test_positions_can_be_left_out_or_scaled():
    ids = prompt()
    assert model(position="none").model.layers[0].attention.rope is None
    yarn = model(
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    )  # fmt: skip
    rope = yarn.model.layers[0].attention.rope
    assert rope.scaling != 1
    assert not torch.allclose(yarn(ids).logits, model()(ids).logits)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(2, 3)}, r"expected \(2, 9\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)}, "holes"),
        ({"position_ids": torch.arange(9)[None] + 1}, "position_ids: expected 0, 1, 2"),
        ({"past_key_values": transformers.DynamicCache()}, "model.new_cache"),
    ],
)
def test_what_forward_refuses(call, said):
    ids = {} if not call else {"input_ids": prompt()}
    with pytest.raises(InputError, match=said):
        model()(**ids, **call)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"projection": ["mha"]}, "1 texts for 2 layers"),
        ({"moe_layers": [0]}, "give num_experts"),
        ({"position": "alibi"}, "is unknown"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "isn't supported"),
    ],
)
def test_what_the_config_refuses(options, said):
    with pytest.raises(InputError, match=said):
        FoveateForCausalLM(config(**options))


def test_the_cache_of_another_model_is_no_use():
    with pytest.raises(InputError, match="belongs to a foveate model"):
        model().new_cache().update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(InputError, match="can't be offloaded"):
        model().new_cache().offload(0)
    with pytest.raises(InputError, match="minus the number"):
        model().new_cache().crop(3)
    with pytest.raises(InputError, match="a cache of its own"):
        model().generate(prompt(), cache_implementation="static", max_new_tokens=2)


# -- gradient checkpointing ------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projection", KEYS)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(projection, reentrant):
    experts = {"moe_layers": [1], "num_experts": 4, "moe_intermediate_size": 8,
               "router_balance": 0.5}  # fmt: skip
    lm, ids = model(projection=projection, **experts).train(), prompt(11)
    runs = [0]
    lm.model.layers[0].attention.register_forward_pre_hook(
        lambda *_: runs.__setitem__(0, runs[0] + 1)
    )

    def gradients():
        lm.zero_grad()
        runs[0] = 0
        lm(ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in lm.named_parameters()}

    plain = gradients()
    assert runs == [1]
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    assert runs == [2]
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-5, msg=name)
    with pytest.raises(InputError, match="write to the cache twice"):
        lm(ids, use_cache=True)
    lm.gradient_checkpointing_disable()
    gradients()
    assert runs == [1]


# -- saving, loading, Auto classes -----------------------------------------------------------------
MIXED = {
    "projection": ["mfa-kr(head_dim=16)", "sqa(variant='ssqa', global_tokens=2)", "tpla",
                   "moh(shared=1, active=2)"],
    "attention": ["full", "sink-window(sinks=2, window=5)", "full", "full"],
    "num_hidden_layers": 4, "moe_layers": [1], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 8, "tie_word_embeddings": True,
}  # fmt: skip


def test_saved_and_loaded_again(tmp_path):
    lm = model(**MIXED)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    lm.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    again, told = FoveateForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(again(prompt()).logits, lm(prompt()).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    half = FoveateForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(prompt()).logits.dtype == torch.bfloat16
    inner = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(inner, FoveateModel)


def fresh(code):
    """What the code prints in an interpreter that has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT / "src"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import foveate\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport foveate",
    ],
)
def test_plain_auto_classes_find_it_after_import_foveate(tmp_path, imports):
    lm = model(projection="mla")
    lm.save_pretrained(tmp_path)
    code = (
        f"{imports}\nimport torch\n"
        f"lm = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "out = lm.generate(torch.arange(1, 6)[None], max_new_tokens=4, do_sample=False, "
        "pad_token_id=0)\n"
        "print(type(lm).__name__, out[0].tolist())"
    )
    expected = greedy(lm, torch.arange(1, 6)[None], 4)[0].tolist()
    assert fresh(code) == f"FoveateForCausalLM {expected}"


def test_importing_foveate_imports_no_transformers():
    code = (
        "import sys, foveate\n"
        "assert 'transformers' not in sys.modules\n"
        "import transformers.models.auto.configuration_auto as table, inspect\n"
        "assert 'CONFIG_MAPPING' in inspect.getsource(table)\n"
        "assert type(table.__loader__).__module__ != 'foveate.models.auto'\n"
        "assert 'foveate' in table.CONFIG_MAPPING\n"
        "print(any('foveate' in type(f).__module__ for f in sys.meta_path))"
    )
    assert fresh(code) == "False"


# -- Trainer ---------------------------------------------------------------------------------------
def test_trainer(tmp_path):
    lm = model(projection="moh(shared=1, active=2)", initializer_range=0.02)
    data = [{"input_ids": row, "labels": row} for row in prompt(16, 8)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2,
        report_to=[], save_steps=30, logging_steps=30, use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = transformers.Trainer(lm, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    saved = FoveateForCausalLM.from_pretrained(tmp_path / "checkpoint-30")
    torch.testing.assert_close(saved(prompt()).logits, lm.eval()(prompt()).logits)
