"""Register tokens and the sink options in whole models: cache, generate, padding, saving."""

from __future__ import annotations

import pytest
import torch

from foveate.models import (
    FoveateConfig,
    FoveateEncoder,
    FoveateEncoderConfig,
    FoveateForCausalLM,
)
from foveate.ops.errors import InputError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
OPTIONS = (
    {"registers": 3},
    {"registers": 1, "sink_logits": "learned", "kv_bias": "key-value", "gate": "element"},
    {"attention": "softpick(pattern='sink-window(sinks=1, window=5)')", "registers": 2},
)
EACH = pytest.mark.parametrize("options", OPTIONS, ids=str)


def model(kind=FoveateForCausalLM, config=FoveateConfig, **options):
    torch.manual_seed(5)
    made = kind(config(**SIZES | options)).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    return made


def ids(batch=2, length=17):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(1))


@EACH
def test_steps_equal_the_whole_and_the_cache_counts_the_text(options):
    made, x = model(**options), ids()
    whole = made(x, use_cache=False).logits
    assert whole.shape == (2, 17, 40)
    cache, parts = made.new_cache(), []
    for part in x.split([9, 1, 5, 2], 1):
        parts.append(made(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 17
    assert len(cache.layers[0].held) == 17 + options["registers"]
    cache.crop(-4)
    again = made(x[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole[:, 13:])


def test_registers_are_tokens_in_front():
    """A model without registers that is given their embeddings first, its first outputs dropped."""
    made, plain = model(registers=3), model()
    plain.load_state_dict(made.state_dict(), strict=False)
    x = ids()
    front = made.model.registers.weight.expand(2, -1, -1)
    both = torch.cat((front, plain.model.embed_tokens(x)), 1)
    expected = plain(inputs_embeds=both, output_hidden_states=True)
    got = made(x, output_hidden_states=True)
    torch.testing.assert_close(got.logits, expected.logits[:, 3:])
    for one, two in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, two[:, 3:])
    assert not torch.allclose(got.logits, plain(x).logits)


@EACH
def test_padding_behind_generate_and_saving(options, tmp_path):
    made, x = model(**options), ids()
    real = torch.ones(2, 17, dtype=torch.long)
    real[1, 11:] = 0
    whole = made(x, attention_mask=real, use_cache=False).logits
    torch.testing.assert_close(whole[1, :11], made(x[1:, :11], use_cache=False).logits[0])
    for _ in range(2):
        written = made.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
        expected = x
        for _ in range(4):
            best = made(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, best), 1)
        assert torch.equal(written, expected)
        made.save_pretrained(tmp_path)
        made = FoveateForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()


def test_gradients_reach_every_option():
    made = model(**OPTIONS[1]).train()
    made(ids(), labels=ids()).loss.backward()
    for name, p in made.named_parameters():
        assert p.grad is not None, name
        assert (p.grad != 0).any(), name


def test_an_encoders_registers_stand_for_nothing():
    made = model(FoveateEncoder, FoveateEncoderConfig, registers=4)
    x = ids()
    real = torch.ones(2, 17, dtype=torch.long)
    real[1, 11:] = 0
    got = made(x, attention_mask=real)
    assert got.last_hidden_state.shape == (2, 17, 32)
    alone = made(x[1:, :11])
    torch.testing.assert_close(got.pooler_output[1:], alone.pooler_output)
    torch.testing.assert_close(alone.pooler_output, alone.last_hidden_state.mean(1))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: model(registers=-1), "registers"),
        (
            lambda: model(registers=1)(
                ids(), attention_mask=torch.tensor([[0] + [1] * 16, [1] * 17])
            ),
            "padding_side='right'",
        ),
        (
            lambda: model(registers=1)(
                ids(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False
            ),
            "packed",
        ),
        (
            lambda: model(
                FoveateEncoder, FoveateEncoderConfig, registers=1, recurrent_layers=1,
                position="none",
            ),
            "recurrent",
        ),
    ],
)  # fmt: skip
def test_what_registers_cannot_do_is_refused(run, words):
    with pytest.raises(InputError, match=words):
        run()
