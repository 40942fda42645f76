"""Studies: instruments that look into models. They run beside an attention, not in its place."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

MERULLO = Paper(
    "Talking Heads: Understanding Inter-layer Communication in Transformer Language Models",
    "Merullo et al., 2024",
    "2406.09519",
)
OCR = Paper(
    "Generalization or Hallucination? Understanding Out-of-Context Reasoning in Transformers",
    "Huang et al., 2025",
    "2506.10887",
)

STUDY = Support(False, "a study, no attention")
LOOKS = Capabilities(
    prefill=STUDY,
    decode=STUDY,
    backward=STUDY,
    gqa=STUDY,
    padding=STUDY,
    bidirectional=STUDY,
    causal_outputs=STUDY,
    causal_routing=STUDY,
)

ROWS: tuple[Row, ...] = (
    Row(
        key="talking-heads",
        kind="study",
        path="foveate.lens.circuits_job.Circuits",
        title="Head-to-head channels (Talking Heads)",
        summary="Finds the channels between heads by component, and tests them by edits.",
        papers=(MERULLO,),
        miniature="talking-heads",
        capabilities=Capabilities(
            prefill=Support(True, "the model's own, watched or edited"),
            decode=Support(True, "the model's own, edited"),
            backward=STUDY,
            gqa=Support(True, "each query head with its group's key and value"),
            padding=Support(False, "prompts of a batch have one length"),
            bidirectional=Support(False, "reads decoders"),
            causal_outputs=STUDY,
            causal_routing=STUDY,
        ),
        jobs=("circuits", "foveate.lens"),
    ),
    Row(
        key="ocr",
        kind="study",
        path="foveate.lens.ocr.FactRecall",
        title="Out-of-context reasoning (OCR)",
        summary="Recall by one head, whose factorised maps deduce what a merged one can't.",
        papers=(OCR,),
        miniature="ocr",
        capabilities=LOOKS,
        jobs=("reproduce", "foveate.lens"),
    ),
)
