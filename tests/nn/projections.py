"""What the tests of projections share: small layers, and an attention written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

import foveate

DIM, HEADS = 48, 4


def layer(projection="mha", dtype=torch.float64, seed=1, **options) -> foveate.Attention:
    """A layer with weights large enough that nothing is lost in rounding."""
    torch.manual_seed(seed)
    made = foveate.Attention(DIM, options.pop("num_heads", HEADS), projection, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made.to(dtype).eval()


def tokens(length=37, batch=2, dtype=torch.float64, seed=2) -> Tensor:
    """x (batch, length, DIM)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=generator, dtype=dtype)


def softmax_attention(q, k, v, scale, causal=True, allowed=None) -> Tensor:
    """softmax(q k^T scale) v with the key/value heads repeated; all by definition."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        rows = torch.arange(scores.shape[-2])[:, None] + scores.shape[-1] - scores.shape[-2]
        scores = scores.masked_fill(torch.arange(scores.shape[-1]) > rows, -torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def rotated(x: Tensor, theta=10_000.0, start=0, interleaved=False) -> Tensor:
    """RoPE by complex numbers: pair p of position t is multiplied by exp(i t theta^(-2p/D))."""
    half = x.shape[-1] // 2
    angle = torch.arange(start, start + x.shape[-2])[:, None] * theta ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    turn = torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        pairs = torch.complex(x[..., ::2].double(), x[..., 1::2].double()) * turn
        return torch.stack((pairs.real, pairs.imag), -1).flatten(-2).to(x.dtype)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((pairs.real, pairs.imag), -1).to(x.dtype)


def decoded(layer, x, prompt: int, chunk: int = 1, capacity: int = 0) -> tuple[Tensor, object]:
    """The layer's y over x (B, L, dim): a prompt at once, then `chunk` tokens at a time."""
    cache = layer.new_cache(capacity)
    parts = []
    with torch.no_grad():
        for start, stop in steps(x.shape[1], prompt, chunk):
            y, cache, _ = layer(x[:, start:stop], mask=foveate.causal(), cache=cache)
            parts.append(y)
    return torch.cat(parts, 1), cache


def steps(length: int, prompt: int, chunk: int) -> list[tuple[int, int]]:
    """Where the calls of a decoding begin and end."""
    cuts = [0, *range(prompt, length, chunk), length] if prompt else list(range(length + 1))
    return list(zip(cuts, cuts[1:]))
