"""BiFormer: a backbone of four stages of bi-level routing attention, for images.

    x = x + DWConv3x3(x);  x = x + BRA(LN(x));  x = x + MLP(LN(x))           (a block)

Two strided convolutions make tokens of 4 x 4 pixels, and one between stages halves the sides. The
first three stages route, at 224 pixels each query to 64 keys; the last attends to all of 7 x 7.

    model = biformer_tiny(classes=10)
    logits = model(images)                     # (B, 10)
    maps = model.features(images)              # 4 maps of 1/4 ... 1/32 of the sides
    backbone = biformer_small(pyramid=True)    # returns those, normed, for a feature pyramid

Names of modules are those of the released code, so that weights of its T, S and B load (build with
pad="reference" for its padding); methods are those that timm's models have.

Source: Zhu et al. 2023, arXiv 2303.08810, section 4 and table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.nn.biformer import BiLevelRoutingAttention, GridAttention, Pad
from foveate.ops.errors import InputError

STAGES = 4
WITH_LEPE, PLAIN, CONVOLUTION = -2, -1, 0
"""Codes of `topk`: attention to all tokens with LePE, without it, or a convolution in its place."""


class BiFormer(nn.Module):
    """Images (B, channels, H, W) to logits (B, classes), or to maps of features.

    Args:
        depths: blocks of each of four stages.
        dims: widths of each.
        classes: of the head; 0 is no head, and `forward` returns the mean feature.
        channels: of a pixel.
        topk: of each stage: regions that a region sees, or -2, -1 or 0: see the codes above.
        regions: on each side, for all stages or each of them. At 224 pixels 7; for dense prediction
            a number that keeps regions of a similar size, such as 16 at 512 pixels.
        head_dim: width of a head of routing attention.
        mlp_ratio: hidden width of MLPs over the width.
        stem: "convolutions", or "patches" as in Swin-T: a 4 x 4 convolution, between stages a norm
            and a 2 x 2 one.
        positions: side of the positional convolution of each block; 0 is none.
        drop_path: share of samples for which the last block's branches are skipped in training;
            it grows linearly from 0 at the first.
        lepe_on: in the last stage, "input" (the release) or "value" (its later code).
        pad: where regions don't divide sides; see `foveate.nn.biformer`.
        scale: of routing attention's scores; "reference", "head" or a number.
        pyramid: no head and last norm, but a norm for each stage; `forward` returns the maps.

    Raises:
        InputError: sizes that don't fit together.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        classes: int = 1000,
        channels: int = 3,
        *,
        topk: Sequence[int] = (1, 4, 16, WITH_LEPE),
        regions: int | Sequence[int] = 7,
        head_dim: int = 32,
        mlp_ratio: float = 3,
        stem: Literal["convolutions", "patches"] = "convolutions",
        positions: int = 3,
        drop_path: float = 0.0,
        lepe_on: Literal["input", "value"] = "input",
        pad: Pad = "masked",
        scale: float | str = "reference",
        pyramid: bool = False,
    ) -> None:
        super().__init__()
        each = [regions] * STAGES if isinstance(regions, int) else list(regions)
        for name, given in (("depths", depths), ("dims", dims), ("topk", topk), ("regions", each)):
            if len(given) != STAGES:
                raise InputError(f"BiFormer({name}={tuple(given)}): expected {STAGES} numbers.")
        if stem not in ("convolutions", "patches"):
            raise InputError(f"BiFormer(stem={stem!r}): expected 'convolutions' or 'patches'.")
        if positions and (positions < 0 or positions % 2 == 0):
            raise InputError(f"BiFormer(positions={positions}): expected an odd side, or 0.")
        if not 0 <= drop_path < 1:
            raise InputError(f"BiFormer(drop_path={drop_path}): expected 0 to below 1.")
        self.dims, self.channels, self.num_classes = tuple(dims), channels, classes
        self.num_features, self.recompute = dims[-1], False
        self.feature_info = [
            {"num_chs": width, "reduction": 4 << i, "module": f"stages.{i}"}
            for i, width in enumerate(dims)
        ]
        self.downsample_layers = nn.ModuleList(_downsampling(stem, channels, self.dims))
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, dims)):
            start = sum(depths[:i])
            self.stages.append(
                nn.Sequential(
                    *(
                        Block(
                            width,
                            _mixing(width, topk[i], each[i], head_dim, lepe_on, pad, scale),
                            int(mlp_ratio * width),
                            positions,
                            rate,
                        )
                        for rate in rates[start : start + depth]
                    )
                )
            )
        self.extra_norms = nn.ModuleList(_Norm2d(width) for width in dims) if pyramid else None
        self.norm = None if pyramid else nn.BatchNorm2d(dims[-1])
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(0 if pyramid else classes)
        self.apply(_initialise)

    # -- what timm's models have -----------------------------------------------------------------
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head; 0 classes is none."""
        if global_pool not in (None, "", "avg"):
            raise InputError(f"BiFormer(global_pool={global_pool!r}): it pools by the mean, 'avg'.")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        _initialise(self.head)

    def no_weight_decay(self) -> set[str]:
        """Parameters without decay, besides biases and norms."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a training step computes blocks again in the backward, to save memory."""
        self.recompute = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of chosen stages, as timm asks for them.

        Args:
            x: (B, channels, H, W).
            indices: of the stages; a number is that many last ones, None all.
            norm: the last stage's map goes through the last norm.
            stop_early: leave out the stages behind the last that is asked for.
            output_fmt: "NCHW" is the only one.
            intermediates_only: return the maps alone.

        Returns:
            The maps, or (the last stage's normed map, the maps).
        """
        if output_fmt != "NCHW":
            raise InputError(f"BiFormer(output_fmt={output_fmt!r}): expected 'NCHW'.")
        chosen = self._indices(indices)
        last = max(chosen) + 1 if stop_early and intermediates_only else len(self.stages)
        maps = self._maps(x, last)
        final = self._normed(maps[-1]) if last == STAGES else maps[-1]
        found = [final if norm and i == STAGES - 1 else maps[i] for i in chosen]
        return found if intermediates_only else (final, found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages behind the last that is asked for, and norm and head if told; in place.

        Returns:
            The stages that are asked for.
        """
        chosen = self._indices(indices)
        self.stages = self.stages[: max(chosen) + 1]
        self.downsample_layers = self.downsample_layers[: max(chosen) + 1]
        self.num_features = self.dims[len(self.stages) - 1]
        if prune_norm or len(self.stages) < STAGES:
            self.norm = None
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def _indices(self, given: int | Sequence[int] | None) -> list[int]:
        count = len(self.stages)
        if given is None or isinstance(given, int):
            chosen = list(range(count))[-(count if given is None else given) :]
        else:
            chosen = list(given)
        if not chosen or given == 0 or any(not -count <= i < count for i in chosen):
            raise InputError(f"BiFormer(indices={given!r}): stages are 0 to {count - 1}.")
        return [i % count for i in chosen]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's normed map, (B, width, H / 32, W / 32)."""
        return self._normed(self._maps(x, len(self.stages))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returns, or its mean."""
        mean = x.mean((2, 3))
        return mean if pre_logits else self.head(mean)

    # --------------------------------------------------------------------------------------------
    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of all stages, (B, width, H / 4, W / 4) first; normed in a `pyramid`."""
        maps = self._maps(x, len(self.stages))
        if self.extra_norms is not None:
            maps = [norm(one) for norm, one in zip(self.extra_norms, maps)]
        return tuple(maps)

    def forward(self, x: Tensor) -> Any:
        """Logits (B, classes), the mean feature (B, width) without a head, or a pyramid's maps."""
        if self.extra_norms is not None:
            return self.features(x)
        return self.forward_head(self.forward_features(x))

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _maps(self, x: Tensor, count: int) -> list[Tensor]:
        if x.dim() != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < 1:
            raise InputError(
                f"BiFormer: expected images (B, {self.channels}, H, W), got {tuple(x.shape)}."
            )
        maps = []
        for smaller, stage in zip(self.downsample_layers[:count], self.stages[:count]):
            x = smaller(x)
            for block in stage.children():
                again = self.recompute and torch.is_grad_enabled()
                x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            maps.append(x)
        return maps


class Block(nn.Module):
    """A block on maps (B, C, H, W); see the module's text.

    Args:
        dim: width.
        attention: on (B, H, W, dim).
        hidden: width of the MLP.
        positions: side of the positional convolution; 0 is none.
        drop_path: share of samples without a branch in training.
    """

    def __init__(
        self, dim: int, attention: nn.Module, hidden: int, positions: int, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_embed = (
            nn.Conv2d(dim, dim, positions, padding=positions // 2, groups=dim)
            if positions
            else None
        )
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # The release has a place for one more convolution behind the first map.
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, dim)
        )
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self._some(self.attn(self.norm1(x)))
        x = x + self._some(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)

    def _some(self, branch: Tensor) -> Tensor:
        """In training, the branch for a random part of the samples, scaled up to keep its mean."""
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        kept = torch.empty(len(branch), 1, 1, 1, device=branch.device).bernoulli_(keep)
        return branch * (kept / keep).to(branch.dtype)


class _Norm2d(nn.LayerNorm):
    """A norm over the channels of maps (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Convolution(nn.Sequential):
    """What stands in for attention where topk is 0: 1 x 1, depthwise 5 x 5, 1 x 1."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Identity(),  # the release turns axes here
            nn.Conv2d(dim, dim, 1),
            nn.Conv2d(dim, dim, 5, padding=2, groups=dim),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        for part in self:
            x = part(x)
        return x.permute(0, 2, 3, 1)


def _mixing(
    dim: int, topk: int, regions: int, head_dim: int, lepe_on: Any, pad: Pad, scale: float | str
) -> nn.Module:
    if topk == CONVOLUTION:
        return _Convolution(dim)
    if topk in (WITH_LEPE, PLAIN):
        return GridAttention(dim, lepe=5 if topk == WITH_LEPE else 0, lepe_on=lepe_on)
    if topk < 0 or dim % head_dim:
        raise InputError(
            f"BiFormer: topk={topk} at a width of {dim} with heads of {head_dim}; expected topk of "
            "1 or more, or -2, -1, 0, and a width that is a multiple of head_dim."
        )
    return BiLevelRoutingAttention(dim, dim // head_dim, regions, topk, pad=pad, scale=scale)


def _downsampling(stem: str, channels: int, dims: tuple[int, ...]) -> list[nn.Sequential]:
    if stem == "patches":
        first = nn.Sequential(nn.Conv2d(channels, dims[0], 4, stride=4), nn.BatchNorm2d(dims[0]))
        return [first] + [
            nn.Sequential(nn.BatchNorm2d(a), nn.Conv2d(a, b, 2, stride=2))
            for a, b in zip(dims, dims[1:])
        ]
    half = dims[0] // 2
    first = nn.Sequential(
        nn.Conv2d(channels, half, 3, stride=2, padding=1),
        nn.BatchNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, dims[0], 3, stride=2, padding=1),
        nn.BatchNorm2d(dims[0]),
    )
    return [first] + [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b))
        for a, b in zip(dims, dims[1:])
    ]


def _initialise(module: nn.Module) -> None:
    """Linear maps normal with a deviation of 0.02, no bias; the rest as torch makes it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def biformer_tiny(classes: int = 1000, **more: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 G multiply-adds at 224 pixels."""
    return BiFormer((2, 2, 8, 2), (64, 128, 256, 512), classes, **more)


def biformer_small(classes: int = 1000, **more: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 G multiply-adds at 224 pixels."""
    return BiFormer((4, 4, 18, 4), (64, 128, 256, 512), classes, **more)


def biformer_base(classes: int = 1000, **more: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 G multiply-adds at 224 pixels."""
    return BiFormer((4, 4, 18, 4), (96, 192, 384, 768), classes, **more)


def biformer_stl(classes: int = 1000, **more: Any) -> BiFormer:
    """Swin-T's layout with routing attention: 28.4 M parameters, 4.6 G multiply-adds."""
    given: dict[str, Any] = {"mlp_ratio": 4, "stem": "patches", "positions": 0}
    return BiFormer((2, 2, 6, 2), (96, 192, 384, 768), classes, **(given | more))
