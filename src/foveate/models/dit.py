"""A small diffusion transformer for images and videos, with attention on the grid of patches.

Blocks are those of DiT (Peebles and Xie 2022, arXiv 2212.09748): attention and feed-forward behind
norms whose shift, scale and gate come from the diffusion step. Positions are added to the patches
before any layer, and text tokens, where there are any, stand behind the grid's and see everything.
Tokens are put in the order of the attention's tiles once, before the first block, and back once,
behind the last one, where all layers agree on tiles (arXiv 2504.16922, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods import make
from foveate.methods.fna import FNA
from foveate.methods.rectified_spaattn import RectifiedSpaAttn
from foveate.methods.vmoba import VMoBA
from foveate.nn import Attention
from foveate.ops.errors import InputError
from foveate.ops.layout.grid import GridLayout
from foveate.parts.attention import Attention as Method
from foveate.parts.context import Context, Phase


class DiT(nn.Module):
    """x (B, channels, *sizes) and a step (B,) to a prediction of x's shape.

        model = DiT((8, 32, 32), patch=(1, 2, 2), channels=4, attention="gna(window=(4, 8, 8))")
        noise = model(torch.randn(2, 4, 8, 32, 32), torch.tensor([10.0, 500.0]))

    Args:
        sizes: of an image (height, width) or a video (frames, height, width).
        patch: of a token, on each axis.
        channels: numbers in each pixel or latent.
        dim: width.
        depth: blocks.
        num_heads: heads of each.
        attention: of all blocks, or one for each: texts of the catalog or attentions; `fna`, `gna`,
            `vmoba` and `rectified-spaattn` are told the grid.
        text_tokens: tokens of text with every sample.
        text_dim: their width.

    Raises:
        InputError: sizes that don't fit together.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        patch: tuple[int, ...],
        channels: int = 3,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        attention: str | Method | list[str | Method] = "full",
        text_tokens: int = 0,
        text_dim: int = 0,
    ) -> None:
        super().__init__()
        if len(sizes) != len(patch) or any(n % p for n, p in zip(sizes, patch)):
            raise InputError(f"DiT: patches of {patch} don't cut {sizes} evenly.")
        if bool(text_tokens) != bool(text_dim):
            raise InputError("DiT: give text_tokens and text_dim, or neither.")
        self.sizes, self.patch, self.channels = sizes, patch, channels
        self.grid = tuple(n // p for n, p in zip(sizes, patch))
        self.text_tokens = text_tokens
        inner = channels * math.prod(patch)
        self.embed = nn.Linear(inner, dim)
        self.text = nn.Linear(text_dim, dim) if text_dim else None
        self.step = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(_Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.last = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, inner)
        self.register_buffer("places", _places(self.grid, dim), persistent=False)
        for layer in (self.last, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.swap(attention)

    places: Tensor

    def swap(self, attention: str | Method | list[str | Method]) -> DiT:
        """Let the blocks attend otherwise; the weights stay. One attention for all, or for each.

        Raises:
            InputError: another number of attentions than blocks, or a grid that they don't fit.
        """
        given = attention if isinstance(attention, list) else [attention] * len(self.blocks)
        if len(given) != len(self.blocks):
            raise InputError(f"DiT: {len(given)} attentions for {len(self.blocks)} blocks.")
        for block, one in zip(self.blocks, given):
            method = make(one) if isinstance(one, str) else one
            if isinstance(method, FNA | VMoBA | RectifiedSpaAttn):
                method = replace(method, shape=self.grid, after=self.text_tokens)
            assert isinstance(block, _Block)
            block.attention.attention = method
        return self

    def order(self, device: torch.device | str = "cpu") -> Tensor | None:
        """(N,) the tokens in the order of tiles that all layers agree on; None if they don't."""
        found: GridLayout | None = None
        for block in self.blocks:
            assert isinstance(block, _Block)
            method = block.attention.attention
            if not isinstance(method, FNA):
                return None
            mask = method.on(self.grid)
            if any(axis.dilation > 1 for axis in mask.axes) or all(a.whole for a in mask.axes):
                return None
            tiles = method.tiles(mask, device)
            if found is not None and not torch.equal(tiles.q_slots, found.q_slots):
                return None
            found = tiles
        return None if found is None else found.q_slots[found.q_slots >= 0]

    def forward(
        self,
        x: Tensor,
        step: Tensor,
        text: Tensor | None = None,
        done: float | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: (B, channels, *sizes).
            step: (B,) of the diffusion.
            text: (B, text_tokens, text_dim).
            done: share of a sampling's steps that are done, for attentions that begin dense.

        Returns:
            (B, channels, *sizes).
        """
        self._check(x, text)
        tokens = self.embed(self._cut(x)) + self.places
        if self.text is not None and text is not None:
            tokens = torch.cat((tokens, self.text(text)), 1)
        order = self.order(x.device)
        phase: Phase = "train" if self.training else "prefill"
        ctx = Context(grid=self.grid, q_positions=order, kv_positions=order, phase=phase, step=done)
        if order is not None:
            tokens = tokens[:, order]
        known = self.step(_waves(step, tokens.shape[-1]).to(tokens.dtype))
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, known, replace(ctx, layer=number))
        if order is not None:
            tokens = torch.empty_like(tokens).index_copy(1, order, tokens)
        tokens = tokens[:, : math.prod(self.grid)]
        shift, scale = self.last(functional.silu(known))[:, None].chunk(2, -1)
        return self._join(self.out(self.norm(tokens) * (1 + scale) + shift))

    def _check(self, x: Tensor, text: Tensor | None) -> None:
        want = (self.channels, *self.sizes)
        if tuple(x.shape[1:]) != want:
            raise InputError(f"DiT: expected x (B, {str(want)[1:-1]}), got {tuple(x.shape)}.")
        if (text is not None) != bool(self.text_tokens):
            raise InputError(f"DiT: it was made for {self.text_tokens} tokens of text.")
        if text is not None and text.shape[1] != self.text_tokens:
            raise InputError(
                f"DiT: expected {self.text_tokens} tokens of text, got {text.shape[1]}."
            )

    def _cut(self, x: Tensor) -> Tensor:
        """(B, C, *sizes) to (B, N, C * prod patch)."""
        rank = len(self.grid)
        for axis in reversed(range(rank)):
            x = x.unflatten(2 + axis, (self.grid[axis], self.patch[axis]))
        outer = [2 + 2 * axis for axis in range(rank)]
        inner = [3 + 2 * axis for axis in range(rank)]
        return x.permute(0, *outer, 1, *inner).flatten(1, rank).flatten(2)

    def _join(self, tokens: Tensor) -> Tensor:
        """The way back."""
        rank = len(self.grid)
        x = tokens.unflatten(2, (self.channels, *self.patch)).unflatten(1, self.grid)
        pairs = [at for axis in range(rank) for at in (1 + axis, 2 + rank + axis)]
        x = x.permute(0, 1 + rank, *pairs)
        return x.reshape(len(tokens), self.channels, *self.sizes)


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(dim, num_heads, position="none", bias=True, out_bias=True)
        self.feedforward_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.known = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.known.weight)
        nn.init.zeros_(self.known.bias)

    def forward(self, x: Tensor, known: Tensor, ctx: Context) -> Tensor:
        parts = self.known(functional.silu(known))[:, None].chunk(6, -1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = parts
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, ctx=ctx).y
        inner = self.feedforward_norm(x) * (1 + scale_ff) + shift_ff
        return x + gate_ff * self.feedforward(inner)


def _waves(at: Tensor, dim: int) -> Tensor:
    """(n,) numbers as (n, dim) cosines and sines of falling frequency (Vaswani et al. 2017)."""
    half = dim // 2
    rate = torch.exp(-math.log(10_000.0) * torch.arange(half, device=at.device) / max(1, half))
    angle = at.float()[:, None] * rate
    return functional.pad(torch.cat((angle.cos(), angle.sin()), 1), (0, dim - 2 * half))


def _places(grid: tuple[int, ...], dim: int) -> Tensor:
    """(N, dim) positions: each axis has its share of the numbers."""
    share = dim // len(grid) // 2 * 2
    where = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    parts = [_waves(one.flatten(), share) for one in where]
    return functional.pad(torch.cat(parts, 1), (0, dim - share * len(grid)))
