"""Bit tiles: boolean tiles packed along their query rows, each distinct one kept once."""

from __future__ import annotations

import torch
from torch import Tensor

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(tiles: Tensor) -> Tensor:
    """Bool (n, kv_tile, q_tile), keys first, to uint8 (n, kv_tile, q_tile / 8).

    Eight booleans are one 64-bit word; a product moves bit 8i to bit 56 + i without a carry.
    """
    n, cols, rows = tiles.shape
    if not n:
        return torch.zeros((0, cols, rows // 8), dtype=torch.uint8, device=tiles.device)
    words = tiles.contiguous().view(torch.uint8).view(torch.int64)
    return ((words * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack(bits: Tensor, q_tile: int) -> Tensor:
    """uint8 (n, kv_tile, q_tile / 8) to bool (n, q_tile, kv_tile)."""
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] & powers).ne(0).flatten(2)[..., :q_tile].mT


def count(bits: Tensor) -> Tensor:
    """(n,) int64: how many elements are set in each tile."""
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=bits.device)
    return table[bits.flatten(1).long()].sum(1, dtype=torch.int64)


def distinct(bits: Tensor) -> tuple[Tensor, Tensor]:
    """(the distinct tiles, for each tile the index of its like)."""
    n = bits.shape[0]
    if n == 0:
        return bits, torch.zeros(0, dtype=torch.int64, device=bits.device)
    words = _words(bits)
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    size = (words.shape[1],)
    factors = torch.randint(-(2**62), 2**62, size, generator=generator, device="cpu") | 1
    # A product alone leaves the highest bits, the last rows of a tile, where they are.
    mixed = (words ^ (words >> 32 & 0xFFFFFFFF)) * -0x61C8864680B583EB
    hashes = ((mixed ^ (mixed >> 32 & 0xFFFFFFFF)) * factors.to(words.device)).sum(1)
    _, index = torch.unique(hashes, return_inverse=True)
    first = torch.full((int(index.max()) + 1,), n, device=bits.device)
    first = first.scatter_reduce(0, index, torch.arange(n, device=bits.device), "amin")
    if not torch.equal(words[first][index], words):  # two different tiles with one hash
        unique, index = torch.unique(words, dim=0, return_inverse=True)
        first = torch.full((len(unique),), n, device=bits.device)
        first = first.scatter_reduce(0, index, torch.arange(n, device=bits.device), "amin")
    order = torch.argsort(first)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=bits.device)
    return bits[first[order]], rank[index]


def _words(bits: Tensor) -> Tensor:
    """The tiles as rows of int64 words, to hash and compare."""
    flat = bits.flatten(1)
    tail = -flat.shape[1] % 8
    if tail:
        flat = torch.nn.functional.pad(flat, (0, tail))
    return flat.contiguous().view(torch.int64)
