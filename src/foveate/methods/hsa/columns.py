"""A causal relative of hierarchical attention: keys are tied, queries aren't. An extension.

The paper's attention ties rows: what a block sees of another depends on the mean query of all of
it, so of its later tokens. Here each query i has its own row of logits,

    scale * q_i . rk_C + log |C|   for each earlier sibling C of i's ancestors, with value v_C,
    scale * q_i . k_j              for each j <= i of i's own family,

an ordinary softmax, and the closest one to causal softmax among rows that are constant on these
blocks. An earlier sibling is complete, so that no later token is seen, also by what is chosen; a
tree of windows over L + 1 tokens says the same of the first L as that over L tokens, so decoding
is the full forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.methods.hsa.siblings import range_layout
from foveate.methods.hsa.solve import bias_of, means
from foveate.ops import AttentionOutput, attention, merge
from foveate.ops.errors import InputError
from foveate.parts.tree import Tree


def columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Causal attention with tied keys, one pass of the core op for each level, merged by lse.

    Args:
        q: (B, Hq, Lq, D), the last Lq of the tree's tokens.
        k: (B, Hkv, L, D).
        v: (B, Hkv, L, Dv).
        tree: over B entries of L tokens, whose siblings stand in the order of their tokens.
        scale: factor on q . k.
        key_bias: (B or 1, Hq or 1, L), added to the logits of a key.
        backend: of the core op.

    Raises:
        InputError: a group's tokens aren't all before those of the next one.
    """
    if not tree.ordered:
        raise InputError(
            "hsa(ties='columns'): a group's tokens must all come before those of its next sibling, "
            "as in sentences; blocks of an image's rows don't."
        )
    new, length = q.shape[2], tree.length
    rows = means(k, k, v, tree, scale=scale, key_bias=key_bias)
    at = tree.token[tree.leaves]
    listed = tree.leaves[at % length >= length - new]  # the leaves of the queries
    at = tree.token[listed]
    flat = (at // length) * new + at % length - (length - new)
    mine = q.transpose(1, 2).flatten(0, 1).index_select(0, flat).transpose(0, 1)[None]
    parts = []
    for level, (_, lo, hi) in enumerate(tree.steps, start=1):
        layout = tree.kept((columns, level, new), lambda: _earlier(tree, listed, level, lo, hi))  # noqa: B023
        keys, values = (x[lo:hi].transpose(0, 1)[None].to(q.dtype) for x in (rows.k, rows.v))
        bias = bias_of(rows.weight[lo:hi])
        parts.append(
            attention(mine, keys, values, layout=layout, scale=scale, bias=bias, backend=backend)
        )
    out = v.new_zeros(len(q) * new, q.shape[1], v.shape[3])
    lse = rows.k.new_full((len(q) * new, q.shape[1]), -torch.inf)
    if parts:
        found = merge(parts)
        out = out.index_copy(0, flat, found.out[0].transpose(0, 1))
        lse = lse.index_copy(0, flat, found.lse[0].T.to(lse.dtype))
    return AttentionOutput(
        out.unflatten(0, (len(q), new)).transpose(1, 2),
        lse.unflatten(0, (len(q), new)).transpose(1, 2),
    )


def _earlier(tree: Tree, listed: Tensor, level: int, lo: int, hi: int):  # type: ignore[no-untyped-def]
    """Which nodes of a level each leaf sees: those before its ancestor, and itself."""
    ancestor = tree.ancestors(level)[listed]
    there = ancestor >= 0
    start = tree.family[ancestor.clamp_min(0), 0]
    end = ancestor + (ancestor == listed).long()
    none = torch.zeros_like(ancestor)
    return range_layout(
        torch.where(there, start - lo, none), torch.where(there, end - lo, none), hi - lo
    )
