"""The miniatures themselves: what they count is right, and every cell's path runs."""

import pytest
import torch

from foveate import papers
from foveate.papers.harness import Trial
from foveate.papers.harness.statistics import Verdict

pytest.importorskip("transformers")


def cell(key, name, tmp_path, **more):
    made = papers.load(key)
    tuned = made.grid.points[0] if made.grid and name in (made.grid.cells or made.cells) else None
    torch.manual_seed(0)
    trial = Trial(name, 0, quick=True, tuned=tuned, folder=tmp_path / "checkpoints", **more)
    return made, made.run(trial)


def counted(made, found):
    """The exact checks whose arms are there, and their verdicts."""
    verdicts = {}
    for check in made.checks:
        if check.exact:
            try:
                verdicts[check.name] = check.verdict([found])
            except KeyError:
                continue
    return verdicts


def test_step3_counts_the_papers_caches(tmp_path):
    made, found = cell("step3", "at size", tmp_path)
    assert {arm: metrics["cache"] for arm, metrics in found.items()} == {
        "Step-3 MFA": 512, "Qwen3-235B GQA": 1024, "DeepSeek-V3 MLA": 576,
    }  # fmt: skip
    assert set(counted(made, found).values()) == {Verdict.HOLDS}


def test_step3_trains_an_arm_with_the_cache_it_claims(tmp_path):
    _, ours = cell("step3", "MFA 16x16", tmp_path / "ours")
    _, base = cell("step3", "MHA 8x16", tmp_path / "base")
    assert ours["MFA 16x16"]["cache"] == 32
    assert base["MHA 8x16"]["cache"] == 256
    assert 0 < ours["MFA 16x16"]["loss"] < 6
    assert ours["MFA 16x16"]["curve"][-1][0] == 4


def test_sqa_counts_flops_and_times_every_arm(tmp_path):
    made, found = cell("sqa", "speed", tmp_path)
    verdicts = counted(made, found)
    assert len(verdicts) == 5
    assert set(verdicts.values()) == {Verdict.HOLDS}
    assert all(found[arm]["seconds 8192 causal"] > 0 for arm in found)
    _, trained = cell("sqa", "xSMQA", tmp_path)
    assert trained["xSMQA"]["cache"] == 2 * 16
    assert trained["xSMQA"]["parameters"] < 659_328


def test_tpla_counts_deepseek_v3_on_two_devices(tmp_path):
    made, found = cell("tpla", "at size", tmp_path)
    assert found["DeepSeek-V3 MLA"] == {"cache": 576, "multiply-adds": 139_264}
    assert found["DeepSeek-V3 TPLA"] == {"cache": 320, "multiply-adds": 147_456}
    assert set(counted(made, found).values()) == {Verdict.HOLDS}


def test_tpla_converts_what_it_trained(tmp_path):
    made, found = cell("tpla", "trained", tmp_path)
    arms = {arm for arm in (*made.baseline, *made.ours) if "V3" not in arm}
    assert arms == set(found)
    same = found["TPLA values only"]["loss"]
    assert same == pytest.approx(found["MLA"]["loss"], abs=1e-4)
    others = [
        arm for arm in arms if "loss" in found[arm] and arm not in ("MLA", "TPLA values only")
    ]
    assert len({found[arm]["loss"] for arm in others}) == len(others)
    halves = [found[arm]["second half"] for arm in ("MLA", "TPLA PCA", "TPLA pd sep")]
    assert len(set(halves)) == 3


def test_decoding_the_second_half_by_token_is_the_same_for_an_exact_model(tmp_path):
    from foveate.papers.tasks import standard_library
    from foveate.papers.tpla import MLA, second_half
    from foveate.papers.training.language import Sizes, language_model

    torch.manual_seed(0)
    model = language_model(Sizes(2, 64, 4, 32), MLA).eval()
    task = standard_library(32, size=60_000, held=5)
    assert second_half(model, task, decoded=True) == pytest.approx(second_half(model, task), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("key", papers.available())
def test_the_whole_quick_path_runs_in_a_minute(key, tmp_path):
    from foveate.papers.harness.run import Run

    with Run(papers.load(key), tmp_path, quick=True) as run:
        result = run()
    assert result.verdict["verdict"] == "inconclusive"
    assert result.verdict["seconds"] < 60
    assert all(one.verdict == Verdict.HOLDS for one in result.outcomes if one.check.exact)


@pytest.mark.parametrize(("arm", "share"), [("MoH 75%", 0.75), ("MoH 50%", 0.5), ("MHA", 1.0)])
def test_moh_counts_the_heads_that_count(tmp_path, arm, share):
    _, found = cell("moh", arm, tmp_path)
    assert found[arm]["pairs"] == share
    if arm != "MHA":
        assert found[arm]["load"] >= 1


def test_mohs_random_router_stays_as_it_was_drawn(tmp_path, monkeypatch):
    from foveate.papers import moh

    seen = {}
    original = moh.trained_on_bytes

    def watched(trial, make, **more):
        def made():
            model = make()
            seen["before"] = routers(model)
            return model

        model, found = original(trial, made, **more)
        seen["after"] = routers(model)
        return model, found

    def routers(model):
        found = [layer.attention.projection.router for layer in model.model.layers]
        return [[p.detach().clone() for p in (r.routed.weight, r.stage.weight)] for r in found]

    monkeypatch.setattr(moh, "trained_on_bytes", watched)
    for arm, stays in (("random routing", True), ("no balance loss", False)):
        cell("moh", arm, tmp_path / arm.split()[0])
        for (routed, stage), (now, stage_now) in zip(seen["before"], seen["after"]):
            assert torch.equal(routed, now) == stays
            assert not torch.equal(stage, stage_now)


def test_fna_counts_errors_and_what_is_written(tmp_path):
    made, found = cell("fna", "counts", tmp_path)
    verdicts = counted(made, found)
    assert len(verdicts) == 20
    assert set(verdicts.values()) == {Verdict.HOLDS}
    _, timed = cell("fna", "speed", tmp_path)
    assert all(len(timed[arm]) == 4 for arm in ("naive", "unfused", "fused", "dense"))


def test_fnas_counter_sees_weights_and_nothing_else():
    from foveate.papers.fna import _Weights

    with _Weights(12) as seen:
        x = torch.ones(3, 4) * 2
        x.add_(1)
        x.view(12).sum()
        torch.ones(3, 5).mul(2)
        torch.arange(12)
    assert seen.bytes == 2 * 12 * 4  # the ones and their double


def test_gna_says_before_the_run_which_strides_lose_nothing(tmp_path):
    made, found = cell("gna", "speed", tmp_path)
    verdicts = counted(made, found)
    assert len(verdicts) == 9
    assert set(verdicts.values()) == {Verdict.HOLDS}
    assert all(found[arm]["speed"] > 0 for arm in made.ours if "-D" in arm)


def test_gna_swaps_what_it_trained(tmp_path):
    made, found = cell("gna", "quality", tmp_path)
    assert set(found) == {"dense", "s=1", "s=2", "s=5", "block 8"}
    assert len({metrics["border swapped"] for metrics in found.values()}) == 5
    assert all(metrics["error tuned"] < metrics["error swapped"] for metrics in found.values())


def test_gnas_images_are_of_one_seed_and_split():
    from foveate.papers.gna import images

    first, again, other = images(4, "train", 0, 1), images(4, "train", 0, 1), images(4, "test")
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not torch.equal(first[0], other[0])
    clean, noisy, step = images(256, "x")
    assert clean.abs().max() <= 1
    assert 0.1 < (clean == 0).float().mean() < 0.9
    sigma = (noisy - clean).flatten(1).std(1)
    torch.testing.assert_close(sigma, step / 100, atol=0.15, rtol=0)
