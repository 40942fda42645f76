"""Instruments that look into a model: what its heads say to each other, and why it recalls."""
