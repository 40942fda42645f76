"""Gaussian adaptive attention (GAAM): a learnt gate on features far from their group's mean."""

from foveate.methods.gaam.gate import GaussianGate
from foveate.methods.gaam.importance import Importance, importance_factor
from foveate.methods.gaam.mixer import GAAM, GaussianMixer

__all__ = ["GAAM", "GaussianGate", "GaussianMixer", "Importance", "importance_factor"]
