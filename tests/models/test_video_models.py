"""The video transformer with chosen blocks, denoising, sampling, and the job that trains it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typing_extensions import override

from foveate.cli import main
from foveate.methods import make
from foveate.models import DiT
from foveate.models.denoise import STEP, denoising_loss, noised, sample
from foveate.ops.errors import InputError
from foveate.papers.training.denoising import error, fit
from foveate.papers.training.regime import Regime
from foveate.parts import Attention
from foveate.runs.clips import Clips

SIZES = (4, 8, 8)
BLOCKS = "frames=1, tile=(4, 4), box=(2, 4, 4)"
VMOBA = f"vmoba({BLOCKS})"
RECTIFIED = "rectified-spaattn(block=16, drop=0.7, p_thr=0.1, neighbours=False)"


def dit(attention, text=0, depth=3):
    torch.manual_seed(0)
    more = {"text_tokens": text, "text_dim": 5} if text else {}
    model = DiT(SIZES, (1, 1, 1), dim=24, depth=depth, num_heads=2, attention=attention, **more)
    for parameter in model.parameters():  # the gates begin closed
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Told(Attention):
    """An attention that writes down what it's told."""

    def __init__(self, method):
        self.method, self.told = method, []

    @override
    def __call__(self, q, k, v, ctx=None):
        self.told.append((ctx.layer, ctx.grid, ctx.step, ctx.phase))
        return self.method(q, k, v, ctx)


@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("attention", [VMOBA, RECTIFIED])
def test_blocks_in_every_layer_train_and_are_what_the_method_says(attention, text):
    model = dit(attention, text)
    x, at = torch.randn(2, 3, *SIZES), torch.tensor([30.0, 700.0])
    words = (torch.randn(2, text, 5),) if text else ()
    found = model(x, at, *words)
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    told = Told(replace(make(attention), after=text))
    torch.testing.assert_close(model.swap(told)(x, at, *words), found)
    assert told.told == [(layer, SIZES, None, "train") for layer in range(3)]
    assert not torch.allclose(model.swap("full")(x, at, *words), found, atol=1e-4)


def test_budgets_of_everything_are_the_dense_model():
    model = dit("full").eval()
    x, at = torch.randn(2, 3, *SIZES), torch.tensor([30.0, 700.0])
    dense = model(x, at)
    for text in (
        f"vmoba({BLOCKS}, select='topk', topk=16)",
        "rectified-spaattn(block=16, p_thr=1.0)",
        f"vmoba({BLOCKS}, dense_until=0.5)",
        "rectified-spaattn(block=16, dense_until=0.5)",
    ):
        found = model.swap(text)(x, at, done=0.4)
        torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.swap(f"vmoba({BLOCKS}, dense_until=0.5)")(x, at), dense)


def test_a_sample_with_the_right_answer_gets_there():
    """If the model always predicts x_0, every number of steps ends at x_0."""
    target, noise = torch.randn(2, 2, 3, *SIZES)
    seen = []

    def model(x, at, done=None):
        seen.append((float(at[0]) / STEP, done, x))
        return target

    module = torch.nn.Module()
    module.forward = model
    for steps in (1, 4):
        seen.clear()
        torch.testing.assert_close(sample(module, noise, steps), target, atol=1e-5, rtol=1e-5)
        assert [done for _, done, _ in seen] == [i / steps for i in range(steps)]
        for t, done, x in seen:
            assert t == pytest.approx(1 - done)
            torch.testing.assert_close(
                x, noised(target, torch.full((2,), t), noise), atol=1e-5, rtol=1e-5
            )
    with pytest.raises(InputError, match="steps"):
        sample(module, noise, 0)
    with pytest.raises(InputError, match="noise"):
        sample(module, noise[0, 0])


def test_sampling_tells_attentions_how_far_it_is():
    model = dit("full", depth=1)
    model.swap(told := Told(make("full")))
    sample(model, torch.randn(1, 3, *SIZES), 4)
    assert [step for _, _, step, _ in told.told] == [0.0, 0.25, 0.5, 0.75]
    assert model.training


def test_clips_move_in_straight_lines_and_bounce():
    clips = Clips((12, 32, 32), channels=1)
    one = clips.draw(3, "train", 0, 7)
    assert one.shape == (3, 1, 12, 32, 32)
    assert torch.equal(one, clips.draw(3, "train", 0, 7))
    assert not torch.allclose(one, clips.draw(3, "train", 0, 8))
    assert float(clips.draw(200, "v").square().mean()) == pytest.approx(0.5, rel=0.3)
    # A ball alone: the brightest place goes on by equal steps, but for bounces near a wall.
    import foveate.runs.clips as module

    before, module.BALLS = module.BALLS, 1
    try:
        light = Clips((8, 64, 64), channels=1).draw(40, "alone")[:, 0].abs().flatten(2)
    finally:
        module.BALLS = before
    at = torch.stack(torch.unravel_index(light.argmax(-1), (64, 64)), -1).double()
    step = at.diff(dim=1)
    turns = step.diff(dim=1).abs() > 2
    assert step.abs().max() <= 0.25 * 64 + 1
    inner = at[:, 1:-1]
    assert ((inner < 17) | (inner > 46))[turns].all()
    assert 0 < int(turns.sum()) < 0.3 * turns.numel()
    assert (step.abs().amax((1, 2)) > 1).double().mean() > 0.8


def test_held_out_clips_are_the_same_for_everyone_and_t_stays_inside():
    clips = Clips(SIZES)
    one, two = clips.held_out(20), clips.held_out(20)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.allclose(one[0], clips.held_out(20, "validation")[0])
    t = torch.cat([clips.training(50, 0, n)[1] for n in range(4)])
    assert 0.1 <= float(t.min()) < 0.2
    assert 0.8 < float(t.max()) <= 0.9


def test_a_training_that_goes_on_ends_as_one_that_was_never_stopped(tmp_path):
    pytest.importorskip("safetensors")
    clips = Clips((2, 4, 4))
    regime = Regime(steps=6, batch=2, lr=3e-3, every=3)

    def model():
        torch.manual_seed(0)
        return DiT((2, 4, 4), (1, 1, 1), dim=12, depth=1, num_heads=1)

    whole = model()
    fit(whole, clips, regime)
    first = model()
    cut = Clips((2, 4, 4))
    object.__setattr__(cut, "training", lambda n, s, i: clips.training(n, s, i) if i < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(first, cut, regime, folder=tmp_path)
    again = model()
    curve = fit(again, clips, regime, folder=tmp_path)
    assert [step for step, _ in curve] == [3, 6]
    for one, two in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, two)


def test_denoising_is_learnt():
    clips = Clips((2, 4, 4))
    torch.manual_seed(0)
    model = DiT(
        (2, 4, 4), (1, 1, 1), dim=32, depth=2, num_heads=2,
        attention="vmoba(frames=1, tile=(2, 2), box=(1, 2, 2), tau=0.3)",
    )  # fmt: skip
    before = error(model, clips, 32)
    clean, t, noise = clips.held_out(32)
    with torch.no_grad():
        assert before == pytest.approx(float(denoising_loss(model, clean, t, noise)), rel=1e-4)
    assert before == pytest.approx(float(clean.square().mean()), rel=1e-4)  # it predicts zero
    fit(model, clips, Regime(steps=60, batch=16, lr=5e-3))
    assert error(model, clips, 32) < 0.8 * before  # the mean clip is near zero, too


def test_the_command_trains_saves_and_draws(tmp_path, capsys):
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from foveate.models.denoise import load

    out = tmp_path / "video"
    given = [
        "denoise", "--size", "2x4x8", "--patch", "1x1x2", "--steps", "2", "--every", "1",
        "--batch", "2", "--dim", "16", "--layers", "2", "--heads", "2", "--sampling", "2",
        "--attention", "vmoba(frames=1, tile=(2, 2), box=(2, 2, 2))", "--out", str(out), "--json",
    ]  # fmt: skip
    assert main(given) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 32
    assert [step for step, _ in facts["curve"]] == [1, 2]
    # Four samples below each other; frames side by side, magnified, with a line between them.
    assert imread(out / "samples.png").shape[:2] == (4 * (4 * 8 + 2), 2 * (8 * 8 + 2))
    assert imread(out / "denoised.png").shape[0] == 2 * 3 * (4 * 8 + 2)
    model = load(out)
    assert error(model, Clips((2, 4, 8), times=(0.02, 1.0)), 48, batch=2) == pytest.approx(
        facts["error"], rel=1e-5
    )
    assert load(out, sizes=(2, 8, 8), attention="full").grid == (2, 8, 4)
    assert main(given) == 2  # what is there isn't written over
    assert main([*given, "--resume"]) == 0
    assert main([*given[:-3], "--out", str(tmp_path / "other"), "--size", "2x6"]) == 2
    with pytest.raises(InputError, match="foveate denoise"):
        load(tmp_path)
