"""The miniatures of vmoba and rectified-spaattn: arms, what they count, data, all paths."""

from __future__ import annotations

import pytest
import torch

from foveate import papers
from foveate.papers import rectified_spaattn, vmoba
from foveate.papers.harness import Trial
from foveate.papers.harness.verdict import conclude, outcomes


def test_vmoba_counts_and_runs(monkeypatch):
    made = papers.load("vmoba")
    monkeypatch.setattr(vmoba, "SIZES", (2, 4, 8))
    monkeypatch.setattr(vmoba, "BLOCKS", "frames=1, tile=(2, 4), box=(2, 2, 4)")
    smaller = {a: m.replace("box=(2, 4, 4)", "box=(2, 2, 4)") for a, m in vmoba.METHODS.items()}
    monkeypatch.setattr(vmoba, "METHODS", smaller)
    found = {}
    for cell in made.cells:
        found |= made.run(Trial(cell, 0, quick=True))
    assert set(made.baseline) | set(made.ours) == set(found)
    exact = {check.name: check for check in made.checks if check.exact}
    assert exact["operations of Wan: dense / VMoBA"].figure(found) == pytest.approx(2.834, abs=1e-3)
    for check in (*made.checks, *made.needs):
        assert check.values([found])
    for arm in ("VMoBA", "per query", "top-k", "1-D"):
        assert 0 < found[arm]["density"] < 1
    assert found["swapped, head"].keys() == {"off 1d", "off 2d", "off 3d"}


def test_vmoba_arms_begin_with_the_same_weights():
    one, two = (vmoba.model_of(vmoba.METHODS[arm], 3) for arm in ("dense", "VMoBA"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    other = vmoba.model_of("full", 4)
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_fields_have_their_variance_and_length():
    random = torch.Generator().manual_seed(0)
    for scale in (1.0, 2.5):
        x = rectified_spaattn.field(scale, random, dim=512)
        assert x.shape == (8 * 16 * 16, 512)
        assert float(x.square().mean()) == pytest.approx(1, abs=0.05)
        # Two blurs of standard deviation s meet as one of sqrt(2) s: correlation exp(-d^2 / 4 s^2).
        cube = x.view(8, 16, 16, -1)
        near = float((cube[4, 8, 7] * cube[4, 8, 9]).mean())
        assert near == pytest.approx(float(torch.tensor(-4 / (4 * scale**2)).exp()), abs=0.12)


def test_rectified_arms_compute_the_same_blocks(monkeypatch):
    monkeypatch.setattr(rectified_spaattn, "SETTINGS", ((1.5, 1.0, 0.9), (2.5, 1.0, 0.75)))
    made = papers.load("rectified-spaattn")
    found = {}
    for cell in made.cells:
        found |= made.run(Trial(cell, 0))
    assert set(found) == {*made.baseline, *made.ours}
    for check in made.checks:
        assert check.values([found])
    for fields in rectified_spaattn.FIELDS:
        arms = {arm: found[f"{arm}, {fields}"] for arm in rectified_spaattn.ARMS}
        for drop, blocks in ((0.9, 3), (0.75, 8)):
            density = {arms[arm][f"density {drop:g}"] for arm in ("sparse", "Rectified", "no GAPR")}
            assert len(density) == 1
            # `blocks` of 32 and the text, or, where text is among the best, one block less.
            visual, text = 2048, 32
            pairs = visual * (blocks * 64 + text) + text * (visual + text)
            assert density.pop() <= pairs / (visual + text) ** 2
        name = "scale 2.5, amp 1, drop 0.75"
        assert arms["Rectified"][name] < 0.8 * arms["sparse"][name]


def test_rectified_fields_are_one_or_two():
    """Queries and keys have a field in common or none, and values never have theirs."""
    for fields, near in (("one field", 1 / 1.09), ("two fields", 0)):
        q, k, v = (x[0, 0, :2048] for x in rectified_spaattn.tensors(fields, 1.0, 1.6, 0))
        pairs = {"qk": (q, k), "qv": (q, v), "kv": (k, v)}
        alike = {
            n: float(torch.corrcoef(torch.stack(p).flatten(1))[0, 1]) for n, p in pairs.items()
        }
        assert alike == pytest.approx({"qk": near, "qv": 0, "kv": 0}, abs=0.05)
    one, two = (rectified_spaattn.tensors(f, 1.0, 1.6, 0) for f in ("one field", "two fields"))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[2], two[2])


def test_rectified_holds_only_if_both_fields_do():
    """The same thresholds on both; what fails on either is no "holds"."""
    made = papers.load("rectified-spaattn")
    names = [rectified_spaattn.name_of(setting) for setting in rectified_spaattn.SETTINGS]
    thresholds = {
        fields: [(c.holds, c.refuted, c.at_least) for c in made.checks if fields in c.name]
        for fields in rectified_spaattn.FIELDS
    }
    assert thresholds["two fields"] == thresholds["one field"]
    assert sum(map(len, thresholds.values())) == len(made.checks) == 6

    def verdict(**changed):
        errors = {"sparse": 0.5, "Rectified": 0.4, "no GAPR": 0.6, "no IPAR": 0.6}
        seeds = []
        for seed in range(3):
            one = {}
            for fields in rectified_spaattn.FIELDS:
                for arm, error in errors.items():
                    error = changed.get(
                        f"{arm}, {fields}".replace(" ", "_").replace(",", ""), error
                    )
                    one[f"{arm}, {fields}"] = dict.fromkeys(names, error + 1e-4 * seed)
            seeds.append(one)
        return conclude(outcomes(made, seeds))

    assert verdict() == "holds"
    for fields in ("two_fields", "one_field"):
        assert verdict(**{f"no_GAPR_{fields}": 0.4}) == "inconclusive"
        assert verdict(**{f"no_IPAR_{fields}": 0.4}) == "inconclusive"
        assert verdict(**{f"Rectified_{fields}": 0.6}) == "refuted"
