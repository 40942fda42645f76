"""Choosing EchoAtt's followers on a frozen model: how alike its layers' maps are, on real text.

The model runs dense and without padding (the paper cuts samples to 512 tokens). The cosines of all
pairs of maps are added up a block of rows at a time: <A_i, A_j> is a sum over rows, so no map is
ever held whole.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.methods.echoatt.choice import (
    Similarity,
    cosines,
    in_blocks,
    most_alike,
    scores,
    unchanged,
)
from foveate.methods.echoatt.maps import blocks, from_lse
from foveate.methods.echoatt.maps import scores as logits
from foveate.ops import AttentionOutput, attention
from foveate.parts.attention import Attention, mask_layout
from foveate.parts.context import Context
from foveate.parts.fitting import Artefact, Batches, Frozen, Progress, State

if TYPE_CHECKING:
    from foveate.methods.echoatt.attention import EchoAtt

SAMPLES, LENGTH = 16, 512


class Profiler(Attention):
    """Dense attention that keeps queries, keys and lse of every layer of a forward.

    Attributes:
        seen: by layer, in the order in which they ran.
    """

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Context]] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`."""
        ctx = Context() if ctx is None else ctx
        result = attention(q, k, v, layout=mask_layout(ctx.mask, q, k, ctx), **ctx.options)
        self.seen[ctx.layer] = (q.detach(), k.detach(), result.lse.detach(), ctx)
        return result

    @torch.no_grad()
    def similarity(self, skip: int = 0) -> Similarity:
        """Cosines of all pairs of layers, summed over the sequences of the last forward.

        Args:
            skip: first columns to leave out.
        """
        layers = sorted(self.seen)
        q, k, _, ctx = self.seen[layers[0]]
        products = q.new_zeros(len(q), len(layers), len(layers), dtype=torch.float64)
        for block in blocks(q, k, ctx):
            for b in range(len(q)):
                one = slice(b, b + 1)
                rows = []
                for layer in layers:
                    q_l, k_l, lse, at = self.seen[layer]
                    p = from_lse(logits(q_l[one], k_l[one], block, at), lse[one, :, block.rows])
                    rows.append(p[..., max(0, skip - block.keys.start) :].flatten())
                flat = torch.stack(rows)
                products[b] += (flat @ flat.mT).double()
        return Similarity(cosines(products).sum(0).cpu(), len(q))


def profile(model: Frozen, batches: Batches, samples: int, progress: Progress) -> dict[str, Any]:
    """Sim of a model's layers, with all columns and without the first.

    Returns:
        "similarity" and "without_first" (L x L lists), "scores" and "samples".
    """
    whole: Similarity | None = None
    cut: Similarity | None = None
    number = 0
    while whole is None or whole.samples < samples:
        ids = batches.train(number).ids[:, :LENGTH]
        number += 1
        profiler = Profiler()
        model.run(ids, profiler)
        found, less = profiler.similarity(), profiler.similarity(1)
        whole = found if whole is None else _sum(whole, found)
        cut = less if cut is None else _sum(cut, less)
        progress(min(1.0, whole.samples / samples), f"{whole.samples} samples")
    assert cut is not None
    return {
        "similarity": _listed(whole.mean),
        "without_first": _listed(cut.mean),
        "scores": _listed(scores(whole.mean)),
        "samples": whole.samples,
    }


def fit(
    method: EchoAtt, model: Frozen, batches: Batches, progress: Progress, state: State
) -> Artefact:
    """Choose followers by the similarity of the layers; nothing is trained.

    The layers that may follow are those above the largest gap of s. Without `block` the
    method's share of all layers is taken, those most like their leaders; where the gap leaves fewer
    than that, any layer but the first may follow.

    Returns:
        Facts: "followers", "unchanged" (by the gap), what `profile` returns, and "held_out": the
        mean similarity of followers with their leaders, and of neighbours, the latter also without
        the first column.
    """
    from foveate.methods.echoatt.attention import leader_map

    found = profile(model, batches, SAMPLES, progress)
    sim = torch.tensor(found["similarity"], dtype=torch.float64)
    cut = torch.tensor(found["without_first"], dtype=torch.float64)
    kept = unchanged(torch.tensor(found["scores"], dtype=torch.float64))
    layers = len(sim)
    if method.block is not None:
        followers = in_blocks(kept, layers, method.block)
    else:
        count = max(1, math.floor(method.share * layers + 0.5))
        free = [n for n in range(1, layers) if n not in kept]
        followers = most_alike(sim, count, kept if len(free) >= count else (0,))
    leaders = leader_map(followers)
    held = {
        "followers_like_leaders": sum(float(sim[f, l]) for f, l in leaders.items()) / len(leaders),
        "neighbours": float(sim.diagonal(1).mean()),
        "neighbours_without_first_column": float(cut.diagonal(1).mean()),
    }
    facts: dict[str, Any] = {
        "followers": [model.layers[n] for n in followers], "unchanged": list(kept),
        "share": method.share, "block": method.block, "text": batches.describe(),
        "held_out": held, **found,
    }  # fmt: skip
    return Artefact("echoatt", facts)


def _sum(one: Similarity, two: Similarity) -> Similarity:
    return Similarity(one.total + two.total, one.samples + two.samples)


def _listed(x: Tensor) -> Any:
    return [_listed(row) if row.dim() else round(float(row), 6) for row in x]
