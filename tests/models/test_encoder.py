"""The bidirectional encoder and its classification head."""

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

from foveate.models import (  # noqa: E402
    FoveateEncoder,
    FoveateEncoderConfig,
    FoveateForSequenceClassification,
)

ROOT = Path(__file__).resolve().parents[2]
GIVEN = {"tpla": "tpla(pd_sep=False)"}
KEYS = [GIVEN.get(row.key, row.key) for row in catalog.rows() if row.kind == "projection"]


def config(**options) -> FoveateEncoderConfig:
    given = {
        "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": 0.3, "num_labels": 5,
    }  # fmt: skip
    return FoveateEncoderConfig(**(given | options))


def encoder(**options) -> FoveateEncoder:
    torch.manual_seed(0)
    return FoveateEncoder(config(**options)).eval()


def classifier(**options) -> FoveateForSequenceClassification:
    torch.manual_seed(0)
    return FoveateForSequenceClassification(config(**options)).eval()


def text(length=9, batch=2):
    return torch.randint(1, 67, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(side):
    """Nine tokens and six, those padded on one side."""
    ids, mask = text(), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    if side == "right":
        mask = mask.flip(1)
    return ids, mask, mask[1].bool()


@torch.no_grad()
def by_hand(model, ids):
    """The encoder in torch's own words: dense attention without a mask, for MHA and RoPE."""
    x = model.embed_tokens(ids)
    for block in model.layers:
        h, p = block.attention_norm(x), block.attention.projection
        q, k, v = p.query(h), *p.expand(p.entries(h))
        at = torch.arange(ids.shape[1])
        angle = at[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

        def turn(t, cos=cos, sin=sin):
            one, two = t.chunk(2, -1)
            return t * cos + torch.cat((-two, one), -1) * sin

        o = functional.scaled_dot_product_attention(turn(q), turn(k), v)
        x = x + p.output(o, h)
        x = x + block.feedforward(block.feedforward_norm(x))
    return model.norm(x)


def test_every_token_sees_every_token():
    model = encoder()
    torch.testing.assert_close(
        model(text()).last_hidden_state, by_hand(model, text()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("projection", KEYS)
def test_padding_changes_nothing(projection, pooling, side):
    model = classifier(projection=projection, pooling=pooling)
    ids, mask, real = padded(side)
    logits = model(ids, mask).logits
    for row, alone in ((0, ids[:1]), (1, ids[1:, real])):
        torch.testing.assert_close(logits[row], model(alone).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sink-window(sinks=1, window=4)", "block-sparse"])
def test_padding_under_a_sparse_attention(attention):
    model = classifier(attention=[attention, "full"])
    ids, mask, real = padded("left")
    torch.testing.assert_close(
        model(ids, mask).logits[1], model(ids[1:, real]).logits[0], atol=1e-5, rtol=1e-5
    )


def test_pooling_by_hand():
    ids, mask, real = padded("left")
    out = encoder()(ids, mask)
    torch.testing.assert_close(out.pooler_output[1], out.last_hidden_state[1, real].mean(0))
    torch.testing.assert_close(out.pooler_output[0], out.last_hidden_state[0].mean(0))
    out = encoder(pooling="cls")(ids, mask)
    assert torch.equal(out.pooler_output[1], out.last_hidden_state[1, 3])
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, 0])


def test_packed_sequences_see_only_themselves():
    model, ids = encoder(), text(10, 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    out = model(ids, position_ids=positions).last_hidden_state
    for part in (slice(0, 4), slice(4, 10)):
        torch.testing.assert_close(
            out[:, part], model(ids[:, part]).last_hidden_state, atol=1e-5, rtol=1e-5
        )


def test_losses_are_transformers_own():
    ids = text()
    one = torch.tensor([3, 0])
    out = classifier()(ids, labels=one)
    torch.testing.assert_close(out.loss, functional.cross_entropy(out.logits, one))
    several = torch.tensor([[0.0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    out = classifier()(ids, labels=several)
    torch.testing.assert_close(
        out.loss, functional.binary_cross_entropy_with_logits(out.logits, several)
    )
    number = torch.tensor([0.5, -1.0])
    out = classifier(num_labels=1)(ids, labels=number)
    torch.testing.assert_close(out.loss, functional.mse_loss(out.logits[:, 0], number))


def test_auxiliary_losses_count_in_training():
    model, labels = classifier(projection="moh(shared=1, active=2, beta=0.5)"), torch.tensor([3, 0])
    out = model.train()(text(), labels=labels)
    plain = functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, plain + out.aux["head_balance_loss"])
    torch.testing.assert_close(model.eval()(text(), labels=labels).loss, plain)


def test_dropout_before_the_head_in_training_only():
    model = classifier(classifier_dropout=0.5)
    assert torch.equal(model(text()).logits, model(text()).logits)
    model.train()
    assert not torch.equal(model(text()).logits, model(text()).logits)


def test_hidden_states_embeddings_and_tuples():
    model, ids = encoder(), text()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    torch.testing.assert_close(embedded, out.last_hidden_state)
    assert isinstance(model(ids, return_dict=False), tuple)
    assert classifier()(ids, return_dict=False)[0].shape == (2, 5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, labels = classifier(projection="moh(shared=1, active=2)").train(), torch.tensor([3, 0])
    ids, mask, _ = padded("left")

    def gradients():
        model.zero_grad()
        model(ids, mask, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(2, 3)}, r"expected \(2, 9\)"),
        ({"attention_mask": torch.tensor([[1] * 9, [0] * 9])}, "no real token"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)}, "holes"),
        ({"position_ids": torch.arange(9)[None] + 1}, "position_ids: expected 0, 1, 2"),
    ],
)
def test_what_forward_refuses(call, said):
    ids = {} if not call else {"input_ids": text()}
    with pytest.raises(InputError, match=said):
        classifier()(**ids, **call)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "meen"}, "pooling='meen'. is unknown; did you mean 'mean'"),
        ({"classifier_dropout": 1.0}, "classifier_dropout"),
        ({"projection": ["mha"]}, "1 texts for 2 layers"),
    ],
)
def test_what_the_config_refuses(options, said):
    with pytest.raises(InputError, match=said):
        config(**options)


def test_saved_and_loaded_again(tmp_path):
    model = classifier(
        projection=["mfa(head_dim=16)", "gqa(kv_heads=2)"],
        attention=["full", "sink-window(sinks=2, window=5)"],
        pooling="cls",
        id2label={i: f"kind {i}" for i in range(5)},
        label2id={f"kind {i}": i for i in range(5)},
    )
    model.save_pretrained(tmp_path)
    again, told = FoveateForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert again.config.pooling == "cls"
    assert again.config.id2label[3] == "kind 3"
    assert torch.equal(again(text()).logits, model(text()).logits)
    inner = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(inner, FoveateEncoder)
    assert torch.equal(inner(text()).pooler_output, model.encoder(text()).pooler_output)
    half = FoveateForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(text()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["foveate", "transformers"])
def test_plain_auto_classes_find_it_after_import_foveate(tmp_path, first):
    model = classifier(attention="block-sparse")
    model.save_pretrained(tmp_path)
    imports = ["import foveate", "from transformers import AutoModelForSequenceClassification"]
    code = "\n".join([
        *(imports if first == "foveate" else reversed(imports)), "import torch",
        f"model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})",
        "out = model(torch.arange(1, 6)[None]).logits[0].tolist()",
        "print(type(model).__name__, *(f'{value:.4f}' for value in out))",
    ])  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT / "src"
    )
    assert done.returncode == 0, done.stderr
    name, *values = done.stdout.split()
    assert name == "FoveateForSequenceClassification"
    expected = model(torch.arange(1, 6)[None]).logits[0]
    torch.testing.assert_close(
        torch.tensor([float(v) for v in values]), expected, atol=2e-4, rtol=0
    )


def test_trainer(tmp_path):
    model = classifier(initializer_range=0.02)
    rows = text(16, 8)
    data = [{"input_ids": row, "labels": row[0] % 5} for row in rows]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2,
        report_to=[], save_strategy="no", logging_steps=30, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_a_tree_reaches_every_layer():
    from foveate.parts.tree import Tree

    model, ids = classifier(attention="hsa(branch=3)"), text()
    tree = Tree.windows(9, 3)
    windows, given = model(ids).logits, model(ids, tree=tree).logits
    torch.testing.assert_close(windows, given)
    other = model(ids, tree=Tree.nested([[0, 8], [1, 7], [2, 3, 4, 5, 6]])).logits
    assert float((other - given).detach().abs().max()) > 1e-4
    flat = model(ids, tree=Tree.nested(list(range(9)))).logits
    torch.testing.assert_close(flat, classifier()(ids).logits)


def test_hierarchical_attention_learns_in_the_encoder():
    model = classifier(attention="hsa(branch=3)").train()
    ids, mask, _ = padded("right")
    model(ids, attention_mask=mask, labels=torch.tensor([1, 3])).loss.backward()
    for layer in model.encoder.layers:
        for parameter in layer.attention.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()
