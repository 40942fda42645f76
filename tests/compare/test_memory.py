"""Peak memory is the work's own: seen in full, and forgotten when the work is over."""

import pytest
import torch

from foveate.runs.memory import Peak, how

CPU = torch.device("cpu")
MB = 1_000_000

pytestmark = [
    pytest.mark.skipif(not how(CPU), reason="the kernel's peak can't be reset here"),
    pytest.mark.plain_empty,
]


def peak_of(megabytes):
    with Peak(CPU) as peak:
        x = torch.ones(megabytes * MB // 4)
        del x
    return peak.bytes


def test_an_allocation_is_seen_even_if_it_is_gone_at_the_end():
    peak_of(8)
    assert 190 * MB < peak_of(200) < 240 * MB


def test_an_earlier_peak_is_not_seen_again():
    assert peak_of(200) > 150 * MB
    assert peak_of(20) < 60 * MB


def test_what_is_held_before_is_not_counted():
    held = torch.ones(100 * MB // 4)
    assert peak_of(20) < 60 * MB
    assert held.sum() > 0


def test_many_small_allocations_count_as_well():
    with Peak(CPU) as peak:
        pieces = [torch.ones(25_000) for _ in range(1000)]
    assert len(pieces) == 1000
    assert 90 * MB < peak.bytes < 150 * MB
