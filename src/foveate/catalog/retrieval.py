"""Retrievers: what is kept of texts so that questions find them."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

COLBERTER = Paper(
    "Introducing Neural Bag of Whole-Words with ColBERTer: Contextualized Late Interactions using "
    "Enhanced Reduction",
    "Hofstätter et al., 2022",
    "2203.13088",
)

NO_DECODE = Support(False, "texts are encoded whole")
NO_KV = Support(False, "stands behind an encoder, has no heads")
BOTH_WAYS = Support(False, "encodes texts in both directions")

ROWS: tuple[Row, ...] = (
    Row(
        key="colberter",
        kind="retriever",
        path="foveate.methods.colberter.head.Colberter",
        title="Bag of whole words (ColBERTer)",
        summary="One vector to find a text by, one small vector for each of its words to rank it.",
        papers=(COLBERTER,),
        miniature="colberter",
        capabilities=Capabilities(
            decode=NO_DECODE, gqa=NO_KV, causal_outputs=BOTH_WAYS, causal_routing=BOTH_WAYS
        ),
        jobs=("index", "search"),
    ),
)
