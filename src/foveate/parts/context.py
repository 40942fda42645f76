"""Context: what an attention may look at besides q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from foveate.ops import Mask
from foveate.ops.errors import InputError
from foveate.parts.reference import Maps
from foveate.parts.rope import Rope
from foveate.parts.tree import Tree

if TYPE_CHECKING:
    from foveate.parts.again import Again

Phase = Literal["train", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("train", "prefill", "decode")


class Work(NamedTuple):
    """What a call visited, means over batch entries and heads: pairs, and area of whole tiles."""

    pairs: float
    tile_area: float


@dataclass
class Context:
    """Everything that a call knows; mostly empty. Shapes: B batch, H heads, L length, D head size.

    Attributes:
        mask: who may attend; None is everyone, as in `foveate.attention`.
        q_positions: integer (Lq,) or (B, Lq); None aligns the last query with the last key. With
            left padding, index minus padding: negative on the padding.
        kv_positions: integer (Lkv,) or (B, Lkv); None is 0 ... Lkv - 1.
        phase: "train", "prefill" or "decode" (new tokens against a cache).
        layer: index of the layer, from 0.
        scale: factor on the scores; None is D ** -0.5.
        softcap: c in c * tanh(score / c).
        sink_logits: (Hq,), one more logit in each row's sum.
        bias: added to the scores, broadcastable to (B, Hq, Lq, Lkv).
        dropout: probability of dropping a weight.
        backend: backend of the core op, "auto" or a name.
        hidden: (B, L, dim), input of the layer; None where keys come from another one.
        ids: integer (B, L), the new tokens' ids, -1 where one has none; None where none are known.
        embeddings: (B, L, dim), the tokens' embeddings, before any layer.
        weights: W_Q, W_K and W_V of the layer, where its projection has just these.
        input_norm: the norm that `hidden` has been through in its block.
        reference: queries and keys of the model's reference stream, for mixers that ask for one.
        raw_query: (B, Hq, Lq, D), before the rotation of positions.
        raw_key: (B, Hkv, Lkv, D), likewise.
        query_rope: the rotation that q has been through and its positions, (Lq,) or (B, Lq); told
            to methods that say `wants_query_rope`, where it isn't handed over as `raw_query`.
            None there means that q wasn't turned.
        grid: shape of the tokens where they are an image or a video.
        modality: integer (L,) or (B, L), kind of each token.
        document_ids: integer (L,) or (B, L), document of each token.
        real: bool (B, Lq), False on padding; None where all are real or nobody has looked.
        tree: the tree over the tokens, such as sentences in documents.
        step: share of a diffusion's denoising steps that are done, 0 to 1; None outside of one.
        generator: random state for methods that draw.
        cache: the layer's cache, where the method keeps one of its own.
        again: filled by the attention layer, for whoever applies its weights to other values (an
            attention-aware router); None keeps nothing.
        store: shared by the layers of one forward; methods use their own keys.
        aux: losses (names that end with "_loss", already weighted) and statistics that a method
            leaves for its layer, by name.
        stats: called as stats(layer=, layout=, build_seconds=, attend_seconds=) after each pattern;
            a method that visits keys by several layouts tells their `Work` as the layout.
    """

    mask: Mask | None = None
    q_positions: Tensor | None = None
    kv_positions: Tensor | None = None
    phase: Phase = "prefill"
    layer: int = 0
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    backend: str = "auto"
    hidden: Tensor | None = None
    ids: Tensor | None = None
    embeddings: Tensor | None = None
    weights: tuple[Tensor, ...] = ()
    input_norm: Callable[[Tensor], Tensor] | None = None
    reference: Maps | None = None
    raw_query: Tensor | None = None
    raw_key: Tensor | None = None
    query_rope: tuple[Rope, Tensor] | None = None
    grid: tuple[int, ...] | None = None
    modality: Tensor | None = None
    document_ids: Tensor | None = None
    real: Tensor | None = None
    tree: Tree | None = None
    step: float | None = None
    generator: torch.Generator | None = None
    cache: Any = None
    again: Again | None = None
    store: dict[Any, Any] = field(default_factory=dict)
    aux: dict[str, Tensor] = field(default_factory=dict)
    stats: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise InputError(
                f"Context(mask=...): expected a mask such as causal(), got "
                f"{type(self.mask).__name__}; wrap a boolean tensor as blocks(tensor, 1)."
            )
        if self.phase not in PHASES:
            raise InputError(f"Context(phase={self.phase!r}): expected one of {', '.join(PHASES)}.")

    @property
    def options(self) -> dict[str, Any]:
        """What the model asks of the core op, as keyword arguments of `foveate.attention`."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "sink_logits": self.sink_logits,
            "bias": self.bias,
            "dropout": self.dropout,
            "backend": self.backend,
        }
