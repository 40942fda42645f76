"""ULSAM: each group of a feature map's channels is weighted by one spatial map of its own.

    A_n = softmax over h w of PW1(maxpool3x3,1(DW1x1(F_n))),  F^_n = A_n F_n + F_n          (2), (3)

for groups (subspaces) F_n of m / g neighbouring channels, n = 1 ... g; nothing is shared or mixed
between groups, and the module has 2 m weights besides biases and norms. The released code has a
batch norm and a ReLU behind both convolutions; the paper's formula doesn't show them.

    module = make("ulsam(groups=4)").build(512)
    y = module(x)                              # (B, 512, h, w), as x

Source: Saini et al. 2020, arXiv 2006.15102.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole


@dataclass(frozen=True)
class ULSAM:
    """The hyper-parameters of subspace attention; `build` makes the module.

    Attributes:
        groups: g, subspaces, a divisor of the channels (paper: 4 on ImageNet, 1 to 16 studied).
        norm_act: batch norm and ReLU behind both convolutions, as the released code has them.
        momentum: of the batch norms' running averages (the release: 0.9, which in torch's meaning
            takes nine tenths of each new batch).
        gain: "one" as in the paper: maps sum to 1, so that 1 + A is near 1 on large maps; our
            addition "positions": maps of mean 1, A h w.

    Raises:
        InputError: a field that doesn't fit.
    """

    groups: int = 4
    norm_act: bool = True
    momentum: float = 0.1
    gain: str = "one"

    def __post_init__(self) -> None:
        whole("ULSAM", "groups", self.groups, least=1)
        if not 0 < self.momentum <= 1:
            raise InputError(f"ULSAM(momentum={self.momentum}): expected above 0, at most 1.")
        if self.gain not in ("one", "positions"):
            raise InputError(f"ULSAM(gain={self.gain!r}): expected 'one' or 'positions'.")

    def build(self, channels: int) -> SubspaceAttention:
        """The module for maps of so many channels, with fresh weights.

        Raises:
            InputError: the groups don't divide them.
        """
        return SubspaceAttention(channels, self)


class SubspaceAttention(nn.Module):
    """x (B, channels, h, w) to y of the same shape; see the module's text.

    All groups run at once: a depthwise convolution, a max-pool, and a convolution in g groups with
    one output each.

    Args:
        channels: m.
        hyper: the hyper-parameters.

    Raises:
        InputError: the groups don't divide the channels.
    """

    def __init__(self, channels: int, hyper: ULSAM) -> None:
        super().__init__()
        whole("SubspaceAttention", "channels", channels, least=1)
        if channels % hyper.groups:
            raise InputError(
                f"ULSAM(groups={hyper.groups}): doesn't divide {channels} channels; take a divisor."
            )
        self.channels, self.hyper = channels, hyper
        g = hyper.groups
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels)
        self.pointwise = nn.Conv2d(channels, g, 1, groups=g)
        norms = hyper.norm_act
        self.depthwise_norm = nn.BatchNorm2d(channels, momentum=hyper.momentum) if norms else None
        self.pointwise_norm = nn.BatchNorm2d(g, momentum=hyper.momentum) if norms else None

    def maps(self, x: Tensor) -> Tensor:
        """A (B, g, h, w) in fp32 or wider: one map for each subspace, each sums to 1."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise InputError(
                f"SubspaceAttention: expected x (B, {self.channels}, h, w), got {tuple(x.shape)}."
            )
        t = _followed(self.depthwise(x), self.depthwise_norm)
        t = nn.functional.max_pool2d(t, 3, stride=1, padding=1)  # what is padded is -inf
        z = _followed(self.pointwise(t), self.pointwise_norm)
        wide = torch.promote_types(z.dtype, torch.float32)
        return z.flatten(2).to(wide).softmax(-1).view_as(z)

    def forward(self, x: Tensor) -> Tensor:
        """(1 + A_n) F_n of each group."""
        maps = self.maps(x)
        if self.hyper.gain == "positions":
            maps = maps * (x.shape[2] * x.shape[3])
        parts = x.unflatten(1, (self.hyper.groups, -1))
        return (parts * (1 + maps)[:, :, None]).flatten(1, 2).to(x.dtype)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{self.channels}, {self.hyper}"


def _followed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """What follows a convolution: norm and ReLU, or nothing."""
    return x if norm is None else nn.functional.relu(norm(x))
