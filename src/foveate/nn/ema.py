"""A gated moving average: the plainest recurrent layer, to stand before a search among anchors.

    u = W_u x,   h_t = a h_{t-1} + (1 - a) u_t,   y = W_o (silu(W_g x) h)

with a learnt decay a in (0, 1) for each channel. Superlinear attention (arXiv 2601.18401) needs
layers in front of it that carry what came before into every token, as Mamba-2 does in the paper's
model; this one does it with three maps, and exactly: whole sequences are summed in runs, and tokens
one by one give the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.ops.errors import InputError

RUN = 64


class GatedEMA(nn.Module):
    """x (B, L, dim) -> y (B, L, dim); causal.

    Args:
        dim: width of x and y.
        width: of the state; None is dim.
        shortest, longest: memories at the start, in tokens: 1 / (1 - a), spread over the channels.

    Raises:
        InputError: memories that aren't above 1 and rising.
    """

    def __init__(
        self, dim: int, width: int | None = None, shortest: float = 2.0, longest: float = 256.0
    ) -> None:
        super().__init__()
        if not 1 < shortest <= longest < math.inf:
            raise InputError(
                f"GatedEMA(shortest={shortest}, longest={longest}): expected 1 < shortest <= "
                "longest, in tokens."
            )
        width = dim if width is None else width
        self.memories = (shortest, longest)
        self.inner = nn.Linear(dim, width, bias=False)
        self.gate = nn.Linear(dim, width, bias=False)
        self.out = nn.Linear(width, dim, bias=False)
        self.decay = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays for memories that rise geometrically; maps as torch makes them."""
        low, high = (math.log(m) for m in self.memories)
        memory = torch.linspace(low, high, len(self.decay)).exp()
        self.decay.copy_(torch.logit(1 - 1 / memory))
        for linear in (self.inner, self.gate, self.out):
            linear.reset_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over new tokens.

        Args:
            x: (B, L, dim).
            state: (B, width), h after the tokens before; None at the start.
            real: (B, L) bool, False on padding, which leaves h as it is; None is all real.

        Returns:
            y (B, L, dim) and the state after the last token.
        """
        work = torch.promote_types(x.dtype, torch.float32)
        u = self.inner(x).to(work)
        log = nn.functional.logsigmoid(self.decay.to(work))  # log a
        if real is not None:
            u = u.masked_fill(~real[..., None], 0.0)  # padding may hold anything
        u = u * -torch.expm1(log)
        h = u.new_zeros(len(x), u.shape[2]) if state is None else state.to(work)
        found = []
        for part in range(0, x.shape[1], RUN):
            found.append(_run(u[:, part : part + RUN], h, log, _steps(x, real, part)))
            h = found[-1][:, -1]
        hidden = torch.cat(found, 1).to(x.dtype) if found else u.to(x.dtype)
        return self.out(silu(self.gate(x)) * hidden), h


def _steps(x: Tensor, real: Tensor | None, start: int) -> Tensor:
    """(B or 1, n) how often h was multiplied by a up to each token of a run."""
    n = min(RUN, x.shape[1] - start)
    if real is None:
        return torch.arange(1, n + 1, device=x.device)[None]
    return real[:, start : start + n].cumsum(1)


def _run(u: Tensor, h: Tensor, log: Tensor, steps: Tensor) -> Tensor:
    """The states h after each token of a run: a^s h + sum_i a^(s - s_i) u_i; u (B, n, W)."""
    s = steps.to(u.dtype)
    apart = (s[:, :, None] - s[:, None, :]).clamp_min(0)  # (B', n, n)
    earlier = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=u.device).tril()
    weights = torch.exp(apart[:, None] * log[:, None, None]) * earlier  # (B', W, n, n)
    carried = torch.exp(s[..., None] * log) * h[:, None]
    if len(weights) == 1:  # one product for each channel, the batch as its columns
        return carried + (weights[0] @ u.permute(2, 1, 0).contiguous()).permute(2, 1, 0)
    return carried + (weights @ u.mT[..., None])[..., 0].mT
