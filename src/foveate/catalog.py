"""The table of methods: one row each, and nothing else knows which methods there are.

From it come `foveate methods`, the README's table, what `compare` offers and the tests' matrix.
It holds only strings: reading it imports no method. Adding a method means adding a row here, its
mechanism file and a test of what only it does (CONTRIBUTING.md walks through one).
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from foveate.ops.errors import UnknownMethodError, nearest


class Support(NamedTuple):
    """Whether something works, and what a user should know about it."""

    works: bool
    note: str = ""

    def __str__(self) -> str:
        word = "yes" if self.works else "no"
        return f"{word}: {self.note}" if self.note else word


YES = Support(True)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a method can do; everything that says no is refused with that reason.

    `causal_outputs` and `causal_routing` are two properties: that an output, with the choice of
    what it sees held fixed, doesn't see later tokens, and that the choice doesn't either.
    """

    prefill: Support = YES
    decode: Support = YES
    backward: Support = YES
    gqa: Support = YES
    padding: Support = YES
    bidirectional: Support = YES
    causal_outputs: Support = YES
    causal_routing: Support = YES


class Paper(NamedTuple):
    """A citation: title, first authors and year, arXiv id."""

    title: str
    authors: str
    arxiv: str

    @property
    def url(self) -> str:
        """Address of the abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True, slots=True)
class Row:
    """One method.

    Attributes:
        key: the name that every command and `foveate.use` takes.
        kind: attention, pattern, projection, mixer, ... (the words of the design).
        path: the class, as `module.name`.
        title: what people call it.
        summary: one sentence on what it does.
        papers: where it is defined; empty only for what no paper defines.
        sheet: key of the sheet that specifies it.
        capabilities: what works and what doesn't.
        jobs: where users reach it.
    """

    key: str
    kind: str
    path: str
    title: str
    summary: str
    papers: tuple[Paper, ...]
    sheet: str
    capabilities: Capabilities
    jobs: tuple[str, ...] = ("compare", "use")

    def load(self) -> Any:
        """Import and return the class."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON."""
        plain = dataclasses.asdict(self)
        plain["papers"] = [{**p._asdict(), "url": p.url} for p in self.papers]
        plain["capabilities"] = {
            field.name: getattr(self.capabilities, field.name)._asdict()
            for field in dataclasses.fields(self.capabilities)
        }
        return plain


VASWANI = Paper("Attention Is All You Need", "Vaswani et al., 2017", "1706.03762")
STREAMING = Paper(
    "Efficient Streaming Language Models with Attention Sinks", "Xiao et al., 2023", "2309.17453"
)
SINKS = Paper(
    "Attention Sink in Transformers: A Survey on Utilization, Interpretation, and Mitigation",
    "Su et al., 2026",
    "2604.10098",
)
MINFERENCE = Paper(
    "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    "Jiang et al., 2024",
    "2407.02490",
)
MMINFERENCE = Paper(
    "MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation "
    "Sparse Attention",
    "Li et al., 2025",
    "2504.16083",
)
HYPER = Paper(
    "HyperAttention: Long-context Attention in Near-Linear Time", "Han et al., 2023", "2310.05869"
)

SHAZEER = Paper(
    "Fast Transformer Decoding: One Write-Head is All You Need", "Shazeer, 2019", "1911.02150"
)
AINSLIE = Paper(
    "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    "Ainslie et al., 2023",
    "2305.13245",
)
STEP3 = Paper(
    "Step-3 is Large yet Affordable: Model-system Co-design for Cost-effective Decoding",
    "StepFun, 2025",
    "2507.19427",
)
MFA = Paper("Multi-matrix Factorization Attention", "Hu et al., 2024", "2412.19255")
SQA = Paper(
    "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query "
    "Heads Reduction",
    "Filipek, 2025",
    "2510.01817",
)
DEEPSEEK_V2 = Paper(
    "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    "DeepSeek-AI, 2024",
    "2405.04434",
)
TPLA = Paper(
    "TPLA: Tensor Parallel Latent Attention for Efficient Disaggregated Prefill & Decode Inference",
    "Tang et al., 2025",
    "2508.15881",
)
GLA = Paper("Hardware-Efficient Attention for Fast Decoding", "Zadouri et al., 2025", "2505.21487")
MOH = Paper(
    "MoH: Multi-Head Attention as Mixture-of-Head Attention", "Jin et al., 2024", "2410.11842"
)
NAT = Paper("Neighborhood Attention Transformer", "Hassani et al., 2022", "2204.07143")
DINAT = Paper("Dilated Neighborhood Attention Transformer", "Hassani and Shi, 2022", "2209.15001")
FASTER_NA = Paper(
    "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock "
    "Level",
    "Hassani et al., 2024",
    "2403.04690",
)
GENERALIZED_NA = Paper(
    "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    "Hassani et al., 2025",
    "2504.16922",
)

DHSA = Paper(
    "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    "Xiong et al., 2025",
    "2510.24606",
)

FLUX = Paper(
    "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference",
    "Qiu et al., 2026",
    "2604.07394",
)

SNAPKV = Paper(
    "SnapKV: LLM Knows What You are Looking for Before Generation", "Li et al., 2024", "2404.14469"
)
H2O = Paper(
    "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    "Zhang et al., 2023",
    "2306.14048",
)
WHOLE_PROMPT = Support(True, "dense; the cache is cut after it, so memory and decoding gain")
NO_CACHE = Support(False, "it drops keys from a decoder's cache; use block-sparse")
LEFT_PADDING = Support(True, "on the left, as in generation")

BUILDERS = ("Attention", "train")
GRIDS = ("Attention", "use", "bench", "cost")
FITTED = ("compare", "use", "fit")
DENSE_DECODE = Support(True, "dense over the whole cache, as in the paper")
CAUSAL_ONLY = Support(False, "defined for causal attention; use block-sparse")
LAST_QUERIES = Support(False, "the last queries choose the index for all rows")
SLASHES = Support(False, "a slash is a distance to an earlier key; use block-sparse")
SORTED_QUERIES = Support(False, "a query's block depends on the queries that are sorted with it")
PROMPT_END = Support(False, "the prompt's last queries choose the layer's form for all rows")
STREAMED = Support(False, "streaming is causal; use sink-window")
CAUSAL_CHUNKS = Support(False, "chunks are scored for causal models; use block-sparse")
LOOKS_AHEAD = Support(False, "block means and the boundary predictor look ahead")
POOLED_BLOCK = Support(False, "a block's mean query and key hold its later tokens")

ROWS: tuple[Row, ...] = (
    Row(
        key="full",
        kind="pattern",
        path="foveate.methods.full.Full",
        title="Full attention",
        summary="Every key that the mask allows; what the others are measured against.",
        papers=(VASWANI,),
        sheet="",
        capabilities=Capabilities(),
    ),
    Row(
        key="sink-window",
        kind="pattern",
        path="foveate.methods.attention_sink.SinkWindow",
        title="Sink + window (StreamingLLM)",
        summary="The first few tokens and a sliding window; as a mask, or with a bounded cache.",
        papers=(STREAMING, SINKS),
        sheet="attention-sink",
        capabilities=Capabilities(),
    ),
    Row(
        key="a-shape",
        kind="pattern",
        path="foveate.methods.mminference.AShape",
        title="A-shape (MInference)",
        summary="A wide sink and a local band, the static head pattern of MInference.",
        papers=(MINFERENCE, MMINFERENCE),
        sheet="mminference",
        capabilities=Capabilities(decode=DENSE_DECODE),
    ),
    Row(
        key="vertical-slash",
        kind="pattern",
        path="foveate.methods.mminference.VerticalSlash",
        title="Vertical-slash (MInference)",
        summary="Key columns and diagonals, chosen from the attention of the last 64 queries.",
        papers=(MINFERENCE, MMINFERENCE),
        sheet="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=SLASHES, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="block-sparse",
        kind="pattern",
        path="foveate.methods.mminference.BlockSparse",
        title="Block-sparse (MInference)",
        summary="Per block of queries the key blocks whose pooled scores are highest.",
        papers=(MINFERENCE, MMINFERENCE),
        sheet="mminference",
        capabilities=Capabilities(decode=DENSE_DECODE, causal_routing=POOLED_BLOCK),
    ),
    Row(
        key="fna",
        kind="pattern",
        path="foveate.methods.fna.FNA",
        title="Neighborhood attention (fused)",
        summary="On a grid of tokens in one to three axes, the window of the nearest ones.",
        papers=(FASTER_NA, NAT, DINAT),
        sheet="fna",
        capabilities=Capabilities(),
        jobs=GRIDS,
    ),
    Row(
        key="gna",
        kind="pattern",
        path="foveate.methods.gna.GNA",
        title="Generalized neighborhood attention",
        summary="Neighborhoods whose windows groups of queries share, so that whole tiles count.",
        papers=(GENERALIZED_NA, FASTER_NA),
        sheet="gna",
        capabilities=Capabilities(
            decode=Support(True, "with a stride, the last group's window depends on the length")
        ),
        jobs=GRIDS,
    ),
    Row(
        key="tri-shape",
        kind="pattern",
        path="foveate.methods.mminference.TriShape",
        title="Tri-shape (MInference)",
        summary="An A-shape whose last queries see everything; the papers' baseline.",
        papers=(MINFERENCE, MMINFERENCE),
        sheet="mminference",
        capabilities=Capabilities(decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY),
    ),
    Row(
        key="grid",
        kind="pattern",
        path="foveate.methods.mminference.Grid",
        title="Grid (MMInference)",
        summary="Every stride-th column and row, the stride and phase found in the input.",
        papers=(MMINFERENCE,),
        sheet="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="q-boundary",
        kind="pattern",
        path="foveate.methods.mminference.QBoundary",
        title="Q-boundary (MMInference)",
        summary="Text and vision queries each run a pattern of their own, on all keys.",
        papers=(MMINFERENCE,),
        sheet="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="2d-boundary",
        kind="pattern",
        path="foveate.methods.mminference.TwoDBoundary",
        title="2D-boundary (MMInference)",
        summary="Each pair of query and key modality runs its own pattern, merged by lse.",
        papers=(MMINFERENCE,),
        sheet="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="hyperattention",
        kind="attention",
        path="foveate.methods.hyperattention.HyperAttention",
        title="HyperAttention",
        summary="Sorted diagonal blocks exactly, a few weighted sampled keys for the rest.",
        papers=(HYPER,),
        sheet="hyperattention",
        capabilities=Capabilities(
            decode=Support(True, "dense over the whole cache"), causal_routing=SORTED_QUERIES
        ),
    ),
    Row(
        key="dhsa",
        kind="pattern",
        path="foveate.methods.dhsa.DHSA",
        title="Dynamic hierarchical sparse (DHSA)",
        summary="A learnt predictor cuts chunks of unequal length; queries keep the best ones.",
        papers=(DHSA,),
        sheet="dhsa",
        capabilities=Capabilities(bidirectional=CAUSAL_CHUNKS, causal_routing=LOOKS_AHEAD),
        jobs=FITTED,
    ),
    Row(
        key="flux",
        kind="pattern",
        path="foveate.methods.flux.Flux",
        title="Flux",
        summary="A learnt router gives each layer full or sparse attention, once for each prompt.",
        papers=(FLUX,),
        sheet="flux",
        capabilities=Capabilities(bidirectional=STREAMED, causal_routing=PROMPT_END),
        jobs=FITTED,
    ),
    Row(
        key="snapkv",
        kind="pattern",
        path="foveate.methods.snapkv.SnapKV",
        title="SnapKV",
        summary="After the prompt each head keeps the keys that its last queries attend to.",
        papers=(SNAPKV, SINKS),
        sheet="attention-sink",
        capabilities=Capabilities(
            prefill=WHOLE_PROMPT, padding=LEFT_PADDING, bidirectional=NO_CACHE
        ),
    ),
    Row(
        key="h2o",
        kind="pattern",
        path="foveate.methods.h2o.H2O",
        title="H2O",
        summary="The cache keeps the newest keys and those that were attended to most so far.",
        papers=(H2O, SINKS),
        sheet="attention-sink",
        capabilities=Capabilities(
            prefill=WHOLE_PROMPT, padding=LEFT_PADDING, bidirectional=NO_CACHE
        ),
    ),
    Row(
        key="mha",
        kind="projection",
        path="foveate.methods.gqa.MHA",
        title="Multi-head",
        summary="A key and a value head for every query head.",
        papers=(VASWANI,),
        sheet="",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="gqa",
        kind="projection",
        path="foveate.methods.gqa.GQA",
        title="Grouped-query",
        summary="Groups of query heads share a key and a value head.",
        papers=(AINSLIE,),
        sheet="",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mqa",
        kind="projection",
        path="foveate.methods.gqa.MQA",
        title="Multi-query",
        summary="One key and one value head under all query heads.",
        papers=(SHAZEER,),
        sheet="",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mfa",
        kind="projection",
        path="foveate.methods.step3.MFA",
        title="Multi-matrix factorization (Step-3)",
        summary="Many wide query heads of low rank on one wide key and value head.",
        papers=(MFA, STEP3),
        sheet="step3",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mfa-kr",
        kind="projection",
        path="foveate.methods.step3.MFAKR",
        title="MFA with key reuse",
        summary="MFA whose values are made from its keys, so that only keys are cached.",
        papers=(MFA, STEP3),
        sheet="step3",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mla",
        kind="projection",
        path="foveate.methods.tpla.MLA",
        title="Multi-head latent (DeepSeek)",
        summary="Keys and values of all heads from one small latent, never made in decoding.",
        papers=(DEEPSEEK_V2, TPLA),
        sheet="tpla",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="tpla",
        kind="projection",
        path="foveate.methods.tpla.TPLA",
        title="Tensor-parallel latent",
        summary="MLA with its latent split over devices, each with a softmax of its own; or GLA.",
        papers=(TPLA, GLA),
        sheet="tpla",
        capabilities=Capabilities(
            decode=Support(True, "approximates its exact prefill, as in the paper, if pd_sep")
        ),
        jobs=BUILDERS,
    ),
    Row(
        key="sqa",
        kind="projection",
        path="foveate.methods.sqa.SQA",
        title="Sparse query attention",
        summary="Fewer query heads of the same width, for fewer FLOPs on whole sequences.",
        papers=(SQA,),
        sheet="sqa",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="moh",
        kind="projection",
        path="foveate.methods.moh.MoH",
        title="Mixture of heads",
        summary="Each token chooses which heads count for it; the others aren't computed.",
        papers=(MOH,),
        sheet="moh",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
)


def rows() -> tuple[Row, ...]:
    """All rows, in the order in which people should read them."""
    return ROWS


def keys() -> tuple[str, ...]:
    """The keys of all methods."""
    return tuple(row.key for row in ROWS)


def get(key: str) -> Row:
    """The row of a method.

    Raises:
        UnknownMethodError: there is no such key; the message offers the nearest ones.
    """
    for row in ROWS:
        if row.key == key:
            return row
    raise UnknownMethodError(f"No method is called {key!r}; {nearest(key, keys())}")


def markdown_table() -> str:
    """The methods as a Markdown table, one line each."""
    head = ("key", "what it does", "paper", "prefill", "decode", "backward", "bidirectional")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in ROWS:
        can = row.capabilities
        papers = ", ".join(f"[{p.arxiv}]({p.url})" for p in row.papers)
        cells = (f"`{row.key}`", f"**{row.title}.** {row.summary}", papers) + tuple(
            str(s) for s in (can.prefill, can.decode, can.backward, can.bidirectional)
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
