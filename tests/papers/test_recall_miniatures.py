"""The miniatures of dma and superlinear: what they count, their arms, and what isn't trained."""

from __future__ import annotations

import pytest
import torch

from foveate import papers
from foveate.papers.harness import Trial
from foveate.papers.harness.statistics import Verdict
from foveate.papers.training import Regime, train


def cell(key, name, tmp_path):
    made = papers.load(key)
    torch.manual_seed(0)
    return made, made.run(Trial(name, 1, quick=True, folder=tmp_path / "checkpoints"))


def exact(made, found):
    return {c.verdict([found]) for c in made.checks if c.exact}


def test_dma_counts_tiles_and_what_decoding_reads(tmp_path):
    made, found = cell("dma", "tiles", tmp_path)
    assert exact(made, found) == {Verdict.HOLDS}
    figures = found["tiles"]
    assert figures["kept"] == 64 / 512
    assert figures["read"] == (64 * 64 * 2 + 64) / (512 * 64 * 2)
    assert figures["active, smoothed"] < figures["active"] <= 1


@pytest.mark.parametrize("arm", ["DMA", "window", "dense, blended"])
def test_dma_trains_an_arm(arm, tmp_path):
    pytest.importorskip("transformers")
    _, found = cell("dma", arm, tmp_path)
    assert 0 <= found[arm]["accuracy"] <= 1
    assert found[arm]["curve"][-1][0] == 4


def test_dmas_arms_see_as_many_keys():
    from foveate.methods import make
    from foveate.papers.dma import ARMS, STEPS, task

    assert STEPS <= 2500
    assert make(ARMS["DMA"]).window == make(ARMS["window"]).window == 16
    assert make(ARMS["DMA"]).pairs(64) == make(ARMS["DMA, blended"]).pairs(64)
    assert task("DMA, blended").blended
    assert not task("DMA").blended


def test_superlinear_counts_the_papers_exponents(tmp_path):
    made, found = cell("superlinear", "pairs", tmp_path)
    assert exact(made, found) == {Verdict.HOLDS}
    assert found["pairs"]["share at 64k"] == pytest.approx(0.0366, abs=1e-4)


def test_superlinears_window_sees_as_many_keys_at_the_end_of_a_sequence():
    from foveate.methods.superlinear.powers import read
    from foveate.papers.superlinear import KEYS, LENGTH, REACH, ROUTED, STEPS

    assert read(LENGTH - 1, spans=ROUTED.spans, index=ROUTED.index)[1] == KEYS
    assert LENGTH - 8 - KEYS + 1 > REACH  # outside it even where the first pair is asked for
    assert STEPS <= 2500
    assert ROUTED.spans == 3


def test_superlinear_trains_all_arms_from_one_model(tmp_path, monkeypatch):
    from foveate.papers import superlinear
    from foveate.papers.superlinear import ARMS, BEFORE

    starts, real = [], superlinear.take
    monkeypatch.setattr(
        superlinear, "take", lambda model, start: (starts.append(start), real(model, start))
    )
    made, found = cell("superlinear", "models", tmp_path)
    assert set(found) == {BEFORE, *ARMS} == {*made.baseline, *made.ours}
    for figures in found.values():
        assert 0 <= figures["accuracy"] <= 1
        assert figures["curve"][-1][0] == 4
    assert len(starts) == len(ARMS)
    assert all(start is starts[0] for start in starts)


def test_an_arm_goes_on_from_dense_weights():
    from foveate.ops.errors import InputError
    from foveate.papers.superlinear import ARMS, Hybrid, take

    torch.manual_seed(0)
    dense = Hybrid(32, "dense")
    for arm in ARMS:
        torch.manual_seed(1)
        model = Hybrid(32, arm)
        drawn = {n: x.clone() for n, x in model.state_dict().items() if ".routing." in n}
        take(model, dense)
        for name, value in model.state_dict().items():
            other = drawn[name] if name in drawn else dense.state_dict()[name]
            assert torch.equal(value, other), name
        assert bool(drawn) is ("routing" in arm or arm == "superlinear")
    with pytest.raises(InputError, match="missing"):
        take(dense, Hybrid(32, "dense", layers=0))


def test_nothing_teaches_random_routing():
    from foveate.papers.superlinear import Hybrid, task

    given = task(8)
    for arm, taught in (("superlinear", True), ("random routing", False)):
        torch.manual_seed(0)
        model = Hybrid(given.vocab, arm)
        routing = model.layers[0][1].attention.routing.weight
        before = routing.detach().clone()
        train(model, given, Regime(steps=2, batch=4, every=2))
        assert torch.equal(routing, before) is not taught


def test_a_hybrid_is_causal():
    from foveate.papers.superlinear import Hybrid

    model = Hybrid(32, "superlinear").eval()
    tokens = torch.randint(32, (1, 120))
    other = torch.cat((tokens[:, :90], torch.randint(32, (1, 30))), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :90], model(other)[:, :90])
