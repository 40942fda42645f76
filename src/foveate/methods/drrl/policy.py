"""The policy: state, network, masked choice.

    h_t      mean over the segment of ReLU(Conv1d(x: D -> 64, kernel 3, padding 1))
    w_t      mean, variance and Frobenius norm of W_Q, W_K and W_V (9 numbers) -> Linear, 32
    r_{t-1}  embedding of the previous action, 32
    s_t      their concatenation, 128 wide -> 2-layer transformer encoder on this one token
             (4 heads, FFN 256, dropout 0.1) -> Linear 64, ReLU, Linear |R|

Erden 2025, arXiv 2512.15973. Unsafe actions get a logit of -1e9; training samples (with some
probability uniformly among the safe actions), evaluation takes the best.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, WEIGHTS, ACTION, WIDTH = 64, 32, 32, 128
UNSAFE = -1e9


class Choice(NamedTuple):
    """action (B,) indices; log_prob (B,) of them under the masked policy."""

    action: Tensor
    log_prob: Tensor


class Policy(nn.Module):
    """Logits of the actions; one for all layers of a model.

    Args:
        dim: D, width of the layer's input.
        actions: |R|.
        energy: whether the energy ratios of the actions are part of the state.
    """

    steps: Tensor

    def __init__(self, dim: int, actions: int, energy: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, HIDDEN, 3, padding=1)
        self.weights = nn.Linear(9, WEIGHTS)
        self.previous = nn.Embedding(actions, ACTION)
        self.energy = nn.Linear(actions, WIDTH) if energy else None
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 256, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, actions))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Fresh weights, as torch's own modules make them, and counters at 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear | nn.Embedding | nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
        self.steps.zero_()

    def forward(
        self, x: Tensor, weights: Tensor, previous: Tensor, energy: Tensor | None = None
    ) -> Tensor:
        """Logits (B, |R|).

        Args:
            x: (B, T, D), the segment's hidden states.
            weights: (9,) as `weight_features`.
            previous: (B,) index of the previous action.
            energy: (B, |R|) energy ratios, where they are part of the state.
        """
        x = x.to(self.conv.weight.dtype)
        h = F.relu(self.conv(x.mT)).mean(-1)
        w = self.weights(weights.to(h.dtype)).expand(len(x), -1)
        s = torch.cat((h, w, self.previous(previous)), -1)
        if self.energy is not None and energy is not None:
            s = s + self.energy(energy.to(s.dtype))
        return self.head(self.encoder(s[:, None])[:, 0])


@torch.no_grad()
def weight_features(maps: tuple[Tensor, ...]) -> Tensor:
    """Mean, variance and Frobenius norm of each map, nine numbers; zeros where there are none."""
    if not maps:
        return torch.zeros(9)
    found = [
        torch.stack((m.mean(), m.var(unbiased=False), m.square().sum().sqrt()))
        for m in (x.float() for x in maps)
    ]
    return torch.cat(found)


def masked(logits: Tensor, safe: Tensor | None) -> Tensor:
    """Logits with unsafe actions out; safe (B, |R|) bool."""
    return logits if safe is None else logits.masked_fill(~safe, UNSAFE)


def choose(
    logits: Tensor,
    safe: Tensor | None,
    *,
    sample: bool,
    explore: float = 0.0,
    generator: torch.Generator | None = None,
) -> Choice:
    """An action for each sample, by the masked policy.

    Args:
        logits: (B, |R|).
        safe: (B, |R|) bool, or None.
        sample: draw (training), else take the best.
        explore: probability of drawing uniformly from the safe actions instead.
        generator: of the draws.
    """
    log_probs = masked(logits.float(), safe).log_softmax(-1)
    if not sample:
        action = log_probs.argmax(-1)
    else:
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)[:, 0]
        even = torch.ones_like(log_probs) if safe is None else safe.to(log_probs.dtype)
        other = torch.multinomial(even, 1, generator=generator)[:, 0]
        take = torch.rand(len(drawn), generator=generator, device=drawn.device) < explore
        action = torch.where(take, other, drawn)
    return Choice(action, log_probs.gather(1, action[:, None])[:, 0])
