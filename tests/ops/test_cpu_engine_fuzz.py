"""Any call to the C++ engine, forward and backward: what a coverage-guided fuzzer runs too."""

from __future__ import annotations

import engines
import pytest
import torch
from calls import Case, cases
from hypothesis import given
from test_cpu_engine import FUZZ, kernel_sets

from foveate.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason())
SETS = kernel_sets()


@pytest.mark.parametrize("kernels", SETS[-2:])
@given(case=cases())
@FUZZ
def test_any_call(kernels: str, case: Case) -> None:
    cpu.use(kernels)
    check(case)


def check(case: Case) -> None:
    """A call against float64, its gradients, and once more with NaN where nobody looks."""
    q, k, v = case.q, case.k, case.v
    allowed = case.allowed
    given = (case.layout, case.scale, case.softcap, case.bias, case.bias_first)
    torch.manual_seed(0)  # gradients are drawn
    torch.set_num_threads(case.threads)
    try:
        engines.compare(
            cpu, q, k, v, case.layout, allowed, case.softcap, case.bias, case.scale, case.bias_first
        )
        engines.compare_gradients(
            cpu, q, k, v, case.layout, allowed, case.softcap, case.bias, scale=case.scale,
            bias_first=case.bias_first,
        )  # fmt: skip
        unseen = ~allowed.flatten(0, 2).any(0)
        if unseen.any():
            want = cpu.forward(q, k, v, *given)
            k, v = k.clone(), v.clone()
            k[:, :, unseen] = torch.nan
            v[:, :, unseen] = torch.nan
            for found, right in zip(cpu.forward(q, k, v, *given), want):
                torch.testing.assert_close(found, right)
    finally:
        torch.set_num_threads(1)
