"""Instruments that look into a model: what its attention does, what its heads say to each other."""
