"""Block-constant attention written out as its matrix: the definition, for one head of few tokens.

A tree here is nested lists of token indices; nothing of the fast form is used. `score` makes the
block's logit of all its pairs': the mean is HSA, any other one is feasible (rows sum to 1, blocks
are constant) but not the closest to softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Written(NamedTuple):
    """theta (N, N), rows sum to 1; energy: phi(R)."""

    theta: Tensor
    energy: Tensor


def mean_score(block: Tensor) -> Tensor:
    """S(B, C): the mean of the logits of all pairs."""
    return block.mean()


def leaves_of(node: Any) -> list[int]:
    """Tokens under a node, from the left."""
    return [node] if isinstance(node, int) else [i for child in node for i in leaves_of(child)]


def written(
    logits: Tensor,
    tree: Sequence[Any],
    *,
    own: bool = True,
    score: Callable[[Tensor], Tensor] = mean_score,
) -> Written:
    """Hierarchical self-attention (arXiv 2509.15448), node by node.

    Args:
        logits: (N, N), s_ij.
        tree: nested lists; every token once.
        own: whether a token sees itself.
        score: of a block of logits (|B|, |C|) -> one logit.
    """
    zero = logits.new_zeros(())
    theta = torch.zeros_like(logits)
    log_z: dict[int, Tensor] = {}  # by id of the node's list or by -1 - token
    phis: dict[int, Tensor] = {}

    def name(node: Any) -> int:
        return -1 - node if isinstance(node, int) else id(node)

    def block(one: Any, two: Any) -> Tensor:
        return score(logits[leaves_of(one)][:, leaves_of(two)])

    def phi(node: Any) -> Tensor:
        if isinstance(node, int):
            return -logits[node, node] if own else zero + math.inf
        total = zero
        for i, child in enumerate(node):
            terms = [-phis.setdefault(name(child), phi(child))]
            for j, other in enumerate(node):
                if j != i:
                    terms.append(math.log(len(leaves_of(other))) + block(child, other))
            log_z[name(child)] = torch.logsumexp(torch.stack(terms), 0)
            share = len(leaves_of(child)) / len(leaves_of(node))
            total = total - share * log_z[name(child)]
        return total

    def fill(node: Any, log_m: Tensor) -> None:
        for i, child in enumerate(node):
            mine = leaves_of(child)
            for j, other in enumerate(node):
                if j != i:
                    value = torch.exp(log_m + block(child, other) - log_z[name(child)])
                    for row in mine:
                        theta[row, leaves_of(other)] = value
            # An only child takes all of its parent's mass.
            inner = log_m - phis[name(child)] - log_z[name(child)] if len(node) > 1 else log_m
            if isinstance(child, int):
                theta[child, child] = inner.exp() if own else zero
            else:
                fill(child, inner)

    energy = phi(tree)
    fill(tree, zero)
    return Written(theta, energy)


def divergence(theta: Tensor, logits: Tensor) -> Tensor:
    """sum_i KL(theta_i || softmax(logits)_i), 0 log 0 = 0."""
    log_p = logits.log_softmax(-1)
    return torch.where(theta > 0, theta * (theta.clamp_min(1e-300).log() - log_p), 0.0).sum()
