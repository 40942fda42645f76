"""Backends that are wrong in one way each, and a short pace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typing_extensions import override

from foveate.ops.backends.base import Backend, Inputs
from foveate.ops.backends.reference import Reference
from foveate.ops.dispatch import BACKENDS
from foveate.ops.types import AttentionOutput
from foveate.runs.timing import Pace

Spoil = Callable[[AttentionOutput], AttentionOutput]


class Spoilt(Backend):
    """The reference with its result spoilt."""

    name = "spoilt"
    composite = True

    def __init__(self, spoil: Spoil) -> None:
        self.spoil = spoil

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        return self.spoil(Reference().forward(inputs))


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Put a spoilt backend among the others, or in the place of one; returns its name."""

    def put(spoil: Spoil, name: str = "spoilt") -> str:
        monkeypatch.setitem(BACKENDS, name, Spoilt(spoil))
        return name

    return put


@pytest.fixture
def pace() -> Pace:
    """As short as can be."""
    return Pace(repeats=3, sample=1e-6)
