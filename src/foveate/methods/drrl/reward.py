"""The reward of a choice of rank, and REINFORCE.

    R_t = alpha sim(O, O_r) - beta FLOPs(r) / FLOPs(full) - gamma ||A_r - A_r'||_F / ||A||_F
    L_RL = - mean log pi(a_t) (R_t - baseline),   total loss = L_LM + lambda L_RL

Erden 2025, arXiv 2512.15973. sim is the mean over tokens of the cosine between the attention's
outputs at full rank and at rank r, all heads together (the released code compares layer outputs;
the readme writes the formula on A). FLOPs are relative to full rank, so that beta means the same at
every size (1e9 in the code). The last term is the change that the step from the previous rank r'
makes. Cosines saturate near 1; sim="log" is -log10(1 - cos + 1e-6) / 6, from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIMS = ("cosine", "log")


def cosine(full: Tensor, cut: Tensor) -> Tensor:
    """Mean over tokens of the cosine; outputs (B, H, n, Dv), heads joined: (B,)."""
    one, two = (x.transpose(1, 2).flatten(2).float() for x in (full, cut))
    return F.cosine_similarity(one, two, dim=-1).mean(-1)


def similarity(full: Tensor, cut: Tensor, sim: str = "cosine") -> Tensor:
    """As `cosine`, or its log form."""
    found = cosine(full, cut)
    if sim == "cosine":
        return found
    return -torch.log10((1 - found).clamp_min(0) + 1e-6) / 6


def reward(
    sim: Tensor,
    flops: Tensor,
    change: Tensor,
    alpha: float = 1.0,
    beta: float = 0.05,
    gamma: float = 0.1,
) -> Tensor:
    """Alpha sim - beta flops - gamma change."""
    return alpha * sim - beta * flops - gamma * change


def reinforce(log_prob: Tensor, rewards: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """-mean log pi(a) (R - baseline); no gradient through the rewards."""
    return -(log_prob * (rewards.detach() - baseline)).mean()


@dataclass(frozen=True)
class Seen:
    """What training looks at: rows of attention over the keys so far.

    q (B, Hq, rows, d), k (B, Hkv, keys, d), v (B, Hkv, keys, Dv), the rows being the last of the
    keys where causal.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    start: int = 0

    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """softmax(left right^T scale), (B, Hq, rows, keys) in fp32 or wider."""
        work = torch.promote_types(left.dtype, torch.float32)
        right = right.repeat_interleave(left.shape[1] // right.shape[1], 1)
        s = left.to(work) @ right.to(work).mT * self.scale
        if self.causal:
            rows = self.start + torch.arange(s.shape[-2], device=s.device)[:, None]
            s = s.masked_fill(torch.arange(s.shape[-1], device=s.device) > rows, -torch.inf)
        return s.softmax(-1)

    def outputs(self, weights: Tensor) -> Tensor:
        """Weights on the values, (B, Hq, rows, Dv)."""
        v = self.v.to(weights.dtype)
        return weights @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1)


@torch.no_grad()
def judged(
    seen: Seen,
    now: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor],
    sim: str,
) -> tuple[Tensor, Tensor]:
    """(sim, relative ||dA||_F) of a rank's factors against full rank and the previous rank: (B,).

    Args:
        seen: the rows, at full rank.
        now: left (B, Hq, rows, r) and right (B, Hkv, keys, r).
        before: of the previous rank.
        sim: "cosine" or "log".
    """
    full, cut, old = (seen.weights(*x) for x in ((seen.q, seen.k), now, before))
    like = similarity(seen.outputs(full), seen.outputs(cut), sim)
    moved = (cut - old).square().sum((1, 2, 3)).sqrt()
    return like, moved / full.square().sum((1, 2, 3)).sqrt()
