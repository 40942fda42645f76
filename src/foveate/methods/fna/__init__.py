"""Neighborhood attention: fused over multi-axis tiles, unfused as products over windows, naive."""

from foveate.methods.fna.naive import naive
from foveate.methods.fna.pattern import FNA
from foveate.methods.fna.unfused import unfused

__all__ = ["FNA", "naive", "unfused"]
