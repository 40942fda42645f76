"""A small image backbone of neighborhood attention: NAT, and DiNAT where layers are dilated.

Two strided convolutions make tokens of 4 x 4 pixels; stages of blocks follow, each at half the
sides and twice the width of the one before. Every block sees the window of each token's nearest
ones; with dilation every second block spreads the same window over the whole map.

Source: Hassani et al. 2022, arXiv 2204.07143, figure 4, and 2209.15001, section 3.
"""

from __future__ import annotations

from torch import Tensor, nn

from foveate.nn.neighborhood import NeighborhoodAttention2D
from foveate.ops.errors import InputError


class NAT(nn.Module):
    """Images (B, channels, size, size) to logits (B, classes), or maps of features.

    Args:
        size: pixels of a side, a multiple of 4 that every stage can halve.
        classes: of the head; 0 is no head.
        channels: of a pixel.
        dim: width of the first stage.
        depths: blocks of each stage.
        head_dim: width of a head (paper: 32).
        window: tokens on both axes (paper: 7), at most the side of the last stage's map.
        dilated: every second block takes the largest dilation that fits, as in DiNAT.
        rel_pos_bias: learned biases of relative positions, as in the papers; unfused.

    Raises:
        InputError: sizes that don't fit.
    """

    def __init__(
        self,
        size: int = 64,
        classes: int = 10,
        channels: int = 3,
        dim: int = 32,
        depths: tuple[int, ...] = (2, 2, 2),
        head_dim: int = 16,
        window: int = 3,
        dilated: bool = False,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__()
        smallest = size >> (len(depths) + 1)
        if size != smallest << (len(depths) + 1) or window > smallest:
            raise InputError(
                f"NAT: with {len(depths)} stages a side of {size} pixels ends as {smallest} "
                f"tokens; expected a whole number of at least the window, {window}."
            )
        if dim % head_dim:
            raise InputError(f"NAT: dim={dim} is no multiple of head_dim={head_dim}.")
        self.size, self.channels = size, channels
        self.tokens = nn.Sequential(
            nn.Conv2d(channels, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.stages = nn.ModuleList()
        self.norms = nn.ModuleList()
        self.halves = nn.ModuleList()
        for number, depth in enumerate(depths):
            side, width = size // 4 >> number, dim << number
            far = side // window if dilated else 1
            blocks = [
                _Block(width, width // head_dim, window, far if at % 2 else 1, rel_pos_bias)
                for at in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
            self.norms.append(nn.LayerNorm(width))
            if number + 1 < len(depths):
                self.halves.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False))
        self.head = nn.Linear(dim << (len(depths) - 1), classes) if classes else None

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of all stages, (B, side, side, width) each, the first the largest."""
        want = (self.channels, self.size, self.size)
        if tuple(x.shape[1:]) != want:
            raise InputError(f"NAT: expected x (B, {str(want)[1:-1]}), got {tuple(x.shape)}.")
        x = self.tokens(x).permute(0, 2, 3, 1)
        found = []
        for number, (stage, norm) in enumerate(zip(self.stages, self.norms)):
            if number:
                x = self.halves[number - 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = stage(x)
            found.append(norm(x))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes), or the mean feature (B, width) without a head."""
        mean = self.features(x)[-1].mean((1, 2))
        return mean if self.head is None else self.head(mean)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, dilation: int, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = NeighborhoodAttention2D(
            dim, heads, window, dilation=dilation, rel_pos_bias=bias
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feedforward(self.feedforward_norm(x))
