"""One call as the kernels take it: strides, lists, numbers and what they are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.ops.layout import Layout
from foveate.ops.triton import interpreted
from foveate.ops.triton.config import Config, owned_block, padded, streamed_block
from foveate.ops.triton.plan import Order, Plan, plan_of

_LOG2E = math.log2(math.e)
_FAR = 1 << 22  # a step's offsets are 32-bit: rows may lie no further apart


@dataclass(frozen=True)
class Call:
    """Query (B, Hq, Lq, D), key, value with contiguous last axes, and the rest of a call."""

    query: Tensor
    key: Tensor
    value: Tensor
    plan: Plan | None
    scale: float
    softcap: float | None
    bias: Tensor | None
    bias_first: int | None

    @property
    def heads(self) -> tuple[int, int]:
        """(Hq, Hkv)."""
        return self.query.shape[1], self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads on each key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def list_size(self) -> int:
        """Query heads that share a list."""
        return self.query.shape[1] // (1 if self.plan is None else self.plan.groups[1])

    def pack(self, rows: int, most: int) -> int:
        """Query heads in one block: those of one key head and list, if rows are few."""
        together = math.gcd(self.group, self.list_size)
        return together if rows * 2 <= most else 1

    def finer(self, config: Config) -> Call:
        """The call with its lists over tiles of the configuration's blocks, where that pays."""
        plan = None if self.plan is None else self.plan.finer(config.rows, config.keys)
        return self if plan is self.plan else replace(self, plan=plan)

    @property
    def fold(self) -> bool:
        """Whether the scale goes into the exponent."""
        return self.scale > 0 and self.softcap is None and self.bias is None

    def numbers(self) -> dict[str, float]:
        """`scale` and `cap` for `bend_scores`."""
        if self.softcap is not None:
            return {
                "scale": 2 * _LOG2E * self.scale / self.softcap, "cap": self.softcap * _LOG2E
            }  # fmt: skip
        return {"scale": self.scale * _LOG2E, "cap": 0.0}

    def features(self) -> dict[str, Any]:
        """What every kernel is compiled for beside its blocks."""
        dtype = self.query.dtype
        return {
            "SOFTCAP": self.softcap is not None,
            "FOLD": self.fold,
            "BIAS": 0 if self.bias is None else 1 if self.bias_first is None else 2,
            "BIAS_ROW": self.bias is not None and self.bias.shape[2] > 1,
            "BIAS_COL": self.bias is not None and self.bias.shape[3] > 1,
            "GROUP": self.group,
            "PRECISION": precision(dtype),
            "WIDEN": interpreted() and dtype == torch.bfloat16,
        }

    def sizes(self) -> dict[str, int]:
        """Lengths, of queries and keys and of the virtual ones of a layout."""
        q_len, kv_len = self.query.shape[2], self.key.shape[2]
        plan = self.plan
        return {
            "q_len": q_len,
            "kv_len": kv_len,
            "q_rows": q_len if plan is None else plan.q_rows,
            "kv_rows": kv_len if plan is None else plan.kv_rows,
        }

    def tables(self) -> dict[str, Any]:
        """Indices and ranges of the layout, with their strides."""
        found: dict[str, Any] = {"GATHERED": None if self.plan is None else self.plan.gathered}
        for name, short in (
            ("q_index", "qi"), ("kv_index", "ki"), ("key_range", "kr"), ("row_range", "rr"),
        ):  # fmt: skip
            table = None if self.plan is None else getattr(self.plan, name)
            table = None if table is None else table.contiguous()
            found[name.upper()] = table
            for axis, letter in ((0, "b"), (1, "h")):
                shared = table is None or table.shape[axis] == 1
                found[f"{short}_{letter}"] = 0 if shared or table is None else table.stride(axis)
        return found

    def bias_strides(self) -> dict[str, Any]:
        """The bias and its strides, 0 where it is shared."""
        if self.bias is None:
            return {"B": None, "b_b": 0, "b_h": 0, "b_q": 0, "b_k": 0, "b_first": 0, "b_count": 1}
        b, h, q, k = (step if n > 1 else 0 for step, n in zip(self.bias.stride(), self.bias.shape))
        return {
            "B": self.bias, "b_b": b, "b_h": h, "b_q": q, "b_k": k,
            "b_first": self.bias_first or 0, "b_count": self.bias.shape[3],
        }  # fmt: skip


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    bias_first: int | None,
) -> Call:
    """A call whose tensors the kernels can read."""
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    plan = None if layout is None else plan_of(layout)
    query, key, value = (readable(x) for x in (query, key, value))
    bias = None if bias is None else bias.detach()
    return Call(query, key, value, plan, scale, softcap, bias, bias_first)


def readable(x: Tensor) -> Tensor:
    """A tensor whose last axis is contiguous and whose rows are near enough for 32-bit steps."""
    near = x.shape[2] < 2 or x.stride(2) < _FAR
    return x if (x.shape[-1] == 1 or x.stride(-1) == 1) and near else x.contiguous()


def copied(config: Config, cut: Blocks, **tensors: Tensor | None) -> dict[str, Any]:
    """Descriptors by which Hopper's copy engine loads whole tiles of a kernel's streamed side.

    None for a tensor that it can't take, or where the configuration does without.
    """
    wanted = config.tma and not cut.vector
    return {
        name: _descriptor(x, cut.streamed) if wanted and x is not None else None
        for name, x in tensors.items()
    }


def _descriptor(x: Tensor, rows: int) -> Any:
    """Blocks of `rows` rows of (B, H, L, D) or numbers of (B, H, L)."""
    columns = [*x.shape[3:]]
    if any(n != padded(n) for n in columns) or not aligned(x):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [*copy_steps(x), 1], [1, 1, rows, *columns])


def aligned(x: Tensor) -> bool:
    """Whether the copy engine can take a tensor: strides and start are multiples of 16 bytes."""
    if x.data_ptr() % 16 or x.stride(-1) != 1:
        return False
    return all(s > 0 and s * x.element_size() % 16 == 0 for s in copy_steps(x))


def copy_steps(x: Tensor) -> list[int]:
    """Strides of all axes but the last; axes of size 1 get one that will do."""
    return [s if n > 1 else 64 for s, n in zip(x.stride(), x.shape)][: x.dim() - 1]


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of batch entry, head and row, named for a kernel; 0 without a tensor."""
    b, h, row = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"{name}_b": b, f"{name}_h": h, f"{name}_l": row}


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are taken: tf32 only where torch was told that it may."""
    if dtype != torch.float32:
        return "ieee"
    told = torch.backends.cuda.matmul.fp32_precision
    if told == "none":  # as for all of torch
        told = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if told == "tf32" else "ieee"


@dataclass(frozen=True)
class Blocks:
    """Sizes of a launch. tile: of the owned and of the streamed side; subs: blocks in a tile."""

    owned_tile: int
    streamed_tile: int
    owned: int
    streamed: int
    vector: bool
    subs: int
    tiles: int


def blocks(
    owned_tile: int, streamed_tile: int, length: int, factor: int, most: tuple[int, int]
) -> Blocks:
    """Blocks for tiles of these sizes.

    Args:
        owned_tile: slots of a tile on the owned side.
        streamed_tile: slots of a tile on the streamed side.
        length: slots of the owned side.
        factor: rows of the block for each slot, the heads that are packed.
        most: largest block of the owned, and of the streamed side.
    """
    rows = min(owned_tile, length) * factor
    owned = owned_block(rows, most[0])
    streamed, vector = streamed_block(streamed_tile, most[1])
    tiles = -(-length // owned_tile)
    return Blocks(owned_tile, streamed_tile, owned, streamed, vector, -(-rows // owned), tiles)


def row_blocks(call: Call, config: Config, factor: int) -> Blocks:
    """Blocks of a kernel that owns rows: the tiles of the layout, or of the configuration."""
    if call.plan is None:
        q_len = call.query.shape[2]
        tile = max(1, config.rows // factor)
        return blocks(tile, config.keys, q_len, factor, (config.rows, config.keys))
    plan = call.plan
    return blocks(
        plan.q_tile, plan.kv_tile, plan.q_rows, factor, (config.rows, config.keys)
    )  # fmt: skip


def row_lists(call: Call, cut: Blocks, factor: int) -> dict[str, Any]:
    """Lists, tiles and groups for a kernel that owns rows, and `programs`, how many there are."""
    batch, heads = call.query.shape[:2]
    plan = call.plan
    groups_b, groups_h = (1, 1) if plan is None else plan.groups
    found: dict[str, Any] = dict.fromkeys(
        ("COLS", "KINDS", "START", "MID", "END", "ORDER", "WORDS", "ALIVE")
    )
    found["giants"] = 0
    kv_tiles = -(-call.key.shape[2] // cut.streamed_tile)
    if plan is not None:
        lists, order = plan.by_row, plan.row_order
        found |= {"COLS": lists.tiles, "KINDS": lists.kinds}
        if order is not None:
            found |= order_of(order)
        found |= dict(zip(("START", "MID", "END"), plan.ordered_bounds))
        if plan.key_ranges is not None:
            found |= as_ranges(plan.key_ranges, plan.row_kinds, "KEY_RANGE", "kr")
        elif plan.bits.shape[0]:
            found |= {"WORDS": plan.row_words, "ALIVE": plan.seen_keys}
        kv_tiles = plan.kv_tiles
    packs = heads // factor
    return found | {
        "q_tiles": cut.tiles, "kv_tiles": kv_tiles, "groups_h": groups_h,
        "batches": batch // groups_b, "packs": packs, "subs": cut.subs,
        "items": groups_b * groups_h * cut.tiles,
        "programs": groups_b * groups_h * cut.tiles * (batch // groups_b) * (packs // groups_h)
        * cut.subs,
    }  # fmt: skip


def order_of(order: Order) -> dict[str, Any]:
    """Arguments by which lists are worked on in an order."""
    return {"ORDER": order.lists, "giants": order.giants}


def as_ranges(table: Tensor, kinds: Tensor, name: str, short: str) -> dict[str, Any]:
    """Arguments by which bit tiles are taken by ranges of the owned side instead."""
    steps = (s if n > 1 else 0 for s, n in zip(table.stride(), table.shape[:2]))
    return {
        name: table, "KINDS": kinds,
        **dict(zip((f"{short}_b", f"{short}_h"), steps)),
    }  # fmt: skip


def head_sizes(call: Call) -> dict[str, int]:
    """D, Dv and the powers of two that hold them."""
    dim, value_dim = call.query.shape[3], call.value.shape[3]
    return {"D": dim, "D1": padded(dim), "DV": value_dim, "DV1": padded(value_dim)}
