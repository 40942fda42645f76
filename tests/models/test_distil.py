"""Distilling SEA from a dense causal language model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from foveate.methods.sea.losses import Teacher, layer_losses
from foveate.models import FoveateConfig, FoveateForCausalLM
from foveate.models.distil import (
    CAUSAL,
    ENCODER,
    distil,
    distillation,
    new_parameters,
    student_of,
)
from foveate.ops.errors import InputError

SPEC = "sea(k=6, width=16, divisor=1.0, max_length=64)"


def teacher(**more):
    torch.manual_seed(3)
    config = FoveateConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **more
    )
    model = FoveateForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
    return model.eval()


def test_a_student_starts_from_the_teachers_weights():
    dense = teacher(projection="gqa(kv_heads=1)")
    student = student_of(dense, SPEC)
    held = dense.state_dict()
    for name, value in student.state_dict().items():
        assert ".attention.attention." in name or torch.equal(value, held[name])
    new = sum(p.numel() for p in new_parameters(student))
    assert new == sum(p.numel() for p in student.parameters()) - sum(
        p.numel() for p in dense.parameters()
    )
    assert new > 0
    # With every bin kept and its gates open it is the teacher.
    whole = student_of(dense, "sea(k=64, width=16, max_length=64)").eval()
    for block in whole.model.blocks:
        gates = block.attention.attention.estimator.encoder.gates
        gates.weight.data.zero_()
        gates.bias.data.fill_(50.0)
    ids = torch.randint(32, (2, 40))
    torch.testing.assert_close(whole(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_loss_is_its_parts_by_the_papers_weights():
    dense, ids = teacher(), torch.randint(32, (2, 24))
    student = student_of(dense, SPEC).eval()
    targets = torch.randint(32, (2, 24))
    found = distillation(student, dense, ids, targets)
    ours = student(ids, output_hidden_states=True)
    theirs = dense(ids, output_hidden_states=True)
    hidden = [
        nn.functional.mse_loss(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states)
    ]
    kl = nn.functional.kl_div(
        ours.logits.log_softmax(-1), theirs.logits.softmax(-1), reduction="none"
    )
    expected = {
        "task": nn.functional.cross_entropy(ours.logits.flatten(0, 1), targets.flatten()),
        "hidden": sum(hidden) / 3,
        "logits": kl.sum() / 48,
    }
    for name, value in expected.items():
        assert found.parts[name] == pytest.approx(value.item(), rel=1e-4)
    total = sum(found.parts[name] for name in ("est", "dense", "ctx"))
    total += sum(getattr(CAUSAL, name) * found.parts[name] for name in expected)
    assert found.loss.item() == pytest.approx(total, rel=1e-5)
    assert (CAUSAL, ENCODER) == ((0.1, 5.0, 0.2), (0.1, 10.0, 0.1))


def test_everything_new_gets_a_gradient_and_the_teacher_none():
    dense = teacher()
    student = student_of(dense, SPEC).train()
    ids = torch.randint(32, (2, 24))
    distillation(student, dense, ids, ids, dense=False, rows=8).loss.backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    silent = [name for name, grad in grads.items() if grad is None or not grad.abs().max() > 0]
    assert silent == []
    assert all(p.grad is None for p in dense.parameters())
    assert "dense" not in distillation(student, dense, ids, dense=False).parts
    assert all(block.attention.attention.trace is None for block in student.model.blocks)
    assert type(dense.model.blocks[0].attention.attention).__name__ == "Full"


def test_distilling_brings_the_estimate_nearer():
    dense = teacher()
    student = student_of(dense, SPEC)
    torch.manual_seed(0)
    ids = torch.randint(32, (4, 24))
    history = distil(student, dense, lambda _: (ids, ids), steps=30, lr=1e-4, new_lr=1e-2)
    for name in ("est", "hidden", "logits", "ctx"):
        assert history[-1][name] < 0.9 * history[0][name], name
    assert not student.training


def test_other_students_learn_from_the_context():
    dense, ids = teacher(), torch.randint(32, (1, 24))
    same = distillation(student_of(dense, "full"), dense, ids)
    assert same.parts["ctx"] < 1e-10
    near = distillation(student_of(dense, "sink-window(sinks=0, window=4)"), dense, ids)
    assert near.parts["ctx"] > 1e-4
    mixed = distillation(student_of(dense, "combiner(size=4)"), dense, ids)
    assert mixed.parts["ctx"] > 1e-6


def test_padding_counts_nothing():
    dense = teacher()
    student = student_of(dense, SPEC).eval()
    ids = torch.randint(32, (1, 20))
    alone = distillation(student, dense, ids)
    padded = nn.functional.pad(ids, (6, 0))
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    both = distillation(student, dense, padded, attention_mask=mask)
    for name in ("hidden", "logits", "ctx"):
        assert both.parts[name] == pytest.approx(alone.parts[name], rel=1e-3)


def test_a_teacher_that_is_not_dense_is_refused():
    sparse = student_of(teacher(), "sink-window(sinks=0, window=4)")
    with pytest.raises(InputError, match="SinkWindow.*dense"):
        distillation(student_of(teacher(), SPEC), sparse, torch.randint(32, (1, 8)))


def test_a_student_generates_from_its_state():
    model = student_of(teacher(), SPEC).eval()
    ids = torch.randint(1, 32, (2, 9))
    wanted = ids
    for _ in range(6):
        logits = model(wanted, use_cache=False).logits[:, -1]
        wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), 1)
    got = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(got, wanted)
    model.generate(ids, max_new_tokens=3, num_beams=2, pad_token_id=0)


def test_a_layer_that_is_its_own_teacher_has_nothing_to_learn_but_its_estimate():
    student = student_of(teacher(), SPEC).eval()
    method = student.model.blocks[0].attention.attention
    method.trace = []
    student(torch.randint(32, (1, 16)))
    trace = method.trace[0]
    own = layer_losses(trace, Teacher(trace.q, trace.k, trace.out, trace.scale))
    assert float(own["dense"]) < 1e-6
    assert float(own["ctx"]) == 0
    assert float(own["est"]) > 1e-3
