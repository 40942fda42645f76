"""Deconstructed attention: variants that each drop one of its design principles."""

from foveate.methods.deconstructing.mlp import DeconstructedMLP

__all__ = ["DeconstructedMLP"]
