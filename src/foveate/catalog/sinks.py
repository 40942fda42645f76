"""Attentions without sinks, with redistributed ones, and a pattern for each head of a model."""

from __future__ import annotations

from foveate.catalog.patterns import MINFERENCE, SINKS
from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

QUANTIZABLE = Paper(
    "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
    "Bondarenko et al., 2023",
    "2306.12929",
)

SOFTPICK = Paper(
    "Softpick: No Attention Sink, No Massive Activations with Rectified Softmax",
    "Zuhri et al., 2025",
    "2504.20966",
)

SIGMOID = Paper(
    "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    "Ramapuram et al., 2024",
    "2409.04431",
)

EMERGES = Paper(
    "When Attention Sink Emerges in Language Models: An Empirical View",
    "Gu et al., 2024",
    "2410.10781",
)

SPARSEMAX = Paper(
    "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
    "Martins and Astudillo, 2016",
    "1602.02068",
)

ENTMAX = Paper("Sparse Sequence-to-Sequence Models", "Peters et al., 2019", "1905.05702")

ACT = Paper(
    "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without "
    "Training through Attention Calibration",
    "Yu et al., 2024",
    "2406.15765",
)


def _normaliser(key: str, name: str, title: str, summary: str, *papers: Paper) -> Row:
    return Row(
        key=key,
        kind="attention",
        path=f"foveate.methods.sinks.{name}",
        title=title,
        summary=summary,
        papers=(*papers, SINKS),
        miniature="attention-sink",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    )


ROWS: tuple[Row, ...] = (
    _normaliser(
        "clipped-softmax", "ClippedSoftmax", "Clipped softmax",
        "A softmax stretched and clipped, so that weights reach 0 and 1; over any pattern.",
        QUANTIZABLE,
    ),
    _normaliser(
        "softpick", "Softpick", "Softpick",
        "A rectified softmax: no weight for scores that aren't positive; over any pattern.",
        SOFTPICK,
    ),
    _normaliser(
        "sigmoid-attention", "SigmoidAttention", "Sigmoid attention",
        "Each pair's weight on its own, with no sum over the row; over any pattern.",
        SIGMOID, EMERGES,
    ),
    _normaliser(
        "elu-attention", "EluAttention", "ELU + 1 attention",
        "elu(s) + 1 as a pair's weight, or as a kernel on queries and keys; not normalised.",
        EMERGES,
    ),
    _normaliser(
        "entmax", "Entmax", "Sparsemax and 1.5-entmax",
        "Rows sum to one with most weights exactly 0; over any pattern.",
        SPARSEMAX, ENTMAX,
    ),
    Row(
        key="act",
        kind="attention",
        path="foveate.methods.sinks.Redistribution",
        title="Redistribution (ACT)",
        summary="Sinks beyond the first token keep a part of their mass; the rest goes to the "
        "other keys.",
        papers=(ACT, SINKS),
        miniature="attention-sink",
        capabilities=Capabilities(
            decode=Support(True, "the sinks are those of the call's own queries"),
            causal_routing=Support(False, "all queries of the call say which keys are sinks"),
        ),
        jobs=("compare", "use", "Attention", "train"),
    ),
    Row(
        key="by-head",
        kind="attention",
        path="foveate.methods.by_head.ByHead",
        title="A pattern for each head",
        summary="Each layer and head runs what a file names for it, such as foveate inspect's "
        "suggestion.",
        papers=(MINFERENCE, SINKS),
        miniature="attention-sink",
        capabilities=Capabilities(),
        jobs=("compare", "use", "inspect"),
    ),
)  # fmt: skip
