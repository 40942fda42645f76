"""The trainer: its regime against formulas, and that stopping it anywhere changes nothing."""

import json
import math

import pytest
import torch
from torch import nn

from foveate.ops.errors import InputError
from foveate.papers.tasks import ByteText, Copying
from foveate.papers.tasks.base import Batch
from foveate.papers.training import (
    CheckpointError,
    DivergedError,
    Regime,
    evaluate,
    next_token,
    train,
)
from foveate.papers.training.regime import optimizer_of, schedule_of
from foveate.parts.weights import weights

pytest.importorskip("safetensors")
TASK = Copying(string=4, symbols=7, held=32)


class Tiny(nn.Module):
    """Two tied matrices, a buffer, a frozen gain and dropout: what a checkpoint must carry."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(TASK.vocab, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, TASK.vocab, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(16), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids):
        if self.training:
            self.seen += 1
        return self.head(self.gain * self.drop(self.mix(self.embed(ids))[0]))


def tiny(dropout=0.1):
    torch.manual_seed(5)
    return Tiny(dropout)


def same(one, other):
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


class Stop(Exception):
    """Stands for a kill."""


def killed_at(step):
    calls = []

    def objective(model, batch):
        calls.append(1)
        if len(calls) > step:
            raise Stop
        return next_token(model, batch)

    return objective


REGIME = Regime(steps=12, batch=4, every=3, lr=1e-2)


def test_it_learns_and_tells():
    heard = []
    regime = Regime(steps=150, batch=16, lr=2e-2, every=50)
    before = evaluate(tiny(), TASK, "test")
    done = train(model := tiny(0.0), TASK, regime, tell=lambda share, text: heard.append(share))
    assert done.steps == 150
    assert [entry["step"] for entry in done.history] == [50, 100, 150]
    assert done.best == min(entry["validation"] for entry in done.history)
    assert done.curve[-1] == [150, done.history[-1]["validation"]]
    after = evaluate(model, TASK, "test")
    assert after["loss"] < before["loss"] - 0.3
    assert after["accuracy"] > before["accuracy"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert heard[-1] == 1.0
    assert not model.training


@pytest.mark.parametrize("step", [0, 1, 3, 7, 11])
def test_a_kill_at_any_step_changes_nothing(tmp_path, step):
    whole = train(one := tiny(), TASK, REGIME)
    with pytest.raises(Stop):
        train(tiny(), TASK, REGIME, objective=killed_at(step), folder=tmp_path)
    other = tiny()
    with torch.no_grad():  # what a resumed run starts from doesn't matter
        other.mix.weight_hh_l0.add_(step >= 3)
    done = train(other, TASK, REGIME, folder=tmp_path)
    assert done.resumed_at == step // 3 * 3
    assert same(one, other)
    assert done.history == whole.history
    again = train(tiny(), TASK, REGIME, folder=tmp_path)
    assert again.resumed_at == 12
    assert again.history == whole.history


def test_a_run_leaves_torchs_random_state_alone():
    torch.manual_seed(1)
    model, expected = tiny(), torch.random.get_rng_state()
    train(model, TASK, REGIME)
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_the_schedule_rises_and_falls():
    regime = Regime(steps=100, lr=0.5, warmup=0.1, floor=0.2)
    optimizer = optimizer_of(tiny(), regime)
    schedule = schedule_of(optimizer, regime)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in enumerate(rates):
        if step < 10:
            expected = 0.5 * (step * (10 / 11) / 10 + 1 / 11)
        else:
            half = (1 + math.cos(math.pi * (step - 10) / 89)) / 2
            expected = 0.5 * (0.2 + 0.8 * half)
        assert rate == pytest.approx(expected, rel=1e-6), step
    assert rates[99] == pytest.approx(0.1)


def test_no_warm_up_and_a_single_step():
    for regime in (Regime(steps=5, warmup=0.0, every=9), Regime(steps=1)):
        done = train(tiny(), TASK, regime)
        assert done.history[0]["step"] == regime.steps
    first = []
    regime = Regime(steps=4, warmup=0.0, floor=0.0, lr=0.3)
    optimizer = optimizer_of(tiny(), regime)
    schedule = schedule_of(optimizer, regime)
    for _ in range(4):
        first.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert first[0] == pytest.approx(0.3)
    assert first[3] == pytest.approx(0.0, abs=1e-9)


def test_only_matrices_decay_and_what_is_frozen_stays():
    model = tiny()
    optimizer = optimizer_of(model, Regime(weight_decay=0.3))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model.embed.weight)] == 0.3
    assert decays[id(model.mix.bias_hh_l0)] == 0.0
    assert id(model.gain) not in decays


def test_gradients_are_clipped():
    moved = {}
    for clip in (0.0, 1e-3):
        model = tiny(0.0)
        norms = []

        def objective(model, batch):
            return 1000 * next_token(model, batch)

        original = torch.optim.AdamW.step

        def step(self, *args, norms=norms, original=original, **kwargs):
            grads = [p.grad.norm() for g in self.param_groups for p in g["params"]]
            norms.append(torch.stack(grads).norm().item())
            return original(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            train(model, TASK, Regime(steps=2, batch=4, clip=clip), objective=objective)
        moved[clip] = norms
    assert all(norm > 1 for norm in moved[0.0])
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in moved[1e-3])


class Memorise:
    """Trains on one sequence, validates on another: overfits at once."""

    vocab = TASK.vocab

    def batch(self, seed, number, size):
        return Batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 4, 5]]))

    def held_out(self, split, size):
        yield Batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[7, 7, 7, 7]]))

    def describe(self):
        return "memorise"


@pytest.mark.parametrize("kill", [None, 7])
def test_early_stop_puts_the_best_weights_back(tmp_path, kill):
    regime = Regime(steps=200, batch=1, lr=3e-2, every=2, patience=3, warmup=0.0)
    if kill is not None:
        with pytest.raises(Stop):
            train(tiny(0.0), Memorise(), regime, objective=killed_at(kill), folder=tmp_path)
    done = train(model := tiny(0.0), Memorise(), regime, folder=tmp_path)
    assert done.stopped_early
    assert done.steps == done.best_step + 6 < 200
    assert evaluate(model, Memorise(), "validation")["loss"] == pytest.approx(done.best)
    again = train(model := tiny(0.0), Memorise(), regime, folder=tmp_path)
    assert again.steps == done.steps
    assert evaluate(model, Memorise(), "validation")["loss"] == pytest.approx(done.best)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_kept_aside_and_the_run_begins_anew(tmp_path, file, damage):
    train(one := tiny(), TASK, REGIME, folder=tmp_path)
    (place,) = tmp_path.glob("step-*")
    data = (place / file).read_bytes()
    if damage == "gone":
        (place / file).unlink()
    else:
        cut = len(data) // 2
        (place / file).write_bytes(
            data[:cut] + (b"" if damage == "cut" else b"\xff" * 9 + data[cut + 9 :])
        )
    done = train(other := tiny(), TASK, REGIME, folder=tmp_path)
    assert done.resumed_at == 0
    assert len(done.notes) == 1
    assert "was kept as broken-1-step-000012" in done.notes[0]
    assert (tmp_path / "broken-1-step-000012").is_dir()
    assert same(one, other)


def test_best_weights_that_are_damaged_are_told(tmp_path):
    regime = Regime(steps=200, batch=1, lr=3e-2, every=2, patience=3, warmup=0.0)
    train(tiny(0.0), Memorise(), regime, folder=tmp_path)
    (tmp_path / "best.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="holds the best weights; remove"):
        train(tiny(0.0), Memorise(), regime, folder=tmp_path)


def test_what_a_killed_run_left_half_written_goes_away(tmp_path):
    (tmp_path / ".new-1").mkdir()
    (tmp_path / ".new-1" / "model.safetensors").write_bytes(b"half")
    train(tiny(), TASK, REGIME, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000012"]


def test_it_tells_where_it_goes_on(tmp_path):
    with pytest.raises(Stop):
        train(tiny(), TASK, REGIME, objective=killed_at(7), folder=tmp_path)
    heard = []
    train(tiny(), TASK, REGIME, folder=tmp_path, tell=lambda *said: heard.append(said))
    assert heard[0] == (0.5, "goes on at step 6")
    heard.clear()
    train(tiny(), TASK, REGIME, tell=lambda *said: heard.append(said))
    assert heard[0] == (0.0, "begins")


def test_another_trainings_checkpoint_is_refused_unless_it_begins_anew(tmp_path):
    train(tiny(), TASK, REGIME, folder=tmp_path)
    other = Regime(steps=13, batch=4, every=3, lr=1e-2)
    with pytest.raises(CheckpointError, match="is of another training"):
        train(tiny(), TASK, other, folder=tmp_path)
    done = train(tiny(), TASK, other, folder=tmp_path, resume=False)
    assert (done.resumed_at, done.steps) == (0, 13)
    state = json.loads(next(tmp_path.glob("step-*")).joinpath("state.json").read_text())
    assert state["step"] == 13


def test_divergence_is_told():
    def objective(model, batch):
        return next_token(model, batch) * math.nan

    with pytest.raises(DivergedError, match=r"loss is nan at step 0; take a learning rate below"):
        train(tiny(), TASK, REGIME, objective=objective)


def test_divergence_that_only_shows_in_validation_is_told(tmp_path):
    model = tiny(0.0)
    with torch.no_grad():
        model.scratch.fill_(math.nan)
    model.register_forward_hook(lambda m, i, o: o if m.training else o + m.scratch.sum())
    with pytest.raises(DivergedError, match="The validation loss is nan at step 3"):
        train(model, TASK, REGIME, folder=tmp_path)


def test_a_models_own_losses_are_added():
    class Output:
        def __init__(self, logits):
            self.logits = logits
            self.aux = {"balance_loss": torch.tensor(7.0), "load": torch.tensor(3.0)}

    model = tiny(0.0)
    batch = TASK.batch(0, 0, 4)
    plain = next_token(model, batch)
    whole = next_token(lambda ids: Output(model(ids)), batch)
    torch.testing.assert_close(whole, plain + 7)


def test_only_scored_positions_count():
    class Right(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(50.0))

        def forward(self, ids):
            at = torch.arange(4, 8)
            guess = torch.full_like(ids, 0)
            guess[:, at] = torch.cat([ids[:, :4]], 1)
            return self.scale * torch.nn.functional.one_hot(guess, TASK.vocab)

    found = evaluate(Right(), TASK, "validation", 5)
    assert found["accuracy"] == 1.0
    assert found["loss"] == pytest.approx(0.0, abs=1e-6)


def test_text_is_learnt_too():
    task = ByteText(b"abcdefgh" * 200, length=8, held=8)

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(256, 256)

        def forward(self, ids):
            return self.table(ids)

    done = train(Bigram(), task, Regime(steps=60, batch=8, lr=0.3, every=60))
    assert done.best < 0.1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"clip": -1.0}, "clip must be 0 or more"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"patience": 0}, "patience must be 1 or more"),
    ],
)
def test_bad_regimes_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        Regime(**wrong)
