"""The loop of a fit."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.parts import fit_loop


class Kept:
    """A state that remembers what was saved."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        return None

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.saved.append(len(facts["history"]))


def test_freed_memory_goes_back_to_the_system_at_each_saving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, gave, module = Kept(), [], nn.Linear(2, 2)

    def trim(kept: int) -> int:
        gave.append((kept, list(state.saved)))
        return 1

    monkeypatch.setattr(fit_loop, "_trim", lambda: trim)
    optimizer = torch.optim.AdamW(module.parameters())
    fit_loop.loop(
        module, optimizer, lambda number: {"loss": 1.0}, 7, lambda share, said: None, state, every=3
    )
    assert gave == [(0, [3]), (0, [3, 6]), (0, [3, 6, 7])]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_glibc_is_asked() -> None:
    trim = fit_loop._trim()
    assert trim is not None
    assert trim(0) in (0, 1)
