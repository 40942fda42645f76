"""Sizes of blocks, warps and stages: what is shipped, and what tuning has found on this device.

A choice depends on the kernel, the head sizes, the dtype and the device, never on a mask. `tune`
measures the candidates once and keeps the best in a file; without it the shipped ones serve. Those
of 16-bit numbers at head sizes up to 128 on Hopper were measured on an H200 (see
`benchmarks/results/gpu`); the others were chosen with the compiler's own account of registers and
shared memory (see the tests).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Config:
    """rows, keys: largest blocks of either side; the owned one is in registers.

    tma: whole tiles of the streamed side come by Hopper's copy engine. registers: of a thread, at
    most, so that more programs fit on a multiprocessor; 0 leaves it to the compiler.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    registers: int = 0

    def options(self) -> dict[str, int]:
        """What a launch is given."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers and torch.version.hip is None:
            found["maxnreg"] = self.registers
        return found


Key = tuple[str, int, int, int]  # kernel, padded head size, padded value head size, bytes

# (kernel, largest head size, bytes of an element) -> for compute capability 8.0, and 9.0 on.
_SHIPPED: dict[tuple[str, int, int], tuple[Config, Config]] = {
    ("forward", 64, 2): (Config(128, 64, 4, 3), Config(128, 64, 4, 3)),
    ("forward", 128, 2): (Config(128, 32, 8, 3), Config(64, 64, 4, 3, tma=True)),
    ("forward", 256, 2): (Config(64, 32, 8, 2), Config(64, 64, 8, 2)),
    ("forward", 1024, 2): (Config(32, 32, 8, 1), Config(32, 32, 8, 2)),
    ("forward", 64, 4): (Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    ("forward", 128, 4): (Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
    ("forward", 256, 4): (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("forward", 1024, 4): (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    # Values within the keys, as in MLA: for many rows and for few.
    ("latent", 1024, 2): (Config(32, 32, 8, 1), Config(64, 64, 8, 2)),
    ("latent decode", 1024, 2): (Config(16, 32, 4, 2), Config(16, 32, 4, 3)),
    ("decode", 64, 2): (Config(16, 128, 4, 3), Config(16, 64, 4, 3)),
    ("decode", 128, 2): (Config(16, 64, 4, 3), Config(16, 64, 4, 3)),
    ("paged decode", 128, 2): (Config(16, 64, 4, 3), Config(16, 128, 4, 2)),
    ("decode", 256, 2): (Config(16, 64, 4, 2), Config(16, 64, 4, 3)),
    ("decode", 1024, 2): (Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
    ("decode", 64, 4): (Config(16, 64, 4, 2), Config(16, 64, 4, 3)),
    ("decode", 128, 4): (Config(16, 32, 4, 2), Config(16, 32, 8, 2)),
    ("decode", 256, 4): (Config(16, 32, 4, 2), Config(16, 32, 4, 1)),
    ("decode", 1024, 4): (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    ("query gradient", 64, 2): (Config(128, 32, 8, 2), Config(64, 64, 4, 2, True, 168)),
    ("query gradient", 128, 2): (Config(64, 64, 8, 2), Config(64, 64, 4, 2, tma=True)),
    ("query gradient", 256, 2): (Config(64, 32, 8, 1), Config(64, 32, 8, 2, tma=True)),
    ("query gradient", 64, 4): (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("query gradient", 128, 4): (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    ("query gradient", 256, 4): (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    ("key gradient", 64, 2): (Config(32, 128, 8, 2), Config(64, 64, 4, 3, tma=True)),
    ("key gradient", 128, 2): (Config(32, 64, 8, 2), Config(64, 64, 4, 2, tma=True)),
    ("key gradient", 256, 2): (Config(32, 32, 8, 1), Config(16, 64, 8, 2)),
    ("key gradient", 64, 4): (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("key gradient", 128, 4): (Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    ("key gradient", 256, 4): (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


def shipped(kernel: str, dim: int, value_dim: int, itemsize: int, capability: int) -> Config:
    """The configuration that foveate brings along.

    Args:
        kernel: forward, decode, latent, latent decode, paged decode, query gradient or key
            gradient. The kinds of decoding that a head size has none of its own for are `decode`.
        dim: D.
        value_dim: Dv.
        itemsize: bytes of an element; 1 is taken as 2.
        capability: major compute capability.
    """
    largest = max(dim, value_dim)
    for bound in (64, 128, 256, 1024):
        if largest <= bound:
            size = max(2, itemsize)
            found = _SHIPPED.get((kernel, bound, size))
            if found is None and kernel.endswith(" decode"):
                found = _SHIPPED.get(("decode", bound, size))
            if found is not None:
                return found[capability >= 9]
    raise ValueError(f"no {kernel} kernel for head sizes {dim} and {value_dim}")


def cache_file() -> Path:
    """Where tuned configurations are kept; FOVEATE_CACHE names another folder."""
    folder = os.environ.get("FOVEATE_CACHE")
    base = Path(folder) if folder else Path.home() / ".cache" / "foveate"
    return base / "triton.json"


@lru_cache(maxsize=1)
def _tuned() -> dict[str, Config]:
    try:
        found = json.loads(cache_file().read_text())
        return {name: Config(**values) for name, values in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def name_of(kernel: str, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """The key of a choice in the file: kernel, head sizes, dtype, device and Triton's version."""
    import triton

    model = torch.cuda.get_device_name(device)
    kind = str(dtype).removeprefix("torch.")
    return f"{kernel} {dim} {value_dim} {kind} | {model} | triton {triton.__version__}"


def keep(name: str, config: Config) -> None:
    """Put a tuned configuration into the file, beside what others have put there."""
    _tuned.cache_clear()
    found = {**_tuned(), name: config}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({n: asdict(c) for n, c in found.items()}, indent=1))
    part.replace(path)
    _tuned.cache_clear()


_forced: list[tuple[str | None, Config]] = []


class Forced:
    """Within it a kernel, or with None every kernel, takes this configuration."""

    def __init__(self, config: Config, kernel: str | None = None) -> None:
        self.config, self.kernel = config, kernel

    def __enter__(self) -> None:
        _forced.append((self.kernel, self.config))

    def __exit__(self, *_: object) -> None:
        _forced.pop()


def forced(kernel: str) -> bool:
    """Whether a kernel's configuration is forced."""
    return bool(_forced) and _forced[-1][0] in (None, kernel)


def config_for(
    kernel: str, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """The tuned configuration if there is one, else the shipped one."""
    if forced(kernel):
        return _forced[-1][1]
    if device.type != "cuda":  # the interpreter
        return replace(shipped(kernel, dim, value_dim, dtype.itemsize, 9), rows=32, keys=32)
    found = _tuned()
    if found and (mine := found.get(name_of(kernel, dim, value_dim, dtype, device))) is not None:
        return mine
    major, _ = _capability(device.index or 0)
    return shipped(kernel, dim, value_dim, dtype.itemsize, major)


@lru_cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@lru_cache
def processors(index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def owned_block(rows: int, most: int) -> int:
    """The block for `rows` owned rows that costs least, a power of two from 16 to `most`.

    Small blocks pad less, but each streams the other side once more.
    """
    sizes = []
    size = max(16, most)
    while size >= 16:
        padded_rows = -(-rows // size) * size
        sizes.append((padded_rows * (1 + 16 / size), -size))
        size //= 2
    return -min(sizes)[1]


def streamed_block(tile: int, most: int) -> tuple[int, bool]:
    """(block that streams tiles of this size, whether a step takes slots of several tiles)."""
    size = max(16, most)
    while size >= 32:
        if tile % size == 0:
            return size, False
        size //= 2
    if tile == 16 and most <= 16:
        return 16, False
    return max(16, most), True


def padded(dim: int) -> int:
    """The power of two, at least 16, that holds a head size."""
    return max(16, 1 << (dim - 1).bit_length())


def split_dim(dim: int) -> tuple[int, int]:
    """A head size in two powers of two, where that pads less: 96 is 64 + 32, 576 is 512 + 64.

    Up to 64 it stays whole: two small products cost more registers than the padding.
    """
    whole = padded(dim)
    most = whole // 2
    if most >= 64 and whole > dim:
        rest = padded(dim - most)
        if most + rest < whole:
            return most, rest
    return whole, 0
