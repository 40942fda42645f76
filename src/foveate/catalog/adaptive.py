"""Attention whose work is chosen as it runs, or shared between layers."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

ECHOATT = Paper(
    "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
    "Rajabzadeh et al., 2024",
    "2409.14595",
)

ERDEN = Paper(
    "Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self Attention in Large "
    "Language Models",
    "Erden, 2025",
    "2512.15973",
)

ROWS: tuple[Row, ...] = (
    Row(
        key="drrl",
        kind="attention",
        path="foveate.methods.drrl.DRRL",
        title="DR-RL",
        summary="Scores of low rank; a policy or a rule picks the rank of each layer and segment.",
        papers=(ERDEN,),
        miniature="drrl",
        capabilities=Capabilities(
            decode=Support(True, "reads r numbers of each key, from a state of a layer's own"),
            padding=Support(True, "in front or behind; other masks are refused"),
            bidirectional=Support(True, "form='whole', in which every token shapes the basis"),
            causal_routing=Support(
                True, "form='whole' sees later tokens through its basis, as published"
            ),
        ),
        jobs=(*BUILDERS, "use", "compare"),
    ),
    Row(
        key="echoatt",
        kind="attention",
        path="foveate.methods.echoatt.EchoAtt",
        title="EchoAtt",
        summary="Layers whose attention maps are alike copy one, and lose their queries and keys.",
        papers=(ECHOATT,),
        miniature="echoatt",
        capabilities=Capabilities(
            decode=Support(True, "a follower caches values alone, built with echoatt-values"),
        ),
        jobs=(*BUILDERS, "use", "compare", "fit", "compress"),
    ),
    Row(
        key="echoatt-values",
        kind="values",
        path="foveate.methods.echoatt.EchoValues",
        title="Values of a follower (EchoAtt)",
        summary="The projection of a layer that copies another one's map: no queries, no keys.",
        papers=(ECHOATT,),
        miniature="echoatt",
        capabilities=Capabilities(),
        jobs=("Attention",),
    ),
)
