"""Small SEA attentions and their inputs, for tests."""

from __future__ import annotations

import torch

from foveate import Context, causal
from foveate.methods.sea import SEA
from foveate.parts import Heads

CAUSAL = Context(mask=causal())


def built(heads=4, kv=2, dim=16, value=16, dtype=torch.float64, form="causal", **fields):
    fields = {"k": 6, "width": 16, "divisor": 2.0, "max_length": 256} | fields
    recipe = SEA(causal=form == "causal", **fields)
    made = recipe.build(Heads(32, heads, kv, dim, value)).to(dtype).eval()
    return made


def tensors(length, batch=2, heads=4, kv=2, dim=16, value=16, dtype=torch.float64):
    shapes = (batch, heads, length, dim), (batch, kv, length, dim), (batch, kv, length, value)
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def context(form):
    return Context(mask=causal()) if form == "causal" else Context()


def open_gates(method):
    """Let all of the sparse context through, and nothing of the average."""
    gates = method.estimator.encoder.gates
    gates.weight.data.zero_()
    gates.bias.data.fill_(50.0)
    return method
