"""Attention whose work is chosen as it runs, or shared between layers."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

ECHOATT = Paper(
    "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
    "Rajabzadeh et al., 2024",
    "2409.14595",
)

ROWS: tuple[Row, ...] = (
    Row(
        key="echoatt",
        kind="attention",
        path="foveate.methods.echoatt.EchoAtt",
        title="EchoAtt",
        summary="Layers whose attention maps are alike copy one, and lose their queries and keys.",
        papers=(ECHOATT,),
        sheet="echoatt",
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
        sheet="echoatt",
        capabilities=Capabilities(),
        jobs=("Attention",),
    ),
)
