"""Flux: full or sparse attention, layer by layer, as the prompt asks for; arXiv 2604.07394."""

from foveate.methods.flux.pattern import Flux
from foveate.methods.flux.router import LayerRouter, Routers

__all__ = ["Flux", "LayerRouter", "Routers"]
