"""The forward on Hopper by `kernels.hopper`: which calls it takes, and the launch."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.ops.triton import interpreted
from foveate.ops.triton.call import Call, aligned, blocks, copy_steps, row_lists, strides
from foveate.ops.triton.config import processors

HEAD_SIZES = (64, 128)
VERSIONS = ((3, 6), (3, 7))  # of Triton, whose Gluon the kernel was compiled with
_ROWS = 128
_STAGES = {(128, 128): 2, (128, 64): 4, (64, 128): 4, (64, 64): 6}  # by head size, keys of a step
_TURNS = True  # groups of warps issue products in turn


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
    if interpreted() or call.query.device.type != "cuda":
        return False
    return fits(call) and _here(call.query.device.index or 0) and _fills(call)


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
    tables = (plan.q_index, plan.kv_index, plan.gathered, plan.row_range)
    if any(table is not None for table in tables) or plan.q_rows < _ROWS:
        return False
    if plan.q_tile % _ROWS or plan.kv_tile % 64:
        return False
    return not plan.bits.shape[0] or plan.key_ranges is not None


def _fills(call: Call) -> bool:
    """Whether there are blocks for most of the chip; else lists are better cut into parts."""
    blocks_in = -(-call.query.shape[2] // _ROWS) * call.query.shape[0] * call.query.shape[1]
    return 2 * blocks_in >= processors(call.query.device.index or 0)


def launch(call: Call, out: Tensor, lse: Tensor) -> None:
    """Run the kernel; out (B, Hq, Lq, D) and lse (B, Hq, Lq) are written whole."""
    from foveate.ops.triton.kernels.hopper import attend_hopper

    args = arguments(call, out, lse)
    grid = min(args["programs"], processors(call.query.device.index or 0))
    attend_hopper[(grid,)](**args)


def arguments(call: Call, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """What `attend_hopper` is called with."""
    plan, dim = call.plan, call.query.shape[3]
    q_tile, kv_tile = (_ROWS, 128) if plan is None else (plan.q_tile, plan.kv_tile)
    keys = 128 if kv_tile % 128 == 0 else 64
    length = call.query.shape[2]
    cut = blocks(q_tile, kv_tile, length, 1, (_ROWS, keys))
    lists = row_lists(call, cut, 1)
    table, steps = None, (0, 0)
    if plan is not None and "KEY_RANGE" in lists:
        table, steps = lists["KEY_RANGE"], (lists["kr_b"], lists["kr_h"])
    elif plan is not None:
        tables = call.tables()
        table, steps = tables["KEY_RANGE"], (tables["kr_b"], tables["kr_h"])
    ends = None if plan is None else plan.block_ranges(_ROWS)
    ends_steps = [0, 0]
    if ends is not None:
        ends_steps = [s if n > 1 else 0 for s, n in zip(ends.stride()[:2], ends.shape[:2])]
    names = (
        "COLS", "KINDS", "ORDER", "START", "MID", "END", "packs", "groups_h", "batches", "q_tiles",
        "items",
    )  # fmt: skip
    subs = -(-min(q_tile, length) // _ROWS)
    return {
        "Q_TILES": _descriptor(call.query, 64), "K_TILES": _descriptor(call.key, keys),
        "V_TILES": _descriptor(call.value, keys), "O": out, "L": lse,
        **{name: lists[name] for name in names}, "subs": subs,
        "programs": lists["programs"] // lists["subs"] * subs,
        "KEY_RANGE": table, "kr_b": steps[0], "kr_h": steps[1],
        "BLOCK_RANGE": ends, "br_b": ends_steps[0], "br_h": ends_steps[1],
        "NEXT": torch.zeros(1, dtype=torch.int32, device=call.query.device),
        **strides("o", out), "l_b": lse.stride(0), "l_h": lse.stride(1),
        "q_rows": length, "kv_rows": call.key.shape[2], "scale": call.numbers()["scale"],
        "GROUP": call.group, "Q_TILE": q_tile, "KV_TILE": kv_tile, "N": keys, "D": dim,
        "STAGES": _STAGES[dim, keys], "TURNS": _TURNS, "num_warps": 4,
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
