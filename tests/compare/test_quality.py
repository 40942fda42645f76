"""Quality against a brute-force computation in float64 over the model's own logits."""

import math

import pytest
import torch

from foveate.compare import quality
from foveate.compare.measure import Machine, cache_bytes
from foveate.methods import make
from foveate.ops.errors import InputError


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def test_every_sum_equals_brute_force(model, monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 37)
    ids = torch.randint(0, 256, (2, 150))
    scored = torch.rand(2, 150) < 0.7
    machine = Machine(model, "causal-lm")
    dense = machine.run(ids, None, inspect=True)
    other = machine.run(ids, make("sink-window(window=20)"), inspect=True)
    got = quality.score(model, dense.hidden, other.hidden, ids, scored)

    with torch.no_grad():
        p = model.lm_head(dense.hidden).double().log_softmax(-1)[:, :-1]
        q = model.lm_head(other.hidden).double().log_softmax(-1)[:, :-1]
    mask, targets = scored[:, 1:], ids[:, 1:, None]
    nll_p, nll_q = (-x.gather(2, targets)[..., 0][mask] for x in (p, q))
    assert got["tokens"] == int(mask.sum())
    assert got["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1)[mask].sum()), rel=1e-4)
    assert got["agree"] == int((p.argmax(-1) == q.argmax(-1))[mask].sum())
    assert got["nll_dense"] == pytest.approx(float(nll_p.sum()), rel=1e-5)
    assert got["nll"] == pytest.approx(float(nll_q.sum()), rel=1e-5)
    assert got["nll_difference_squared"] == pytest.approx(
        float(((nll_q - nll_p) ** 2).sum()), rel=1e-4
    )
    assert got["kl"] > 1


def test_dense_against_itself_loses_nothing(model):
    ids = torch.randint(0, 256, (1, 80))
    done = Machine(model, "causal-lm").run(ids, None, inspect=False)
    got = quality.score(model, done.hidden, done.hidden, ids, torch.ones(1, 80, dtype=torch.bool))
    assert got["tokens"] == got["agree"] == 79
    assert abs(got["kl"]) < 1e-4
    assert got["max_difference"] == got["nll_difference_squared"] == 0
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert got["nll"] / got["tokens"] == pytest.approx(loss, rel=1e-5)


def test_heads_that_scale_or_cap_their_logits(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    makers = (
        lambda: Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=3.0)),
        lambda: GraniteForCausalLM(GraniteConfig(**small, logits_scaling=4.0)),
    )
    ids = torch.randint(0, 64, (1, 20))
    for make_model in makers:
        other = make_model().eval()
        done = Machine(other, "causal-lm").run(ids, None, inspect=False)
        quality.check_head(other, done.hidden, done.logits)
        with torch.no_grad():
            got, want = quality.logits_of(other, done.hidden), other(ids).logits
        torch.testing.assert_close(got, want)


def test_the_baseline_is_eager_where_there_is_no_sdpa():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, attn_logit_softcapping=2.0, sliding_window=8,
        initializer_range=0.4,
    )  # fmt: skip
    other = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 30))
    done = Machine(other, "causal-lm").run(ids, None, inspect=True)
    with torch.no_grad():
        want = other(ids, logits_to_keep=1).logits
    torch.testing.assert_close(done.logits, want[:, -1], rtol=0, atol=0)
    assert done.attention_seconds > 0
    ours = Machine(other, "causal-lm").run(ids, make("full"), inspect=True)
    torch.testing.assert_close(ours.logits, want[:, -1], rtol=0, atol=1e-4)


def test_an_unknown_head_is_refused(model):
    done = Machine(model, "causal-lm").run(torch.randint(0, 256, (1, 20)), None, inspect=False)
    with pytest.raises(InputError, match="isn't known here"):
        quality.check_head(model, done.hidden, done.logits * 1.5)


def test_states_of_an_encoder_by_hand():
    p = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    q = torch.tensor([[[1.0, 0.0], [2.0, 2.0]]])
    got = quality.compare_states(p, q)
    assert got["tokens"] == 2
    assert got["cosine"] == pytest.approx(1 + math.sqrt(0.5))
    assert got["worst_cosine"] == pytest.approx(math.sqrt(0.5))
    assert got["error_squared"] == pytest.approx(4)
    assert got["norm_squared"] == pytest.approx(5)


def test_the_baseline_is_transformers_own_and_nothing_stays_registered(model):
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    before = (sorted(AttentionInterface().keys()), sorted(AttentionMaskInterface().keys()))
    ids = torch.randint(0, 256, (2, 60))
    done = Machine(model, "causal-lm").run(ids, None, inspect=True)
    assert (sorted(AttentionInterface().keys()), sorted(AttentionMaskInterface().keys())) == before
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        want = model(ids, logits_to_keep=1)
    assert torch.equal(done.logits, want.logits[:, -1])
    assert 0 < done.attention_seconds < done.seconds
    # keys and values, 2 layers, batch 2, 2 heads, 60 tokens of 16 fp32 numbers
    assert cache_bytes(done.cache) == 2 * 2 * 2 * 2 * 60 * 16 * 4


def test_decoding_in_turn_gives_what_generate_gives(model):
    ids = torch.randint(0, 256, (1, 40))
    machine = Machine(model, "causal-lm")
    method = make("sink-window(sinks=2, window=8)")
    done = machine.run(ids, method, inspect=True)
    first = done.logits.argmax(-1)
    made = [first]
    for _ in range(3):
        some, seconds = machine.decode(method, made[-1], done.cache, 4)
        assert len(seconds) == 4
        made += some.unbind(1)
    import foveate

    with foveate.use(model, method):
        want = model.generate(ids, max_new_tokens=13, do_sample=False, eos_token_id=None)
    assert torch.cat(made).tolist() == want[0, 40:].tolist()
