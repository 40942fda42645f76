"""The boundary predictor: from key states to a logit for each position being a chunk's last token.

For position i it takes the w tokens i-w+1 .. i (left) and the w tokens i+1 .. i+w (right), zero
beyond the ends, and runs

    attention over the 2w tokens, LayerNorm;     l, r = pooled left and right halves
    f = [l ; r ; |l - r| ; l * r ; cos(l, r)],   logit_i = W2 relu(W1 f)

DHSA, arXiv 2510.24606. Features are the key states of all key/value heads, side by side, in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

_SEGMENT = 1024  # positions at once, which bounds the memory of their windows


def features(k: Tensor) -> Tensor:
    """Key states (B, Hkv, L, D) as (B, L, Hkv * D) in fp32."""
    return k.transpose(1, 2).flatten(2).float()


class BoundaryPredictor(nn.Module):
    """One small network, shared by all layers.

    Args:
        channels: C, key/value heads times head size.
        look: w, tokens on each side.
        hidden: width of the classifier.
        heads: of the attention over the window; the most of them that divide C are taken.
        gated: pool halves by softmax(g . x) instead of the mean.
    """

    def __init__(
        self, channels: int, look: int = 4, hidden: int = 256, heads: int = 8, gated: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("look", look), ("hidden", hidden)):
            whole("BoundaryPredictor", name, value, least=1)
        self.channels, self.look, self.hidden, self.gated = channels, look, hidden, gated
        self.heads = next(h for h in range(min(heads, channels), 0, -1) if channels % h == 0)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.gate = nn.Linear(channels, 1, bias=False) if gated else None
        self.fuse = nn.Linear(4 * channels + 1, hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    @property
    def sizes(self) -> dict[str, int | bool]:
        """What builds one of the same shape."""
        return {
            "channels": self.channels, "look": self.look, "hidden": self.hidden,
            "heads": self.heads, "gated": self.gated,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, L, C) to logits (B, L)."""
        if x.dim() != 3 or x.shape[-1] != self.channels:
            raise InputError(
                f"The boundary predictor takes features (B, L, {self.channels}), got "
                f"{tuple(x.shape)}; was it fitted on another model?"
            )
        length, w = x.shape[1], self.look
        # No position inside the window is encoded, so tokens are projected once for all windows.
        qkv = self.qkv(nn.functional.pad(x, (0, 0, w - 1, w)))
        found = [
            self._windows(qkv[:, at : min(at + _SEGMENT, length) + 2 * w - 1])
            for at in range(0, length, _SEGMENT)
        ]
        return torch.cat(found, 1) if found else x.new_zeros(x.shape[:2])

    def _windows(self, qkv: Tensor) -> Tensor:
        """(B, n + 2w - 1, 3C) to the logits (B, n) of its n windows."""
        w = self.look
        windows = qkv.unfold(1, 2 * w, 1).transpose(2, 3)  # (B, n, 2w, 3C)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for part in windows.split(self.channels, -1)
        )
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        mixed = (weights @ v).transpose(2, 3).flatten(3)
        encoded = self.norm(self.out(mixed))
        left, right = self._pool(encoded[:, :, :w]), self._pool(encoded[:, :, w:])
        cosine = nn.functional.cosine_similarity(left, right, -1)[..., None]
        fused = torch.cat((left, right, (left - right).abs(), left * right, cosine), -1)
        logits: Tensor = self.last(torch.relu(self.fuse(fused)))
        return logits[..., 0]

    def _pool(self, half: Tensor) -> Tensor:
        if self.gate is None:
            return half.mean(2)
        return (torch.softmax(self.gate(half), 2) * half).sum(2)
