"""LUCID: attention over values that were decorrelated first; arXiv 2602.10410."""

from foveate.methods.lucid.method import Lucid
from foveate.methods.lucid.solve import entries, normalised, solve
from foveate.methods.lucid.triangle import Triangle, triangle

__all__ = ["Lucid", "Triangle", "entries", "normalised", "solve", "triangle"]
