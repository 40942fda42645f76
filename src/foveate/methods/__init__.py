"""The methods: one file per paper, found by key through `foveate.catalog`."""

from foveate.methods.naming import make, make_all, make_attention, spec, split

__all__ = ["make", "make_all", "make_attention", "spec", "split"]
