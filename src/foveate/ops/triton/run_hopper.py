"""The forward on Hopper by `kernels.hopper`: which calls it takes, and the launch."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.ops.triton import interpreted
from foveate.ops.triton.call import Call, aligned, copy_steps, strides
from foveate.ops.triton.config import forced, processors

HEAD_SIZES = (64, 128)
VERSIONS = ((3, 6), (3, 7))  # of Triton, whose Gluon the kernel was compiled with
_ROWS = 128
# Stages of keys and values, and buffers of queries, by head size and keys of a step.
_ROOM = {(128, 128): (3, 1), (128, 64): (6, 1), (64, 128): (5, 1), (64, 64): (6, 1)}
# Tiles in a list, on average, from which it pays where partial tiles are ranges, by head size: on
# an H100 lists of 5 to 8 tiles took 3 to 8% longer than by `attend` at head size 64.
_LONG = {64: 10, 128: 0}


@cache
def _here(index: int) -> bool:
    """Whether a device is a Hopper GPU and Triton one that the kernel is known to compile with."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if torch.version.hip is not None or version not in VERSIONS:
        return False
    return torch.cuda.get_device_capability(index)[0] == 9


def takes(call: Call) -> bool:
    """Whether this kernel runs a call; `attend` runs the others."""
    if interpreted() or call.query.device.type != "cuda" or forced("forward"):
        return False
    here = _here(call.query.device.index or 0)
    return here and _fills(call) and _long(call) and fits(call)


def fits(call: Call) -> bool:
    """Whether the kernel can run a call, on whatever device."""
    query, key, value, plan = call.query, call.key, call.value, call.plan
    dim = query.shape[3]
    if query.dtype.itemsize != 2 or dim not in HEAD_SIZES or value.shape[3] != dim:
        return False
    if not call.fold or not all(aligned(x) for x in (query, key, value)):
        return False
    if plan is None:
        return query.shape[2] >= _ROWS
    # Ranges of a layout's own may leave keys between them that no row of a block sees.
    tables = (plan.q_index, plan.kv_index, plan.gathered, plan.key_range, plan.row_range)
    if any(table is not None for table in tables) or plan.q_rows < _ROWS:
        return False
    if plan.q_tile % _ROWS or plan.kv_tile % 64:
        return False
    return not plan.bits.shape[0] or plan.key_ranges is not None


def _fills(call: Call) -> bool:
    """Whether there are blocks for most of the chip; else lists are better cut into parts."""
    blocks_in = -(-call.query.shape[2] // _ROWS) * call.query.shape[0] * call.query.shape[1]
    return 2 * blocks_in >= processors(call.query.device.index or 0)


def _long(call: Call) -> bool:
    """Whether lists are long enough for the time that each block begins and ends with."""
    plan = call.plan
    if plan is None or not plan.bits.shape[0]:
        return True
    return plan.cols.numel() >= _LONG.get(call.query.shape[3], 0) * (plan.ptr.numel() - 1)


def launch(call: Call, out: Tensor, lse: Tensor) -> None:
    """Run the kernel; out (B, Hq, Lq, D) and lse (B, Hq, Lq) are written whole."""
    from foveate.ops.triton.kernels.hopper import attend_hopper

    args = arguments(call, out, lse)
    grid = min(args["programs"], processors(call.query.device.index or 0))
    attend_hopper[(grid,)](**args)


def arguments(call: Call, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """What `attend_hopper` is called with."""
    plan, dim = call.plan, call.query.shape[3]
    batch, heads, length = call.query.shape[:3]
    q_tile, kv_tile = (_ROWS, 128) if plan is None else (plan.q_tile, plan.kv_tile)
    keys = 128 if kv_tile % 128 == 0 else 64
    cols = kinds = table = lists = None
    steps = [0, 0]
    groups, count = (1, 1), -(-length // _ROWS)
    if plan is not None:
        cols, kinds, lists = plan.by_row.tiles, plan.by_row.kinds, plan.blocks(_ROWS)
        groups, count = plan.groups, lists.shape[0]
        if plan.key_ranges is not None:
            table, kinds = plan.key_ranges, plan.row_kinds
    if table is not None:
        steps = [s if n > 1 else 0 for s, n in zip(table.stride()[:2], table.shape[:2])]
    packs = heads // groups[1]
    return {
        "Q_TILES": _descriptor(call.query, 64), "K_TILES": _descriptor(call.key, keys),
        "V_TILES": _descriptor(call.value, keys), "O": out, "L": lse, "COLS": cols, "KINDS": kinds,
        "BLOCKS": lists, "KEY_RANGE": table, "kr_b": steps[0], "kr_h": steps[1],
        "NEXT": torch.zeros(1, dtype=torch.int32, device=call.query.device),
        **strides("o", out), "l_b": lse.stride(0), "l_h": lse.stride(1), "count": count,
        "packs": packs, "programs": count * packs * (batch // groups[0]), "q_rows": length,
        "kv_rows": call.key.shape[2], "scale": call.numbers()["scale"], "GROUP": call.group,
        "Q_TILE": q_tile, "KV_TILE": kv_tile, "N": keys, "D": dim, "STAGES": _ROOM[dim, keys][0],
        "BUFFERS": _ROOM[dim, keys][1], "num_warps": 4,
    }  # fmt: skip


def _descriptor(x: Tensor, rows: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, x.shape[3]]
    return TensorDescriptor(x, list(x.shape), [*copy_steps(x), 1], block, _layout())


@cache
def _layout() -> Any:
    """How the copy engine lays rows of 128 bytes in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(128, 16, 4)
