"""Training Flux's routers: both branches run, mixed by a noisy decision that gradients go through.

    y = softmax((logits + G) / tau),  G Gumbel noise
    r = onehot(argmax y)[1] + (y[1] - stopgrad(y[1]))
    O = r FA(Q, K, V) + (1 - r) SA(Q, K, V),     Omega = 1 - mean over layers of r
    tau = 1 + (1 + cos(pi step / 0.6 S)) / 4 in the first 60 % of S steps, then 1

    loss = CE + mean over task classes c of the mean over its sequences of
           lambda1_c |Omega - t_c| + lambda2_c (Omega - t_c)^2,

the lambdas going up the gradient. Flux Attention, arXiv 2604.07394 (the straight-through form is
its released code's; `soft` mixes by y[1] as in its figure).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foveate.methods.flux.router import FULL, Routers, pooled
from foveate.ops import AttentionOutput, attention, mix
from foveate.parts.attention import Attention, mask_layout
from foveate.parts.context import Context

if TYPE_CHECKING:
    from foveate.methods.flux.pattern import Flux

TARGETS = {"retrieval": 0.45, "prose": 1.0}  # t_c, the sparsity that a class is pulled to


def temperature(step: int, steps: int) -> float:
    """The temperature tau at a step of so many."""
    end = 0.6 * steps
    return 1.0 if step >= end else 1.0 + 0.25 * (1.0 + math.cos(math.pi * step / end))


def gumbel(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """-log(-log U), U uniform in (0, 1), in float64 on the CPU."""
    u = torch.rand(shape, generator=random, dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    return -(-u.clamp_min(tiny).log()).clamp_min(tiny).log()


def relaxed(logits: Tensor, noise: Tensor | None, tau: float, *, soft: bool = False) -> Tensor:
    """Decisions r (B,) from logits (B, 2): y[1], or 0 or 1 with the gradient of y[1]."""
    y = torch.softmax((logits if noise is None else logits + noise.to(logits)) / tau, -1)
    odds = y[..., FULL]
    if soft:
        return odds
    hard = (y.argmax(-1) == FULL).to(y.dtype)
    return hard + (odds - odds.detach())


@dataclass(eq=False)
class Mixing(Attention):
    """Both branches on the same q, k, v, mixed by the routers' decision.

    Attributes:
        method: whose sparse branch and pooling it is.
        routers: that are trained.
        prompt: tokens of each sequence's prompt, which is what the router looks at.
        tau: temperature.
        random: of the Gumbel noise; None adds none.
        soft: mix by y[1] instead of straight through.
        u: pooled queries, by layer, (B, d).
        r: what was decided, by layer, (B,).
    """

    wants_query_rope = True

    method: Flux
    routers: Routers
    prompt: tuple[int, ...]
    tau: float = 1.0
    random: torch.Generator | None = None
    soft: bool = False
    u: dict[int, Tensor] = field(default_factory=dict)
    r: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`; sequences have no padding."""
        ctx = Context() if ctx is None else ctx
        rows = [torch.arange(n, device=q.device) for n in self.prompt]
        u = self.u[ctx.layer] = pooled(q, ctx, rows, self.method.pool)
        logits = self.routers.logits(ctx.layer, u)
        noise = None if self.random is None else gumbel(tuple(logits.shape), self.random)
        r = relaxed(logits, noise, self.tau, soft=self.soft)
        self.r[ctx.layer] = r
        full = attention(q, k, v, layout=mask_layout(ctx.mask, q, k, ctx), **ctx.options)
        seen = mask_layout(self.method.sparse(ctx.mask), q, k, ctx)
        sparse = attention(q, k, v, layout=seen, **ctx.options)
        gate = r.to(full.out.dtype)[:, None, None]
        out = mix((gate, 1 - gate), (full.out, sparse.out))
        return AttentionOutput(out, full.lse)

    @property
    def sparsity(self) -> Tensor:
        """Omega (B,), of the layers that have run."""
        return 1.0 - torch.stack(list(self.r.values())).mean(0)


class Multipliers(nn.Module):
    """lambda1 and lambda2 of each task class; trained by going up the gradient."""

    def __init__(self, random: torch.Generator | None = None) -> None:
        super().__init__()
        shape = (len(TARGETS), 2)
        self.values = nn.Parameter(0.5 * torch.rand(shape, generator=random))

    def constraint(self, sparsity: Tensor, task: tuple[str, ...]) -> Tensor:
        """The second part of the loss, from Omega (B,) and each sequence's class."""
        total, present = sparsity.new_zeros(()), 0
        for number, (name, target) in enumerate(TARGETS.items()):
            mine = [i for i, one in enumerate(task) if one == name]
            if not mine:
                continue
            present += 1
            gap = sparsity[mine] - target
            first, second = self.values[number]
            total = total + (first * gap.abs() + second * gap**2).mean()
        return total / max(1, present)


def optimizer_of(
    routers: Routers, multipliers: Multipliers, lr: float, lr_multipliers: float
) -> torch.optim.AdamW:
    """AdamW with the multipliers in a group of their own that goes up."""
    return torch.optim.AdamW(
        [
            {"params": list(routers.parameters()), "lr": lr, "weight_decay": 0.1},
            {"params": list(multipliers.parameters()), "lr": lr_multipliers, "weight_decay": 0.0,
             "maximize": True},
        ],
        betas=(0.9, 0.95),
    )  # fmt: skip


def learning_rate(step: int, steps: int, warmup: float = 0.2) -> float:
    """The share of the highest rate at a step: up over the warm-up, then down a cosine."""
    rise = max(1.0, warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, steps - rise))))
