"""Keeping routed parts (heads, experts) in use: the load-balance loss of sparse routers.

P_i is the mean probability of part i over tokens, f_i the fraction of tokens that have it active;
the loss is sum_i P_i f_i, times the number of parts in the usual scaling (Fedus et al. 2021, arXiv
2101.03961, equation 4; MoH, arXiv 2410.11842, equation 6, prints it without). Only P has a
gradient. Tokens of the whole batch count together, padding doesn't.

With K parts active for each token an even use gives K. Counted by (token, slot) pairs, f_i is the
fraction of all pairs that are of part i and an even use gives 1; code that divides P by N K as well
gives 1 / K for the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError


class Balance(NamedTuple):
    """A scalar loss, and the fraction of tokens (N,) that each part is active for."""

    loss: Tensor
    load: Tensor


def load_balance(
    probs: Tensor,
    active: Tensor,
    real: Tensor | None = None,
    *,
    scaled: bool = True,
    per_slot: bool = False,
) -> Balance:
    """The loss of one layer, and how its parts are used.

    Args:
        probs: (..., N), over all parts, before anything is chosen.
        active: (..., N) bool.
        real: (...) bool, False on padding; None is all real.
        scaled: times N.
        per_slot: f counts (token, slot) pairs in the loss; the load is by tokens all the same.

    Raises:
        InputError: shapes differ.
    """
    if probs.shape != active.shape or (real is not None and real.shape != probs.shape[:-1]):
        raise InputError(
            f"load_balance: probs {tuple(probs.shape)}, active {tuple(active.shape)} and real "
            f"{None if real is None else tuple(real.shape)} don't fit together."
        )
    parts = probs.shape[-1]
    p, f = probs.reshape(-1, parts), active.reshape(-1, parts)
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    if real is None:
        mean, load = p.mean(0), f.to(p.dtype).mean(0)
    else:
        counts = real.reshape(-1, 1).to(p.dtype)
        total = counts.sum().clamp_min(1)
        mean, load = (p * counts).sum(0) / total, (f * counts).sum(0) / total
    share = load.detach()
    if per_slot:
        share = share / share.sum().clamp_min(1e-9)
    loss = (mean * share).sum()
    return Balance(loss * parts if scaled else loss, load.detach())
