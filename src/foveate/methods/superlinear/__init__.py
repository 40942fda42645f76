"""Superlinear attention: a search among anchors, then attention in the spans that were found."""

from foveate.methods.superlinear.attention import MultiStep, Superlinear

__all__ = ["MultiStep", "Superlinear"]
