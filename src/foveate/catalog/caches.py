"""Policies that drop keys from a decoder's cache: their papers and rows."""

from __future__ import annotations

from foveate.catalog.patterns import SINKS
from foveate.catalog.row import Capabilities, Paper, Row, Support

SNAPKV = Paper(
    "SnapKV: LLM Knows What You are Looking for Before Generation", "Li et al., 2024", "2404.14469"
)

H2O = Paper(
    "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    "Zhang et al., 2023",
    "2306.14048",
)

# What works, and where: a policy is dense attention, which cuts its layer's cache.
CUTS = Capabilities(
    prefill=Support(True, "dense; the cache is cut after it"),
    padding=Support(True, "on the left, as in generation"),
    bidirectional=Support(True, "dense: an encoder has no cache to cut"),
)

ROWS: tuple[Row, ...] = (
    Row(
        key="snapkv",
        kind="pattern",
        path="foveate.methods.snapkv.SnapKV",
        title="SnapKV",
        summary="After the prompt each head keeps the keys that its last queries attend to.",
        papers=(SNAPKV, SINKS),
        miniature="attention-sink",
        capabilities=CUTS,
    ),
    Row(
        key="h2o",
        kind="pattern",
        path="foveate.methods.h2o.H2O",
        title="H2O",
        summary="The cache keeps the newest keys and those that were attended to most so far.",
        papers=(H2O, SINKS),
        miniature="attention-sink",
        capabilities=CUTS,
    ),
)
