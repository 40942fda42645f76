"""The routers of mixture-of-head attention: from a token to a gate for each head.

Jin et al. 2024, arXiv 2410.11842, equations 3 to 6; the normalised gates are those of the released
ViT and DiT code. h heads, of which the first h_s are shared and E = h - h_s routed, K for each
token:

    ps = softmax(x W_s^T) [h_s],  pr = softmax(x W_r^T) [E],  [a1, a2] = softmax(x W_h^T)
    paper       g = a1 ps on shared heads,  a2 pr on the K chosen,  0 on the others
    normalized  g = 2 a1 h_s ps,  2 a2 K pr / (sum of the chosen pr),  0

Without shared or without routed heads there is nothing for a1 and a2 to weigh.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.parts.selection import topk_mask

Gates = Literal["normalized", "paper"]
_EPS = 1e-6


class Gated(NamedTuple):
    """gates (B, L, h), active (B, L, h) bool, probs (B, L, E) over the routed heads."""

    gates: Tensor
    active: Tensor
    probs: Tensor


class HeadRouter(nn.Module):
    """Linear routers on the layer's input, in fp32.

    Weights: shared W_s (h_s, dim), routed W_r (E, dim), stage W_h (2, dim), each where needed.

    Args:
        dim: width of x.
        shared: h_s.
        routed: E.
        active: K.
        gates: "normalized" or "paper".
    """

    def __init__(self, dim: int, shared: int, routed: int, active: int, gates: Gates) -> None:
        super().__init__()
        self.counts, self.form = (shared, routed, active), gates
        self.shared = nn.Linear(dim, shared, bias=False) if shared > 1 else None
        self.routed = nn.Linear(dim, routed, bias=False) if routed else None
        self.stage = nn.Linear(dim, 2, bias=False) if shared and routed else None

    def forward(self, x: Tensor) -> Gated:
        """Route x (B, L, dim)."""
        shared, routed, active = self.counts
        normalized = self.form == "normalized"
        ones = torch.ones(*x.shape[:-1], shared, dtype=_wide(x), device=x.device)
        ps = _softmax(self.shared, x) if self.shared is not None else ones
        if not routed:
            gates = ps * shared if normalized else ps
            return Gated(gates, torch.ones_like(gates, dtype=torch.bool), ps[..., :0])
        pr = self.probabilities(x)
        chosen = topk_mask(pr.detach(), active)
        kept = pr * chosen
        if normalized:
            kept = active * kept / kept.sum(-1, keepdim=True).clamp_min(_EPS)
            ps = shared * ps
        if self.stage is not None:
            a = _softmax(self.stage, x) * (2 if normalized else 1)
            ps, kept = a[..., :1] * ps, a[..., 1:] * kept
        everywhere = torch.ones_like(ps, dtype=torch.bool)
        return Gated(torch.cat((ps, kept), -1), torch.cat((everywhere, chosen), -1), pr)

    def probabilities(self, x: Tensor) -> Tensor:
        """The routed heads' pr (B, L, E) for x (B, L, dim), in fp32."""
        assert self.routed is not None
        return _softmax(self.routed, x)


class QueryRouter(nn.Module):
    """Steps 7 to 10: no parameters; a head's logit is the norm of its query vector.

    Logits are divided by their deviation over the E routed heads of the token (unbiased), so that a
    factor on all queries changes nothing. Gates are 0 or 1; backward they pass their gradient to pr
    (straight-through), on the chosen heads only, or on "all" routed ones, whose outputs are then
    needed.

    Args:
        shared: h_s.
        routed: E.
        active: K.
        gradient: "selected" or "all".
    """

    def __init__(
        self, shared: int, routed: int, active: int, gradient: Literal["selected", "all"]
    ) -> None:
        super().__init__()
        self.counts, self.gradient = (shared, routed, active), gradient

    def forward(self, q: Tensor) -> Gated:
        """Route by q (B, h, L, D), before or after its rotation."""
        shared, routed, active = self.counts
        logits = torch.linalg.vector_norm(q.to(_wide(q)), dim=-1).transpose(1, 2)[..., shared:]
        if routed > 1:
            logits = logits / (logits.std(-1, keepdim=True) + _EPS)
        pr = logits.softmax(-1)
        chosen = topk_mask(pr.detach(), active)
        through = pr - pr.detach()
        if self.gradient == "selected":
            through = through * chosen
        ones = pr.new_ones(*pr.shape[:-1], shared)
        everywhere = torch.ones_like(ones, dtype=torch.bool)
        gates = torch.cat((ones, chosen + through), -1)
        return Gated(gates, torch.cat((everywhere, chosen), -1), pr)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _softmax(linear: nn.Linear, x: Tensor) -> Tensor:
    """In fp32 or wider: ties and small differences in bf16 would choose at random."""
    work = _wide(x)
    return functional.linear(x.to(work), linear.weight.to(work)).softmax(-1)
