"""Latent attention: MLA, and TPLA and GLA, which split its latent over devices."""

from foveate.methods.tpla.align import align
from foveate.methods.tpla.basis import Basis, find_basis, hadamard, orthogonal_basis
from foveate.methods.tpla.convert import fold_gain, rebase, to_tpla
from foveate.methods.tpla.mla import MLA, MLAProjection
from foveate.methods.tpla.sharded import TPLA, TPLAProjection

__all__ = [
    "MLA",
    "TPLA",
    "Basis",
    "MLAProjection",
    "TPLAProjection",
    "align",
    "find_basis",
    "fold_gain",
    "hadamard",
    "orthogonal_basis",
    "rebase",
    "to_tpla",
]
