"""Attention inside recommenders."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

WANG = Paper(
    "KGAT: Knowledge Graph Attention Network for Recommendation", "Wang et al., 2019", "1905.07854"
)
ZHU = Paper(
    "Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for "
    "Sequential Recommendation",
    "Zhu et al., 2024",
    "2311.01056",
)

EDGES = Support(False, "attends over a graph's edges, which have no order and no heads")
OWN = "in its own recommender"

ROWS: tuple[Row, ...] = (
    Row(
        key="kgat",
        kind="module",
        path="foveate.methods.kgat.KGAT",
        title="Knowledge graph attention (KGAT)",
        summary="Users, items and what is known of items pass messages along weighted edges.",
        papers=(WANG,),
        miniature="kgat",
        capabilities=Capabilities(
            prefill=EDGES,
            decode=EDGES,
            gqa=EDGES,
            padding=EDGES,
            causal_outputs=EDGES,
            causal_routing=EDGES,
        ),
        jobs=("recommend",),
    ),
    Row(
        key="mqsa-ted",
        kind="module",
        path="foveate.methods.mqsa_ted.MQSATED",
        title="Window queries, distilled transitions (MQSA-TED)",
        summary="The mean of the last items asks beside the last one; counted steps teach vectors.",
        papers=(ZHU,),
        miniature="mqsa-ted",
        capabilities=Capabilities(
            prefill=Support(True, OWN),
            decode=Support(True, "item by item, at places that are fixed"),
            gqa=Support(False, "keys have a head for each query head"),
            bidirectional=Support(False, "a sequence is read in order of time"),
        ),
        jobs=("recommend",),
    ),
)
