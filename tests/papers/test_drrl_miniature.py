"""The miniature of drrl: what its checks make of a policy that is no better than a rule."""

from __future__ import annotations

import pytest

from foveate import papers
from foveate.papers.drrl import ENERGY, FIXED, FREE, FULL, LAYERS, OURS, RANDOM, Bench, at_rank
from foveate.papers.harness.statistics import Verdict
from foveate.papers.harness.verdict import conclude, outcomes


def told(**losses):
    """The verdict on three seeds of these losses, all else as the claim wants it."""
    usual = {
        "policy": 1.90, "fixed": 1.95, "random": 2.10, "energy": 1.94, "layers": 1.93, "full": 1.89,
    } | losses  # fmt: skip
    seeds = []
    for wobble in (-0.001, 0.0, 0.001):
        at = {name: value + wobble for name, value in usual.items()}
        seeds.append({
            OURS: {"loss": at["policy"], "rank": 30.0, "flops, 4,096": 0.9},
            FREE: {"loss": at["policy"]}, FULL: {"loss": at["full"]}, FIXED: {"loss": at["fixed"]},
            RANDOM: {"loss": at["random"]}, ENERGY: {"loss": at["energy"]},
            LAYERS: {"loss": at["layers"]},
        })  # fmt: skip
    return conclude(outcomes(papers.load("drrl"), seeds))


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ({}, Verdict.HOLDS),
        ({"fixed": 1.90, "layers": 1.90}, Verdict.REFUTED),  # one rank everywhere
        ({"layers": 1.90}, Verdict.REFUTED),  # a rank for each layer
        ({"fixed": 1.90, "layers": 1.91}, Verdict.REFUTED),  # badly chosen layers are no excuse
        ({"energy": 1.90}, Verdict.REFUTED),
        ({"layers": 1.90 - 1e-9}, Verdict.REFUTED),  # rounding on either side
        ({"layers": 1.90 + 1e-9}, Verdict.REFUTED),
        ({"full": 1.87}, Verdict.INCONCLUSIVE),  # more than 2% of perplexity
        ({"full": 2.5}, Verdict.INCONCLUSIVE),  # nothing was learnt
    ],
)
def test_a_tie_with_a_rule_refutes(losses, verdict):
    assert told(**losses) == verdict


def test_layers_ranks_are_the_best_as_a_whole_not_by_their_sum():
    class Counted(Bench):
        """Ranks cost what they lack; (8, 40, 40, 48) is worth more together than alone."""

        def __init__(self):
            self.trial = papers.harness.Trial("decoder", 0)

        def measure(self, text, split="test"):
            ranks = [64] * 4
            if isinstance(text, list):
                for i, one in enumerate(text):
                    if one != "full":
                        ranks[i] = int(one.split("rank=")[1].split(",")[0])
            elif text != "full":
                ranks = [int(r) for r in text.split("(")[2].split(")")[0].split(",")]
            lost = sum((64 - r) ** 2 * (1 + i) for i, r in enumerate(ranks))
            return lost - (1e4 if ranks == [8, 40, 40, 48] else 0), sum(ranks) / 4

    best = Counted().by_layer()
    assert best(34) == (at_rank(34.0, best, 2), 34.0)
    want = 56**2 + 2 * 24**2 + 3 * 24**2 + 4 * 16**2 - 1e4  # alone the second best
    assert best(34)[0] == want
