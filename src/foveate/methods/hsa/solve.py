"""The optimal hierarchical attention, by its two passes over the tree (theorem 3.2).

With r_A the mean of a row over the leaves l(A), |A| their number, and S(B, C) the mean of the
flat logits s_ij over i in l(B), j in l(C), which is scale * rq_B . rk_C (plus e_B . e_C):

    bottom-up   log Z_B = log( exp(-phi(B)) + sum_{C in sib(B)} |C| exp S(B, C) )
                phi(A) = - sum_{B in chd(A)} |B|/|A| log Z_B,  phi(i) = -s_ii at a leaf (or +inf)
    top-down    m_B = m_A exp(-phi(B)) / Z_B,  m_R = 1
                acc_B = acc_A + m_A sum_{C in sib(B)} |C| exp(S(B, C)) / Z_B * v_C,  v_C a mean
                out_i = acc_i + m_i v_i

The sum over siblings is ordinary attention of the nodes' mean queries to their siblings' mean keys
and values with a bias of log |C|: out_B and lse_B. All families at once are one call of the core
op on a block-diagonal layout, which needs no phi. Then log Z_B = logaddexp(lse_B, -phi(B)), and
acc is a path sum of m_A exp(lse_B - log Z_B) out_B. A leaf that sees itself is one more key of its
own family, so that lse_i is log Z_i and out_i holds both terms.

Why it is optimal: theta, constant on (leaves of B) x (leaves of C), puts the same mass m_B inside B
from every row under B, as rows sum to 1. So the problem splits by families, V(A, m) =
|A| m log m + m |A| phi(A), and sum_i KL(theta_i || softmax(s)_i) = N phi(R) + sum_i lse_i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.hsa.siblings import sibling_layout
from foveate.ops import attention
from foveate.parts.tree import Tree
from foveate.parts.tree_sums import node_means, path_sums, token_sums


class Solution(NamedTuple):
    """What `solve` returns.

    out: (B, Hq, L, Dv), in the dtype of the query; 0 for tokens that the tree doesn't hold.
    energy: (roots, Hq), phi(R) in fp32 (fp64 for fp64); +inf for a lone token that may not see
        itself.
    """

    out: Tensor
    energy: Tensor


class Rows(NamedTuple):
    """Means over each node's leaves, (n, heads, width), and what is added to a key's logit.

    weight: (n, heads or 1), log |C|, and the mean of a bias of the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    scale: float


def solve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    *,
    scale: float,
    own: bool = True,
    positions: Tensor | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> Solution:
    """Optimal attention among those that are constant on blocks of siblings.

    Args:
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D), Hq a multiple of Hkv.
        v: (B, Hkv, L, Dv).
        tree: over B entries of L tokens.
        scale: factor on q . k.
        own: whether a token sees itself.
        positions: (n, dp), e_B by node; siblings' logits get e_B . e_C, not scaled.
        key_bias: (B or 1, Hq or 1, L), added to the logits of a key.
        backend: of the core op.
    """
    if not len(tree):
        nobody = q.new_zeros(0, q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
        return Solution(v.new_zeros(*q.shape[:3], v.shape[3]), nobody)
    rows = means(q, k, v, tree, scale=scale, positions=positions, key_bias=key_bias)
    first = tree.trees
    out, lse = attention(
        *(x[first:].transpose(0, 1)[None].to(q.dtype) for x in rows[:3]),
        layout=sibling_layout(tree, own=own),
        scale=rows.scale,
        bias=bias_of(rows.weight[first:]),
        backend=backend,
    )
    share, energy = _shares(lse[0].T, tree, own)
    mixed = share[..., None] * out[0].transpose(0, 1).to(share.dtype)
    return Solution(heads_first(token_sums(mixed, tree).to(q.dtype), tree), energy)


def means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    *,
    scale: float,
    positions: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Rows:
    """Nodes' rows, in fp32 or wider: a leaf's are its token's."""
    work = torch.promote_types(q.dtype, torch.float32)
    rq, rk, rv = (node_means(by_token(x).to(work), tree) for x in (q, k, v))
    weight = tree.sizes.to(work).log()[:, None]
    if key_bias is not None:
        spread = key_bias.expand(tree.batch, -1, -1)[..., None]
        weight = weight + node_means(by_token(spread).to(work), tree)[..., 0]
    if positions is not None:
        e = positions.to(work)[:, None]
        rq = torch.cat((rq * scale, e.expand(-1, rq.shape[1], -1)), -1)
        rk = torch.cat((rk, e.expand(-1, rk.shape[1], -1)), -1)
        scale = 1.0
    return Rows(rq, rk, rv, weight, scale)


def _shares(lse: Tensor, tree: Tree, own: bool) -> tuple[Tensor, Tensor]:
    """Of each node but roots m_A exp(lse_B - log Z_B), (n - roots, H); and phi(R), (roots, H).

    lse: (n - roots, H) over the siblings, and a leaf itself if it sees itself.
    """
    first = tree.trees
    alone = (tree.family[first:, 1] - tree.family[first:, 0] == 1)[:, None]
    leaf = tree.leaf[first:, None]
    nothing = alone & ~(leaf & own)  # sees no sibling, nor itself
    lse = lse.masked_fill(nothing, 0.0)  # -inf, but no arithmetic with it
    sizes = tree.sizes.to(lse.dtype)
    part = (sizes / sizes[tree.parent.clamp_min(0)])[:, None]
    inside: list[Tensor] = []  # -phi of each level below the roots, the deepest first
    logs: list[Tensor] = []
    below: Tensor | None = None
    for start, lo, hi in reversed(tree.steps):
        here = slice(lo - first, hi - first)
        minus_phi = torch.full_like(lse[here], -torch.inf) if below is None else below
        log_z = torch.where(nothing[here], minus_phi, torch.logaddexp(lse[here], minus_phi))
        inside.append(minus_phi)
        logs.append(log_z)
        below = torch.full_like(lse[:1].expand(lo - start, -1), -torch.inf)
        parents = (~tree.leaf[start:lo]).nonzero()[:, 0]
        place = torch.zeros(lo - start, dtype=torch.int64, device=lse.device)
        place[parents] = torch.arange(len(parents), device=lse.device)
        sums = lse.new_zeros(len(parents), lse.shape[1])
        sums = sums.index_add(0, place[tree.parent[lo:hi] - start], part[lo:hi] * log_z)
        below = below.index_copy(0, parents, sums)
    minus_phi, log_z = torch.cat(inside[::-1]), torch.cat(logs[::-1])
    # log m_B - log m_A; what sees nothing passes all of it on, and of a leaf's nobody asks.
    step = torch.where(leaf | nothing, 0.0, minus_phi - log_z.masked_fill(nothing, 0.0))
    root = step.new_zeros(first, step.shape[1])
    log_m = path_sums(torch.cat((root, step)), tree)
    share = (log_m[tree.parent[first:]] + lse - log_z.masked_fill(nothing, 0.0)).exp()
    assert below is not None
    return share.masked_fill(nothing, 0.0), -below


def by_token(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (B * L, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def heads_first(rows: Tensor, tree: Tree) -> Tensor:
    """(B * L, H, D) -> (B, H, L, D)."""
    return rows.unflatten(0, (tree.batch, tree.length)).transpose(1, 2)


def bias_of(weight: Tensor) -> Tensor | None:
    """(n, H or 1) -> a bias of keys (1, H or 1, 1, n); None where all are 0."""
    if not weight.requires_grad and not bool(weight.any()):
        return None
    return weight.T[None, :, None]
