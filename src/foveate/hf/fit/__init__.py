"""Fitting methods on a transformers model, and finding again what was fitted."""
