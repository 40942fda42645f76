"""Small Combiners of every kind and their inputs, for tests."""

from __future__ import annotations

import combiner_reference as by
import pytest
import torch

from foveate import Context, causal
from foveate.methods.combiner import Combiner
from foveate.parts import Heads

CAUSAL = Context(mask=causal())
LISTS = {
    "fixed": by.blocks(5),
    "logsparse": by.logsparse,
    "vertical": by.vertical(5),
    "horizontal": by.horizontal(5),
}
LENGTH = 37
FORMS = pytest.mark.parametrize("form", ["causal", "bidirectional"])


def built(q, k, v, **fields):
    fields = {"size": 5} | fields
    heads = Heads(32, q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    return Combiner(**fields).build(heads).to(q.dtype).eval()


def tensors(length=LENGTH, batch=2, dtype=torch.float64, dim=4, group=2):
    shapes = ((batch, 2 * group, length, dim), (batch, 2, length, dim), (batch, 2, length, 3))
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def context(form):
    return Context(mask=causal()) if form == "causal" else Context()


EVERY = [
    {"partition": "fixed"},
    {"partition": "logsparse"},
    {"partition": "vertical"},
    {"partition": "horizontal"},
    {"partition": "mixture"},
    {"partition": "mixture", "mixture": "joint"},
    {"partition": "rowmajor", "key": "wsum"},
    {"partition": "rowmajor", "key": "none"},
    {"partition": "rowmajor", "key": "proj"},
    {"partition": "learnable", "clusters": 4},
    {"partition": ["fixed", "logsparse"]},
    {"partition": "vertical", "pooling": "relu-mean", "span_count_bias": True},
    {"partition": "logsparse", "pooling": "identity-mean", "span_count_bias": True},
    {"partition": "horizontal", "pooling": "deepsets-sum", "span_count_bias": True},
    {"partition": "fixed", "pooling": "deepsets-mean", "span_count_bias": True},
    {"partition": "learnable", "pooling": "identity-mean", "span_count_bias": True},
]
ALL = pytest.mark.parametrize("fields", EVERY, ids=lambda f: "-".join(str(v) for v in f.values()))
