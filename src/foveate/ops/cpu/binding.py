"""The engine as ctypes sees it: the library, and the struct that describes one call.

`Call` mirrors csrc/call.h field by field. The library is looked for beside this file; it uses the
OpenMP runtime that torch has loaded, so torch is imported first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Rows(ctypes.Structure):
    """(batch, head, row) with a contiguous last axis; strides in elements."""

    _fields_ = [("data", c_void_p), ("b", c_int64), ("h", c_int64), ("l", c_int64)]


class Table(ctypes.Structure):
    """A list per (batch, head) group; a stride of 0 shares it."""

    _fields_ = [("data", c_void_p), ("b", c_int64), ("h", c_int64), ("n", c_int64)]


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Call(ctypes.Structure):
    """One call; see csrc/call.h."""

    _fields_ = [
        *_fields(c_int64, "dtype batch heads kv_heads q_len kv_len dim value_dim threads"),
        *_fields(c_double, "scale softcap"),
        *_fields(Rows, "query key value out"),
        *_fields(c_void_p, "lse bias"),
        *_fields(c_int64, "bias_dtype bias_b bias_h bias_q bias_k bias_first bias_count"),
        *_fields(c_int64, "q_tile kv_tile q_tiles kv_tiles groups_b groups_h"),
        *_fields(c_int64, "entries patterns lists"),
        *_fields(c_void_p, "ptr cols kinds bits gathered"),
        *_fields(Table, "q_index kv_index key_range row_range"),
        *_fields(Rows, "grad_out"),
        *_fields(c_void_p, "grad_lse"),
        *_fields(Rows, "grad_query grad_key grad_value"),
        *_fields(c_void_p, "grad_bias"),
        *_fields(c_int64, "gbias_b gbias_h gbias_q gbias_k"),
    ]


# What every call says: `Call` up to lse. Packed at once: field by field it costs a short call more
# than its work.
_HEAD = Struct("@9q 2d P3q P3q P3q P3q P")
_REST = bytes(ctypes.sizeof(Call) - _HEAD.size)


def described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
) -> Call:
    """A call of dense attention; all tensors have a contiguous last axis."""
    batch, heads, q_len, dim = query.shape
    _, kv_heads, kv_len, value_dim = value.shape
    qb, qh, ql, _ = query.stride()
    kb, kh, kl, _ = key.stride()
    vb, vh, vl, _ = value.stride()
    ob, oh, ol, _ = out.stride()
    head = _HEAD.pack(
        DTYPES[query.dtype], batch, heads, kv_heads, q_len, kv_len, dim, value_dim,
        torch.get_num_threads(), scale, softcap,
        query.data_ptr(), qb, qh, ql, key.data_ptr(), kb, kh, kl,
        value.data_ptr(), vb, vh, vl, out.data_ptr(), ob, oh, ol, lse.data_ptr(),
    )  # fmt: skip
    return Call.from_buffer_copy(head + _REST)


def switched_off() -> bool:
    """Whether the user asked for the engine not to be used."""
    return os.environ.get("FOVEATE_CPU_ENGINE") == "off"


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """(the library or None, why it is not there)."""
    named = os.environ.get("FOVEATE_CPU_ENGINE")
    if switched_off():
        return None, "the C++ engine is switched off by FOVEATE_CPU_ENGINE=off"
    path = Path(named) if named else Path(__file__).with_name("_engine.so")
    if not path.exists():
        return None, (
            f"the C++ engine was not built ({path.name} is missing): install foveate where a C++17 "
            "compiler is at hand"
        )
    try:
        library = _open(path)
    except OSError as error:
        return None, f"the C++ engine did not load: {error}"
    library.foveate_call_bytes.restype = c_int64
    if library.foveate_call_bytes() != ctypes.sizeof(Call):
        return None, "the C++ engine is of another version: install foveate again"
    for name in ("foveate_forward", "foveate_backward"):
        getattr(library, name).argtypes = [POINTER(Call)]
        getattr(library, name).restype = c_int
    library.foveate_isa.restype = c_char_p
    library.foveate_use.argtypes = [c_char_p]
    if (isa := os.environ.get("FOVEATE_CPU_ISA")) and library.foveate_use(isa.encode()):
        return None, f"FOVEATE_CPU_ISA={isa}: this machine or this build has no such kernels"
    return library, ""


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # torch keeps its OpenMP runtime to itself in some builds: load it for everyone.
        beside = Path(torch.__file__).parent / "lib"
        names = ("libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib")
        for name in (*(str(beside / n) for n in names), *names):
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(path))
            except OSError:
                continue
        raise


def run(name: str, call: Call) -> None:
    """Run one of the engine's functions.

    Raises:
        MemoryError: its buffers could not be had.
    """
    library, why = load()
    if library is None:
        raise RuntimeError(why)
    if getattr(library, name)(byref(call)):
        raise MemoryError("the C++ engine could not allocate its buffers")


def rows(x: Tensor) -> Rows:
    """A (B, H, L, D) tensor whose last axis is contiguous."""
    return Rows(x.data_ptr(), *x.stride()[:3])


def table(x: Tensor, lists: list[Tensor]) -> Table:
    """A (B or 1, H or 1, N[, 2]) int32 tensor; `lists` keeps what was copied alive."""
    x = x.contiguous()
    lists.append(x)
    return Table(
        x.data_ptr(),
        x.stride(0) if x.shape[0] > 1 else 0,
        x.stride(1) if x.shape[1] > 1 else 0,
        x.shape[2],
    )


def isa() -> str:
    """The instruction set in use; empty without the library."""
    library, _ = load()
    return library.foveate_isa().decode() if library is not None else ""


def use(name: str) -> None:
    """Switch to the kernels for another instruction set (for tests and measurements).

    Raises:
        ValueError: this machine or this build has no such kernels.
    """
    library, why = load()
    if library is None or library.foveate_use(name.encode()):
        raise ValueError(f"no kernels named {name!r} here; {why or 'in use: ' + isa()}")


if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("the C++ engine needs a little-endian machine")
