"""SEA's counted work: linear in the length, and true of what runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.methods.sea import SEA
from foveate.methods.sea.compress import budgets, keep_best
from foveate.methods.sea.counts import flops
from foveate.methods.sea.layout import Stretch, layout_of
from foveate.parts import Heads
from foveate.parts.growth import exponent

LENGTHS = tuple(1024 << n for n in range(7))
HEADS = Heads(128, 4, 4, 32, 32)


def mask_sizes(lengths, k=16, width=256, heads=4):
    """(pairs, tile area) of layouts of smooth random estimates; at least a bin is kept in a row, so
    that beyond H k K tokens (16,384 here) masks would grow faster."""  # fmt: skip
    found = []
    for length in lengths:
        drawn = torch.randn(1, heads, length // 32 + 2, width)
        smooth = torch.nn.functional.interpolate(drawn, (length, width), mode="bilinear")
        seen = torch.arange(1, length + 1)[None]
        budget = budgets(k, seen, width, heads, "causal_batch", length)
        keep = keep_best(smooth.softmax(-1), budget, "causal_batch")
        layout = layout_of(keep, Stretch(seen, torch.zeros(1).long(), length))
        found.append((layout.pairs, layout.tile_area))
    return found


def test_masks_grow_linearly():
    lengths = (1024, 2048, 4096, 8192)
    sizes = mask_sizes(lengths)
    for length, (pairs, _) in zip(lengths, sizes):
        assert pairs / length == pytest.approx(16, rel=0.1)
    assert exponent(lengths, [pairs for pairs, _ in sizes]) == pytest.approx(1, abs=0.05)
    # Short rows drift through their narrow bins within a tile, so that tiles grow even less.
    assert exponent(lengths, [area for _, area in sizes]) < 1.05


def test_counted_flops_grow_linearly():
    work = [flops(SEA(k=64, width=256), HEADS, n).total for n in LENGTHS]
    assert exponent(LENGTHS, work) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_the_estimators_flops_are_what_torch_counts(causal):
    recipe = SEA(k=8, width=64, divisor=2.0, causal=causal, max_length=256)
    made = recipe.build(HEADS).estimator
    q, k, v = torch.randn(3, 1, 4, 256, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if causal:
            past = made.new_past(v, 1, torch.float32)
            made.causally(q, k, v, torch.arange(256)[None], past)
        else:
            made.at_once(q, k, v)
    counted = flops(recipe, HEADS, 256).estimator
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)
