"""Rows from records, and the answer from rows, on figures made by hand."""

import math

import pytest
import torch

from foveate.compare.plan import entries_of
from foveate.compare.recommend import faults, recommend
from foveate.compare.summary import Spread, summarise
from foveate.compare.table import COLUMNS, cells, columns_for, line, markdown

LOADING = "model = load()"


def record(ratio=2.0, seconds=1.0, loss=0.0, found=1, dense_found=1, error=1e-7, **changes):
    """A pass: dense took ratio * seconds; quality over 1,000 tokens."""
    values = {
        "dense_seconds": ratio * seconds,
        "seconds": seconds,
        "dense_attention_seconds": 0.5 * ratio * seconds,
        "attention_seconds": 0.2 * seconds,
        "build_seconds": 0.01,
        "pairs": 40.0,
        "mask_pairs": 100.0,
        "area": 50.0,
        "mask_area": 200.0,
        "peak_bytes": 5_000_000,
        "dense_peak_bytes": 9_000_000,
        "cache_bytes": 1000,
        "dense_cache_bytes": 1000,
        "decode_seconds": 0.1,
        "dense_decode_seconds": 0.05,
        "quality": {
            "tokens": 1000.0,
            "kl": 20.0,
            "agree": 900.0,
            "nll_dense": 3000.0,
            "nll": 3000.0 + 1000 * math.log1p(loss),
            "nll_difference_squared": 1000 * (math.log1p(loss) ** 2 + 0.04),
            "max_logit": 20.0,
            "max_difference": 1e-5,
        },
        "check": {"error": error, "problems": []},
        "needle": {"keys": ["12345"], "found": [found], "dense_found": [dense_found]},
    }
    return values | changes


def row(name="sink-window", length=1024, passes=3, **settings):
    entry = entries_of([name])[0]
    records = [record(**settings) for _ in range(passes)]
    return summarise(entry, length, records, torch.float32)


def answer(rows, max_loss=0.01, max_needle_loss=0.0):
    return recommend(rows, max_loss=max_loss, max_needle_loss=max_needle_loss, loading=LOADING)


def test_the_figures_of_a_row():
    made = row(loss=0.02)
    assert made.passed
    assert made.prefill == Spread(2.0, 2.0, 2.0)
    assert made.decode.middle == 0.5
    assert made.kl == pytest.approx(0.02)
    assert made.agreement == pytest.approx(0.9)
    assert made.dense_perplexity == pytest.approx(math.exp(3))
    assert made.perplexity == pytest.approx(1.02 * math.exp(3))
    assert made.loss == pytest.approx(0.02)
    assert made.loss_error == pytest.approx(1.02 * 0.2 / math.sqrt(3000))
    assert (made.found, made.hidden, made.dense_found) == (3, 3, 3)
    assert made.peak_bytes == 5_000_000
    # dense 2.0 s, of which 1.0 attention; a quarter of the tiles: ideal attention 0.25 s
    assert made.area == 0.25
    assert made.pairs == 0.4
    assert made.ideal_attention == pytest.approx(4.0)
    assert made.ideal_prefill == pytest.approx(2.0 / 1.25)
    assert made.realised.middle == pytest.approx(0.25 / 0.2)
    assert made.realised_prefill.middle == pytest.approx(1.25)


def test_a_speed_is_the_median_of_paired_ratios_with_its_spread():
    entry = entries_of(["sink-window"])[0]
    records = [record(ratio=r, seconds=s) for r, s in ((1.1, 9.0), (3.0, 1.0), (1.4, 5.0))]
    made = summarise(entry, 64, records, torch.float32)
    assert made.prefill == Spread(pytest.approx(1.4), pytest.approx(1.1), pytest.approx(3.0))


@pytest.mark.parametrize("error", [1e-3, None, 1e30])
def test_no_speed_without_a_passed_check(error):
    made = row(error=error)
    assert not made.passed
    assert made.prefill is made.decode is made.realised is made.ideal_prefill is None
    assert made.prefill_seconds is made.build_seconds is None
    assert made.kl is not None
    texts = dict(zip(COLUMNS, cells(made, list(COLUMNS))))
    assert texts["prefill"] == texts["decode"] == texts["ideal"] == "–"
    assert texts["check"] == "FAILED"
    assert "no speed is shown" in line(made)
    assert "off by" in markdown([made], "t", [])


def test_one_failed_check_among_the_passes_is_enough():
    entry = entries_of(["sink-window"])[0]
    records = [record(), record(error=1.0), record()]
    assert not summarise(entry, 64, records, torch.float32).passed


def test_nothing_is_shown_before_the_check_was_made():
    entry = entries_of(["sink-window"])[0]
    unchecked = record()
    del unchecked["check"]
    made = summarise(entry, 64, [unchecked], torch.float32)
    assert (made.passed, made.prefill) == (False, None)


def test_the_fastest_that_loses_little_enough_wins():
    rows = [
        row("full", ratio=1.05),
        row("sink-window", ratio=3.0, loss=0.02),
        row("a-shape", ratio=1.5, loss=0.009),
        row("block-sparse", ratio=1.4, loss=0.0),
    ]
    got = answer(rows)
    assert got.use == "a-shape"
    assert got.code == f'import foveate\n{LOADING}\nfoveate.use(model, "a-shape")'
    assert "first 128 tokens, last 1,024 tokens" in got.sentence
    assert answer(rows, max_loss=0.03).use == "sink-window"
    assert answer(rows, max_loss=0.005).use == "block-sparse"
    assert answer(rows[:2], max_loss=0.005).use == "full"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"loss": 0.011}, "perplexity"),
        ({"found": 0}, "finds 0 of 3"),
        ({"ratio": 0.9}, "not clearly faster"),
        ({"ratio": 1.0}, "not clearly faster"),
        ({"ratio": 1.02}, "not clearly faster"),
        ({"passes": 2}, "2 pairs are too few"),
        ({"error": 1.0}, "check failed"),
        ({"loss": float("nan")}, "perplexity"),
    ],
)
def test_what_stands_in_the_way_is_told_and_dense_stays(settings, why):
    made = row(**settings)
    assert why in " ".join(faults(made, 0.01, 0.0))
    got = answer([made])
    assert got.use == "dense"
    assert got.sentence.startswith("At 1,024 tokens stay dense")
    assert got.code.startswith(LOADING)
    assert "use(" not in got.code


def test_a_gain_that_one_pair_denies_is_none():
    entry = entries_of(["sink-window"])[0]
    records = [record(ratio=r) for r in (1.5, 0.97, 1.6)]
    assert answer([summarise(entry, 64, records, torch.float32)]).use == "dense"


def test_keys_that_dense_misses_as_well_are_no_loss():
    rows = [row(found=0, dense_found=0)]
    got = answer(rows)
    assert got.use == "sink-window"
    assert "Dense itself finds no key at 1,024" in got.sentence
    assert answer([row(found=0)], max_needle_loss=1.0).use == "sink-window"


def test_lengths_that_differ_are_told():
    rows = [row(length=1024, ratio=0.8), row(length=4096, ratio=1.8)]
    got = answer(rows)
    assert got.use == "sink-window"
    assert "at 1,024 stay dense" in got.sentence
    assert [v.use for v in got.verdicts] == ["dense", "sink-window"]
    same = answer([row(length=1024), row(length=4096)])
    assert "differs" not in same.sentence


def policy(name, kl, loss, cache=250):
    """A method that drops keys, with this KL over the 1,000 tokens of each pass."""
    values = record(ratio=1.0, loss=loss, cache_bytes=cache)
    values["quality"] = values["quality"] | {"kl": 1000 * kl}
    return summarise(entries_of([name])[0], 1024, [values] * 3, torch.float32)


def test_a_smaller_cache_is_named_if_what_it_decodes_stays_near_dense():
    good = policy("snapkv(budget=512)", kl=0.004, loss=0.003)
    smaller = policy("h2o(heavy=64, recent=64)", kl=0.009, loss=0.009, cache=125)
    text = answer([row(ratio=1.0), good]).sentence
    assert "snapkv(budget=512) holds 25% of dense's" in text
    assert "perplexity +0.30%" in text
    assert "h2o(heavy=64, recent=64) holds 12%" in answer([good, smaller]).sentence


@pytest.mark.parametrize("loss", [-0.4, 0.0])
def test_luck_with_the_tokens_that_came_names_no_smaller_cache(loss):
    """Perplexity was no higher, and yet the method says something else than dense."""
    lucky = policy("h2o(heavy=64, recent=64)", kl=3.8, loss=loss, cache=125)
    text = answer([row(ratio=1.0), lucky]).sentence
    assert "No method that drops keys from the cache stays within the limits." in text
    assert "The nearest is h2o(heavy=64, recent=64), but KL 3.8 (limit 0.01)." in text
    good = policy("snapkv(budget=512)", kl=0.004, loss=0.003)
    assert "For a smaller cache, snapkv(budget=512)" in answer([lucky, good]).sentence
    assert "For a smaller cache, h2o" in answer([lucky], max_loss=50.0).sentence
    unknown = policy("snapkv(budget=512)", kl=float("nan"), loss=0.0)
    assert answer([unknown]).sentence.endswith("stays within the limits.")


def test_an_encoder_is_judged_by_its_states():
    entry = entries_of(["sink-window"])[0]
    states = {"tokens": 10.0, "cosine": 9.95, "worst_cosine": 0.9, "error_squared": 1.0,
              "norm_squared": 100.0}  # fmt: skip
    values = record()
    del values["quality"], values["needle"]
    made = summarise(entry, 512, [values | {"states": states}] * 3, torch.float32)
    assert made.cosine == pytest.approx(0.995)
    assert made.state_error == pytest.approx(0.1)
    assert made.quality_loss == pytest.approx(0.005)
    assert answer([made]).use == "sink-window"
    assert answer([made], max_loss=0.001).use == "dense"
    names = columns_for([made], full=False)
    assert "cosine" in names
    assert not {"kl", "loss", "needle"} & set(names)


def test_every_column_says_what_it_means():
    made = row()
    text = markdown([made], "Title", ["a note"])
    for name in columns_for([made], full=True):
        assert COLUMNS[name].meaning in text
    assert text.startswith("# Title\n")
    assert "- a note" in text
