"""MobileNets V1 and V2 with subspace attention (ULSAM) beside their blocks, or in their place.

A block whose output has the shape of its input (stride 1, as many channels) may be replaced by
ULSAM, which saves its weights; behind any block it may be added, which costs next to none.

    MobileNetV1(replace=(8,), ulsam="ulsam(groups=4)")      # 4.2 M to 3.9 M parameters
    MobileNetV2(replace=(12,))                              # one of the blocks of 96 channels

Blocks are numbered from 0, the stem not counted: `replaceable` lists those that may be replaced. In
V1 the paper replaces one of the five of 512 channels, 6 to 10; in V2 repeated ones of 64 (7 to 9),
96 (11, 12) and 160 (14, 15) channels. V2's modules are named as torchvision's, so that its weights
load where nothing is changed.

Source: Howard et al. 2017, arXiv 1704.04861; Sandler et al. 2018, arXiv 1801.04381; Saini et al.
2020, arXiv 2006.15102.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from foveate.methods import make
from foveate.methods.ulsam import ULSAM
from foveate.ops.errors import InputError

V1_PLAN = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1),
    (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""(channels, stride) of V1's blocks."""

V2_PLAN = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
"""(expansion, channels, blocks, stride of the first) of V2's groups of blocks."""


class Place(NamedTuple):
    """A block's channels before and behind it, and its stride."""

    inner: int
    outer: int
    stride: int

    @property
    def replaceable(self) -> bool:
        """Whether its output has the shape of its input."""
        return self.stride == 1 and self.inner == self.outer


class _MobileNet(nn.Module):
    """What both share: blocks of which some are ULSAM, or have it behind them."""

    places: tuple[Place, ...]

    def _prepare(
        self, places: Sequence[Place], replace: Sequence[int], after: Sequence[int], channels: int
    ) -> None:
        name = type(self).__name__
        self.places, self.channels = tuple(places), channels
        for field, given in (("replace", replace), ("after", after)):
            if len(set(given)) < len(given) or any(not 0 <= i < len(places) for i in given):
                raise InputError(
                    f"{name}({field}={tuple(given)}): expected different numbers of blocks, 0 to "
                    f"{len(places) - 1}."
                )
        wrong = [i for i in replace if not places[i].replaceable]
        if wrong:
            raise InputError(
                f"{name}(replace={tuple(replace)}): the output of block {wrong[0]} has another "
                f"shape than its input; expected some of {self.replaceable}."
            )

    @property
    def replaceable(self) -> tuple[int, ...]:
        """Numbers of the blocks that ULSAM can replace."""
        return tuple(i for i, place in enumerate(self.places) if place.replaceable)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise InputError(
                f"{type(self).__name__}: expected images (B, {self.channels}, H, W), got "
                f"{tuple(x.shape)}."
            )


class MobileNetV1(_MobileNet):
    """Images (B, channels, H, W) to logits (B, classes): depthwise-separable blocks.

    Args:
        classes: of the head.
        width: multiplier of all channels, such as 0.75 or 0.5.
        replace: blocks that are ULSAM instead.
        after: blocks that ULSAM follows.
        ulsam: the module, a text of the catalog or an `ULSAM`.
        channels: of a pixel.
        plan: (channels, stride) of each block, for networks of other sizes.
        stem: (channels, stride) of the first convolution.

    Raises:
        InputError: blocks that can't be replaced, or channels that the groups don't divide.
    """

    def __init__(
        self,
        classes: int = 1000,
        width: float = 1.0,
        *,
        replace: Sequence[int] = (),
        after: Sequence[int] = (),
        ulsam: str | ULSAM = "ulsam",
        channels: int = 3,
        plan: Sequence[tuple[int, int]] = V1_PLAN,
        stem: tuple[int, int] = (32, 2),
    ) -> None:
        super().__init__()
        widths = [int(c * width) for c in (stem[0], *(c for c, _ in plan))]
        places = [Place(a, b, s) for a, b, (_, s) in zip(widths, widths[1:], plan)]
        self._prepare(places, replace, after, channels)
        hyper = _hyper(ulsam)
        self.stem = _convolution(channels, widths[0], 3, stem[1], act=nn.ReLU)
        self.blocks = nn.ModuleList()
        for i, place in enumerate(places):
            block = hyper.build(place.inner) if i in replace else _separable(place)
            more = [hyper.build(place.outer)] if i in after else []
            self.blocks.append(nn.Sequential(block, *more) if more else block)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        self._check(x)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class MobileNetV2(_MobileNet):
    """Images (B, channels, H, W) to logits (B, classes): inverted residuals.

    Args:
        classes: of the head.
        width: multiplier of all channels; they are rounded to multiples of 8.
        replace: blocks that are ULSAM instead.
        after: blocks that ULSAM follows.
        ulsam: the module, a text of the catalog or an `ULSAM`.
        channels: of a pixel.
        dropout: before the head.

    Raises:
        InputError: blocks that can't be replaced, or channels that the groups don't divide.
    """

    def __init__(
        self,
        classes: int = 1000,
        width: float = 1.0,
        *,
        replace: Sequence[int] = (),
        after: Sequence[int] = (),
        ulsam: str | ULSAM = "ulsam",
        channels: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        first = inner = _rounded(32 * width)
        places, expansions = [], []
        for expansion, outer, count, stride in V2_PLAN:
            outer = _rounded(outer * width)
            for n in range(count):
                places.append(Place(inner, outer, stride if n == 0 else 1))
                expansions.append(expansion)
                inner = outer
        self._prepare(places, replace, after, channels)
        hyper = _hyper(ulsam)
        last = _rounded(1280 * max(1.0, width))
        blocks: list[nn.Module] = []
        for i, (place, expansion) in enumerate(zip(places, expansions)):
            block = hyper.build(place.inner) if i in replace else _Inverted(place, expansion)
            more = [hyper.build(place.outer)] if i in after else []
            blocks.append(nn.Sequential(block, *more) if more else block)
        self.features = nn.Sequential(
            _convolution(channels, first, 3, 2), *blocks, _convolution(inner, last, 1)
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        self._check(x)
        return self.classifier(self.features(x).mean((2, 3)))


class _Inverted(nn.Module):
    """1 x 1 to more channels, depthwise 3 x 3, 1 x 1 back; with a residual where shapes agree."""

    def __init__(self, place: Place, expansion: int) -> None:
        super().__init__()
        hidden = place.inner * expansion
        wider = [_convolution(place.inner, hidden, 1)] if expansion != 1 else []
        self.residual = place.replaceable
        self.conv = nn.Sequential(
            *wider,
            _convolution(hidden, hidden, 3, place.stride, groups=hidden),
            nn.Conv2d(hidden, place.outer, 1, bias=False),
            nn.BatchNorm2d(place.outer),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _separable(place: Place) -> nn.Sequential:
    """Depthwise 3 x 3, then 1 x 1, a norm and a ReLU behind each."""
    inner, outer, stride = place
    return nn.Sequential(
        *_convolution(inner, inner, 3, stride, groups=inner, act=nn.ReLU),
        *_convolution(inner, outer, 1, act=nn.ReLU),
    )


def _convolution(
    inner: int,
    outer: int,
    side: int,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] = nn.ReLU6,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, outer, side, stride, side // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
        act(),
    )


def _rounded(channels: float) -> int:
    """To the nearest multiple of 8, not below nine tenths (as V2's authors do)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def _hyper(given: str | ULSAM) -> ULSAM:
    made = make(given) if isinstance(given, str) else given
    if not isinstance(made, ULSAM):
        raise InputError(f"{given!r} is no module of subspace attention; expected an 'ulsam(...)'.")
    return made
