"""Deconstructed attention: variants that each drop one of its design principles, and hybrids."""

from foveate.methods.deconstructing.approximate import Approximate
from foveate.methods.deconstructing.indicators import Indicators, indicators, matrix_of
from foveate.methods.deconstructing.mlp import DeconstructedMLP
from foveate.methods.deconstructing.nonapproximate import NonApproximate
from foveate.methods.deconstructing.plan import RATIOS, VARIANTS, composed, standard_layers
from foveate.methods.deconstructing.streams import FixedSeqQK, RndEmbQK, StaticEmbQK

__all__ = [
    "RATIOS",
    "VARIANTS",
    "Approximate",
    "DeconstructedMLP",
    "FixedSeqQK",
    "Indicators",
    "NonApproximate",
    "RndEmbQK",
    "StaticEmbQK",
    "composed",
    "indicators",
    "matrix_of",
    "standard_layers",
]
