"""Runs a miniature cell by cell, keeps every finished one, and judges what they show."""

from foveate.papers.harness.either import either
from foveate.papers.harness.paper import (
    Check,
    Found,
    Grid,
    Paper,
    Trial,
    at_least,
    at_most,
    difference,
    ratio,
)
from foveate.papers.harness.statistics import Verdict

__all__ = [
    "Check", "Found", "Grid", "Paper", "Trial", "Verdict", "at_least", "at_most", "difference",
    "either", "ratio",
]  # fmt: skip
