"""The miniatures of flowformer and gaam: their data, what they measure, and every cell's path."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import causal, papers
from foveate.methods.gaam import GaussianGate
from foveate.ops.errors import InputError
from foveate.papers.harness import Trial, Verdict
from foveate.papers.tasks.base import split_of
from foveate.papers.tasks.markers import FILLER, FIRST, A, B, FirstMarker

pytest.importorskip("transformers")


def cell(key, name, tmp_path):
    made = papers.load(key)
    torch.manual_seed(0)
    trial = Trial(name, 0, quick=True, tuned=1e-3, folder=tmp_path / "checkpoints")
    return made, made.run(trial)


# -- flowformer ------------------------------------------------------------------------------------
def test_the_first_marker_decides():
    task = FirstMarker(length=40, times=3, held=30)
    inputs, targets = task.batch(0, 0, 200)
    assert targets.shape == (200, 1)
    for row, target in zip(inputs.tolist(), targets[:, 0].tolist()):
        assert row[0] == FIRST
        assert row.count(A) == row.count(B) == 3
        marks = [token for token in row if token in (A, B)]
        assert marks[0] == (A, B)[target]
        assert all(FILLER <= t < task.vocab for t in row[1:] if t not in (A, B))
    assert 0.3 < targets.float().mean() < 0.7
    assert not torch.equal(task.batch(0, 1, 200).inputs, inputs)
    held = torch.cat([batch.inputs for batch in task.held_out("test", 7)])
    assert len(held) == 30
    assert split_of(held).eq(2).all()
    with pytest.raises(InputError, match="length above 8"):
        FirstMarker(length=8, times=4)
    grown = FirstMarker(length=40, times=3, held=30, shorter=((10, 2), (20, 1)))
    assert [grown.batch(0, n, 5).inputs.shape[1] for n in range(4)] == [10, 10, 20, 40]
    assert torch.equal(grown.batch(0, 2, 5).inputs[:, 0], torch.full((5,), FIRST))
    assert next(grown.held_out("test", 7)).inputs.shape == (7, 40)
    for shorter in (((40, 1),), ((6, 1),), ((20, 0),)):
        with pytest.raises(InputError, match="lengths from 7 to 39"):
            FirstMarker(length=40, times=3, shorter=shorter)


def test_entropy_of_rows_by_hand(monkeypatch):
    from foveate.papers import flowformer
    from foveate.papers.tasks.base import Batch
    from foveate.papers.training.language import Sizes, language_model

    torch.manual_seed(0)
    model = language_model(Sizes(1, 8, 2, 6), attention="flowformer", position="learned").eval()
    ids = torch.randint(256, (3, 6))

    class Task:
        def held_out(self, split, size):
            yield Batch(ids, ids)

    layer = model.model.layers[0].attention
    inner, p = layer.attention, layer.projection
    monkeypatch.setattr(flowformer, "standard_library", lambda *_, **__: Task())
    found = flowformer.entropy(model, Trial("Flow", 0))
    assert layer.attention is inner  # put back
    with torch.no_grad():
        x = model.model.embed_tokens(ids) + model.model.embed_positions(torch.arange(6))
        x = model.model.layers[0].attention_norm(x)
        q, k = p.query(x), p.expand(p.entries(x))[0]
    fq, fk = q.sigmoid(), k.sigmoid()
    entropies = []
    for b in range(3):
        for h in range(2):
            flows = inner.flows(q, k, flowformer.Context(mask=causal()))
            for t in range(6):
                row = [
                    float(fq[b, h, t] @ fk[b, h, s] * flows.competition[b, h, s])
                    for s in range(t + 1)
                ]
                entropies.append(-sum(w / sum(row) * math.log(w / sum(row)) for w in row))
    assert found == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_flowformer_gains_on_either_task():
    made = papers.load("flowformer")
    check = made.checks[0]

    def at(loss, accuracy):
        return {
            "linear": {"loss": 2.0}, "linear, markers": {"accuracy": 0.8},
            "Flow": {"loss": loss}, "Flow, markers": {"accuracy": accuracy},
        }  # fmt: skip

    assert check.verdict([at(2.1, 0.85)] * 3) is Verdict.HOLDS
    assert check.verdict([at(1.97, 0.7)] * 3) is Verdict.HOLDS
    assert check.verdict([at(1.99, 0.805)] * 3) is Verdict.REFUTED


# -- gaam ------------------------------------------------------------------------------------------
def test_noise_of_the_settings():
    from foveate.papers.gaam import BURST, FRAMES, Speech, sounds

    variances = {}
    for setting in ("stationary", "changing"):
        frames, labels = sounds(Speech(setting, 0), "test")
        assert frames.shape == (1500, FRAMES, 16)
        assert labels.unique().tolist() == list(range(6))
        variances[setting] = frames[:, :: FRAMES - 1].var(2)  # the first and last frame
    quiet = variances["stationary"].median().item()
    assert quiet == pytest.approx(1, abs=0.1)
    loud = variances["changing"]
    assert loud.quantile(0.95) / loud.quantile(0.05) > 2 * (
        variances["stationary"].quantile(0.95) / variances["stationary"].quantile(0.05)
    )
    assert BURST < FRAMES


def test_entries_of_noise_say_nothing():
    from foveate.papers.gaam import Speech, features, noisy

    task = Speech("changing", 3, quick=True)
    x, labels = features(task, "train")
    again, _ = features(Speech("changing", 3, quick=True), "train")
    assert torch.equal(x, again)
    assert x.shape == (64, 12, 64)
    noise = noisy(3)
    assert 0.15 < noise.float().mean() < 0.35
    assert not torch.equal(noise, noisy(4))
    centred = x - x.mean(0)
    # Layers share a residual stream, so that what isn't noise is correlated from layer to layer.
    corr = (centred[:, 3] * centred[:, 4]).sum(0) / (
        centred[:, 3].norm(dim=0) * centred[:, 4].norm(dim=0)
    )
    both = ~noise[3] & ~noise[4]
    assert corr[both].mean() > 0.5
    assert corr[~both].abs().mean() < 0.3


def test_a_gate_that_sees_no_difference_has_no_auc():
    from foveate.papers.gaam import Speech, auc

    gate = GaussianGate(4, form="density", features=64)
    with torch.no_grad():
        gate.c.fill_(1e30)
    task = Speech("changing", 0, quick=True)
    assert auc(gate, task, torch.device("cpu")) == 0.5


@pytest.mark.parametrize("key", ["flowformer", "gaam"])
def test_every_cell_runs_and_every_check_finds_its_figures(key, tmp_path):
    made = papers.load(key)
    arms = {}
    for name in made.cells:
        _, found = cell(key, name, tmp_path / name)
        for arm, metrics in found.items():
            arms[arm] = arms.get(arm, {}) | metrics
        if made.grid is not None and name in (made.grid.cells or made.cells):
            assert math.isfinite(found[name][made.grid.metric])
    assert set(arms) == {*made.baseline, *made.ours}
    for check in (*made.checks, *made.needs):
        assert math.isfinite(check.values([arms])[0]), check.name
        if check.exact:
            assert check.verdict([arms]) is Verdict.HOLDS
    if key == "gaam":
        assert 0 <= arms["GAAM, changing"]["AUC"] <= 1
        counts = [arms[f"{arm}, changing"]["module"] for arm in ("GAAM", "MHA")]
        assert counts == [512, 4 * 64 * 64 + 4 * 64]
