"""What the machine can do at most, measured in the same rounds as what is held against it.

Memory: keys and values are read once by torch.sum, out of a pool of caches too large for the
processor's own. Compute: the fastest of a few square matrix products in the same dtype.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_SIZES = (256, 512, 1024)


class Pool:
    """Caches that are visited in turn, so that each is read from memory when its turn comes.

    Args:
        shape: (1, Hkv, L, D) of the keys, and of the values.
        dtype: of both.
        footprint: bytes that all of them hold together at least.
        seed: of the normal values.
        within: the values are the first so many elements of the keys, and nothing beside them.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        footprint: int,
        seed: int = 0,
        within: int | None = None,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.within = within
        self.key = torch.randn(shape, generator=random).to(dtype)
        self.value = self._value(self.key, random)
        self.bytes = self.key.numel() * self.key.element_size() * (2 if within is None else 1)
        count = max(1, -(-footprint // self.bytes))
        self.pairs: list[tuple[Tensor, Tensor]] = [(self.key, self.value)]
        for _ in range(count - 1):
            key = self.key.clone()
            value = self.value.clone() if within is None else key[..., :within]
            self.pairs.append((key, value))
        self._turns: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(self.pairs)

    def _value(self, key: Tensor, random: torch.Generator) -> Tensor:
        if self.within is not None:
            return key[..., : self.within]
        return torch.randn(key.shape, generator=random).to(key.dtype)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next key and value; they all hold the same numbers."""
        return next(self._turns)

    def read(self) -> object:
        """Read the next key and value, and do next to nothing with them."""
        key, value = self.next()
        return _words(key).sum(), _words(value).sum() if self.within is None else None


def _words(x: Tensor) -> Tensor:
    """The same memory as fp32, for which torch.sum keeps up with any memory."""
    flat = x.reshape(-1)
    return flat if flat.dtype == torch.float32 else flat.view(torch.float32)


class Product:
    """The square matrix product that this machine does fastest in a dtype.

    Attributes:
        flops: operations of one call.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        best = (0.0, _SIZES[0])
        for size in _SIZES:
            run = self._make(size, dtype, random)
            run()
            times = []
            for _ in range(5):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            best = max(best, (2 * size**3 / min(times), size))
        self.size = best[1]
        self.flops = 2.0 * self.size**3
        self.run = self._make(self.size, dtype, random)

    @staticmethod
    def _make(size: int, dtype: torch.dtype, random: torch.Generator) -> Callable[[], object]:
        a, b = (torch.randn(size, size, generator=random).to(dtype) for _ in range(2))
        out = torch.zeros(size, size, dtype=dtype)
        return lambda: torch.mm(a, b, out=out)
