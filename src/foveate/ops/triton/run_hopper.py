"""The forward on Hopper by `kernels.hopper`: which calls it takes, and the launch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.ops.triton import interpreted
from foveate.ops.triton.call import Call, aligned, copy_steps, strides
from foveate.ops.triton.config import forced, processors

HEAD_SIZES = (64, 128)
VERSIONS = ((3, 6), (3, 7))  # of Triton, whose Gluon the kernel was compiled with


class Form(NamedTuple):
    """How blocks lie on a multiprocessor.

    Attributes:
        halves: groups of warps to a block, 64 rows each.
        parts: blocks that a program has at once.
        programs: on a multiprocessor.
    """

    halves: int
    parts: int = 1
    programs: int = 1

    @property
    def rows(self) -> int:
        """Of a block."""
        return 64 * self.halves


ONE, TWO, THREE = Form(1, programs=2), Form(2), Form(1, parts=3)
# Stages of keys and values, and buffers of queries, by form, head size and keys of a step.
_ROOM = {
    (TWO, 128, 128): (3, 1), (TWO, 128, 64): (6, 1), (ONE, 64, 128): (3, 2), (ONE, 64, 64): (6, 1),
    (THREE, 64, 128): (2, 1), (THREE, 64, 64): (4, 1),
}  # fmt: skip
# At head size 64, from how many keys in a row's list on a program has three blocks. Three groups
# of warps keep the tensor cores busiest, but three blocks' code and two stages make every block's
# begin and end dear; where lists are short, what one program waits for is hidden behind another's
# work. On an H200, 8,192 tokens, one to three: all keys 1.14, a random half of the tiles 1.04,
# causal 1.02, a random fifth of the tiles 0.90, windows of 821 keys 0.81 times as fast. Between
# the mean lists of the last but one, 1,600 keys, and of causal, 4,160, nothing was measured.
_LONG = 3072


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
    return here and _fills(call) and fits(call)


def fits(call: Call) -> bool:
    """Whether the kernel can run a call, on whatever device."""
    query, key, value, plan = call.query, call.key, call.value, call.plan
    dim = query.shape[3]
    if (
        query.dtype.itemsize != 2
        or key.dtype != query.dtype
        or dim not in HEAD_SIZES
        or value.shape[3] != dim
    ):
        return False
    if not call.fold or not all(aligned(x) for x in (query, key, value)):
        return False
    if plan is None:
        return query.shape[2] >= 128
    # Ranges of a layout's own may leave keys between them that no row of a block sees.
    tables = (plan.q_index, plan.kv_index, plan.gathered, plan.key_range, plan.row_range)
    if any(table is not None for table in tables) or plan.q_rows < 128:
        return False
    if plan.q_tile % (64 if dim == 64 else 128) or plan.kv_tile % 64:
        return False
    return not plan.bits.shape[0] or plan.key_ranges is not None


def _fills(call: Call) -> bool:
    """Whether there are blocks for most of the chip; else lists are better cut into parts."""
    blocks_in = -(-call.query.shape[2] // 128) * call.query.shape[0] * call.query.shape[1]
    return 2 * blocks_in >= processors(call.query.device.index or 0)


def form(call: Call) -> Form:
    """How a call's blocks lie; all forms add the same numbers in the same order.

    At most two forms for all layouts of a head size. No list is looked at: the mean is known
    without waiting for the GPU.
    """
    plan, keys = call.plan, call.key.shape[2]
    if call.query.shape[3] != 64:
        return TWO
    if plan is not None:
        lists = plan.groups[0] * plan.groups[1] * plan.q_tiles
        keys = plan.by_row.tiles.shape[0] * plan.kv_tile // lists
    return THREE if keys >= _LONG else ONE


def launch(call: Call, out: Tensor, lse: Tensor) -> None:
    """Run the kernel; out (B, Hq, Lq, D) and lse (B, Hq, Lq) are written whole."""
    from foveate.ops.triton.kernels.hopper import attend_hopper

    args, own = arguments(call, out, lse), form(call)
    room = processors(call.query.device.index or 0) * own.programs
    attend_hopper[(min(args["programs"], room),)](**args)  # some without a third block, if few


def arguments(call: Call, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """What `attend_hopper` is called with."""
    plan, dim, own = call.plan, call.query.shape[3], form(call)
    rows = own.rows
    batch, heads, length = call.query.shape[:3]
    q_tile, kv_tile = (rows, 128) if plan is None else (plan.q_tile, plan.kv_tile)
    keys = 128 if kv_tile % 128 == 0 else 64
    stages, buffers = _ROOM[own, dim, keys]
    cols = kinds = table = lists = None
    steps = [0, 0]
    groups, count, giants = (1, 1), -(-length // rows), 0
    if plan is not None:
        cols, kinds, lists = plan.by_row.tiles, plan.by_row.kinds, plan.blocks(rows)
        groups, count = plan.groups, lists.shape[0]
        if plan.row_order is not None:
            giants = plan.row_order.giants * plan.blocks_in_tile(rows)
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
        "giants": giants, "packs": packs, "programs": count * packs * (batch // groups[0]),
        "q_rows": length, "kv_rows": call.key.shape[2], "scale": call.numbers()["scale"],
        "GROUP": call.group,
        "Q_TILE": q_tile, "KV_TILE": kv_tile, "N": keys, "D": dim, "STAGES": stages,
        "BUFFERS": buffers, "HALVES": own.halves, "PARTS": own.parts, "num_warps": 4,
        # Half of a multiprocessor's registers: the four warps that compute take what others leave.
        **({"maxnreg": 128} if own.programs == 2 else {}),
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
