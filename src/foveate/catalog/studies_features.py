"""What one attention layer can learn: a study, and the score type that it uses."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

FU = Paper(
    "What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
    "Fu et al., 2023",
    "2307.11353",
)

FITTED = Support(False, "is fitted to examples of one query and its keys")

ROWS: tuple[Row, ...] = (
    Row(
        key="relu-mean",
        kind="attention",
        path="foveate.methods.random_features.ReluMean",
        title="ReLU and a mean",
        summary="ReLU of the scores over the number of keys, in the softmax's place.",
        papers=(FU,),
        miniature="random-features",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="random-features",
        kind="study",
        path="foveate.methods.random_features.RandomFeatures",
        title="Random-feature attention",
        summary="A layer with frozen random query-key maps, whose values are fitted in one step.",
        papers=(FU,),
        miniature="random-features",
        capabilities=Capabilities(
            decode=FITTED,
            gqa=Support(False, "has no key/value heads"),
            bidirectional=Support(True, "the order of keys doesn't count"),
            causal_outputs=FITTED,
            causal_routing=FITTED,
        ),
        jobs=("reproduce",),
    ),
)
