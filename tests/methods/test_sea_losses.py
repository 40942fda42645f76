"""What SEA's estimator learns from: the losses of its distillation."""

from __future__ import annotations

import pytest
import torch
from sea_models import CAUSAL, built, context, tensors

from foveate import Context, causal, padding
from foveate.methods.sea.compress import bins_of, budgets, keep_best
from foveate.methods.sea.layout import Stretch, layout_of
from foveate.methods.sea.losses import Teacher, layer_losses

FORMS = pytest.mark.parametrize("form", ["causal", "bidirectional"])


# -- distillation ----------------------------------------------------------------------------------
def traced(method, q, k, v, ctx):
    method.trace = []
    method(q, k, v, ctx)
    return method.trace[0]


@FORMS
def test_losses_are_the_sheets_formulas(form):
    q, k, v = tensors(24, batch=1)
    trace = traced(built(form=form), q, k, v, context(form))
    tq, tk, _ = tensors(24, batch=1)
    goal_out = torch.randn_like(trace.out)
    found = layer_losses(trace, Teacher(tq, tk, goal_out, 0.25))
    mask = causal().dense(24, 24) if form == "causal" else torch.ones(24, 24).bool()
    goal = (tq @ tk.repeat_interleave(2, 1).mT / 4).masked_fill(~mask, -torch.inf).softmax(-1)
    n = torch.arange(1, 25) if form == "causal" else torch.full((24,), 24)
    index = bins_of(torch.arange(24), n[:, None], 16).expand(1, 4, -1, -1)
    own = {
        "est": trace.scores.gather(3, index),
        "dense": q @ k.repeat_interleave(2, 1).mT / 4,
    }
    for name, scores in own.items():
        log = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
        terms = torch.where(mask, goal * (goal.log() - log), 0.0)
        kl = terms.sum() / (96 if form == "causal" else 24)
        mse = (log.exp() - goal).square().mean()
        torch.testing.assert_close(found[name], 0.1 * kl + mse)
    context_loss = (trace.out - goal_out).square().mean().to(found["ctx"].dtype)
    torch.testing.assert_close(found["ctx"], context_loss, atol=1e-6, rtol=1e-5)
    alone = layer_losses(trace, Teacher(tq, tk, goal_out, 0.25), dense=False)
    assert set(alone) == {"est", "ctx"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_leave_padding_out(side):
    q, k, v = tensors(30)
    pads = torch.tensor([0, 8])
    at = torch.arange(30)[None] - pads[:, None] if side == "left" else None
    ctx = Context(mask=causal() & padding(30 - pads), q_positions=at, kv_positions=at)
    method = built()
    teacher = [*tensors(30)[:2], torch.randn(2, 4, 30, 16, dtype=torch.float64)]
    both = layer_losses(traced(method, q, k, v, ctx), Teacher(*teacher, 0.25))
    real = slice(8, None) if side == "left" else slice(0, 22)
    found = []
    for b, part in ((0, slice(None)), (1, real)):
        row = [x[b : b + 1, :, part] for x in (q, k, v, *teacher)]
        trace = traced(method, *row[:3], CAUSAL)
        found.append(layer_losses(trace, Teacher(*row[3:], 0.25))["ctx"])
    torch.testing.assert_close(both["ctx"], (found[0] * 30 + found[1] * 22) / 52)
    assert all(loss.isfinite() for loss in both.values())


def test_some_rows_stand_for_all():
    q, k, v = tensors(64, batch=1)
    trace = traced(built(), q, k, v, CAUSAL)
    teacher = Teacher(*tensors(64, batch=1)[:2], trace.out, 0.25)
    whole = layer_losses(trace, teacher)["est"]
    parts = [layer_losses(trace, teacher, rows=torch.arange(r, 64, 4))["est"] for r in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_training_jitters_some_calls_and_redraws_its_features():
    method = built(redraw=3, dtype=torch.float32).train()
    q, k, v = tensors(20, batch=1, dtype=torch.float32)
    ctx = Context(mask=causal(), phase="train")
    before = method.estimator.w.clone()
    method.trace = []
    for _ in range(2):
        method(q, k, v, ctx)
    assert torch.equal(method.estimator.w, before)
    for _ in range(98):
        method(q, k, v, ctx)
    assert not torch.equal(method.estimator.w, before)
    jittered = [t for t in method.trace if t.jitter is not None]
    assert 2 <= len(jittered) <= 25
    assert all(t.jitter.abs().max() <= 0.75 for t in jittered)


def test_jittered_layouts_are_the_jittered_map():
    jitter = (torch.rand(90, dtype=torch.float64) * 2 - 1) * 0.75
    probs = torch.rand(1, 2, 90, 16)
    seen = torch.arange(1, 91)[None]
    keep = keep_best(probs, budgets(5, seen, 16, 2, "causal_batch", 90), "causal_batch")
    layout = layout_of(keep, Stretch(seen, torch.zeros(1).long(), 90, jitter))
    index = bins_of(torch.arange(90), seen[0, :, None], 16, jitter)
    assert torch.equal(layout.dense(), keep.gather(3, index.expand(1, 2, -1, -1)).tril())
