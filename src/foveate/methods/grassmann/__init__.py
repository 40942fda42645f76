"""Causal Grassmann layers: tokens mixed by the planes that pairs of them span."""

from foveate.methods.grassmann.mixer import Grassmann, GrassmannMixer, GrassmannState
from foveate.methods.grassmann.planes import mean_features, normalised, plucker

__all__ = [
    "Grassmann",
    "GrassmannMixer",
    "GrassmannState",
    "mean_features",
    "normalised",
    "plucker",
]
