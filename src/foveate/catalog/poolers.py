"""How the tokens of a text become one vector."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

LAMA = Paper(
    "Low Rank Factorization for Compact Multi-Head Self-Attention",
    "Mehta et al., 2019",
    "1912.00835",
)
LIN = Paper("A Structured Self-attentive Sentence Embedding", "Lin et al., 2017", "1703.03130")

POOLS = Support(False, "pools a whole text")
NO_KV = Support(False, "has no key/value heads")
ENCODERS = ("FoveateEncoderConfig(pooling=...)", "classify")

ROWS: tuple[Row, ...] = (
    Row(
        key="lama",
        kind="pooler",
        path="foveate.methods.lama.LAMA",
        title="Low-rank attentive pooling (LAMA)",
        summary="Many weightings of a text's words by rank-1 forms with one context vector.",
        papers=(LAMA,),
        miniature="lama",
        capabilities=Capabilities(
            decode=Support(True, "prefix by prefix from sums, where the context is learned"),
            gqa=NO_KV,
        ),
        jobs=ENCODERS,
    ),
    Row(
        key="self-attentive",
        kind="pooler",
        path="foveate.methods.lama.SelfAttentive",
        title="Self-attentive pooling",
        summary="Many weightings of a text's words by a small network.",
        papers=(LIN,),
        miniature="lama",
        capabilities=Capabilities(
            decode=POOLS, gqa=NO_KV, causal_outputs=POOLS, causal_routing=POOLS
        ),
        jobs=ENCODERS,
    ),
)
