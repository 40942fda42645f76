"""The backward: the pass that owns rows, which finds their delta, then the pass that owns keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.ops.layout import Layout
from foveate.ops.triton.call import (
    Call,
    as_ranges,
    blocks,
    copied,
    describe,
    head_sizes,
    order_of,
    readable,
    row_blocks,
    row_lists,
    strides,
)
from foveate.ops.triton.config import config_for
from foveate.ops.triton.run_forward import on_device

_FIXED_BITS = 61  # of a sum in fixed point; the sign and one to spare


def run(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    bias_first: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `foveate.ops.triton.backward`."""
    if not (query.numel() and key.numel() and value.numel()):
        dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
        return dq, dk, dv, None if bias is None else torch.zeros_like(bias)
    call = describe(query, key, value, layout, scale, softcap, bias, bias_first)
    grad = None if grad_out is None else readable(grad_out.to(query.dtype))
    lse = lse.contiguous()
    with on_device(query.device):
        rows = Rows(readable(out), grad, lse, grad_lse)
        dq, dbias = _query_gradient(call, rows)
        dk, dv = _key_gradient(call, grad, rows.base, rows.delta)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dbias


class Rows:
    """What is known of each row, (B, Hq, Lq) and with Dv: out, its gradient, the lse and its own.

    base, delta: fp32, what the pass that owns rows puts out for the one that owns keys, with
    strides that the copy engine takes.
    """

    def __init__(
        self, out: Tensor, grad: Tensor | None, lse: Tensor, grad_lse: Tensor | None
    ) -> None:
        self.out, self.grad, self.lse = out, grad, lse
        self.grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        batch, heads, length = lse.shape
        wide = -(-length // 16) * 16
        both = torch.empty(2, batch, heads, wide, dtype=torch.float32, device=out.device)
        self.base, self.delta = both[..., :length]

    def arguments(self) -> dict[str, Any]:
        """The kernel's."""
        return {
            "G": self.grad, "O": self.out, "LSE": self.lse, "DLSE": self.grad_lse,
            "BASE": self.base, "DELTA": self.delta, **strides("g", self.grad),
            **strides("o", self.out), "l_b": self.base.stride(0), "l_h": self.base.stride(1),
        }  # fmt: skip


def _query_gradient(call: Call, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """(dq, gradient of the bias in fp32 or None)."""
    from foveate.ops.triton.kernels.query_gradient import query_gradient

    args, dq, sums = query_arguments(call, rows)
    programs = args.pop("programs")
    query_gradient[(programs,)](**args)
    plan = call.plan
    if args["VIRTUAL"] and plan is not None:
        dq = _gathered_sum(call, dq).to(call.query.dtype)
    return dq, sums.result() if sums is not None else None


def query_arguments(call: Call, rows: Rows) -> tuple[dict[str, Any], Tensor, _BiasSums | None]:
    """What `query_gradient` is called with, `programs` among it; dq; the bias's gradient."""
    query = call.query
    batch, heads, q_len, dim = query.shape
    config = config_for("query gradient", dim, call.value.shape[3], query.dtype, query.device)
    call = call.finer(config)
    plan = call.plan
    tile = q_len if plan is None else min(plan.q_tile, plan.q_rows)
    factor = 1 if call.bias is not None else call.pack(tile, config.rows)
    cut = row_blocks(call, config, factor)
    virtual = plan is not None and plan.q_index is not None and not plan.query_places.unique
    if virtual and plan is not None:
        dq = query.new_empty(batch, heads, plan.q_rows, dim, dtype=torch.float32)
    elif plan is not None and plan.q_index is not None:
        dq = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    else:
        dq = query.new_empty(query.shape)
    sums = None
    if call.bias is not None:
        sums = _BiasSums(call, rows.grad, rows.grad_lse)
    args = {
        "Q": query, "K": call.key, "V": call.value, "DQ": dq, **rows.arguments(),
        **copied(config, cut, K_TILES=call.key, V_TILES=call.value),
        **strides("q", query), **strides("k", call.key), **strides("v", call.value),
        **strides("dq", dq), **call.bias_strides(), **call.tables(), **call.sizes(),
        **row_lists(call, cut, factor), **call.numbers(), **call.features(), **head_sizes(call),
        **_BiasSums.arguments(sums),
        "slope": call.scale, "Q_TILE": cut.owned_tile, "KV_TILE": cut.streamed_tile,
        "M": cut.owned, "N": cut.streamed, "VECTOR": cut.vector, "PACK": factor,
        "VIRTUAL": virtual, "STAGES": config.stages, **config.options(),
    }  # fmt: skip
    return args, dq, sums


def _gathered_sum(call: Call, parts: Tensor) -> Tensor:
    """(B, Hq, rows, D) of virtual rows, summed for each query."""
    assert call.plan is not None
    at = call.plan.query_places.at.long()
    if at.shape[1] > 1:
        at = at.repeat_interleave(call.list_size, 1)
    at = at.expand(*parts.shape[:2], -1, -1)
    total = parts.new_zeros(*at.shape[:3], parts.shape[3])
    for copy in at.unbind(-1):
        wide = copy.clamp_min(0)[..., None].expand(-1, -1, -1, parts.shape[3])
        total += parts.gather(2, wide).masked_fill((copy < 0)[..., None], 0.0)
    return total


class _BiasSums:
    """The gradient of a bias: stored element by element, or where it is shared added up.

    Sums are 64-bit integers, so that they come out the same in any order. Their unit follows from
    how large they can get: the weights of a row sum to 1, so a row adds at most
    |do| (|v| + |o|) + |dlse|.
    """

    def __init__(self, call: Call, grad: Tensor | None, grad_lse: Tensor | None) -> None:
        assert call.bias is not None
        shape = call.bias.shape
        full = (*call.query.shape[:3], call.key.shape[2])
        alone = call.bias_first is None and tuple(shape) == full
        self.mode = 1 if alone else 2 if call.bias_first is None else 3
        device = call.query.device
        kind = torch.float32 if alone else torch.int64
        self.total = torch.zeros(shape, dtype=kind, device=device)
        self.unit = torch.ones((), device=device)
        if not alone:
            most = torch.zeros((), device=device)
            if grad is not None:
                largest = [x.float().square().sum(-1).amax().sqrt() for x in (grad, call.value)]
                most = most + 2 * largest[0] * largest[1]
            if grad_lse is not None:
                most = most + grad_lse.float().abs().amax()
            rows = float(call.query.shape[0] * call.query.shape[1] * call.query.shape[2])
            bits = _FIXED_BITS - torch.log2((most * rows).clamp_min(1e-30)).ceil()
            self.unit = torch.exp2(bits.clamp(-100, 100))

    @staticmethod
    def arguments(sums: _BiasSums | None) -> dict[str, Any]:
        """The kernel's."""
        if sums is None:
            empty = dict.fromkeys(("db_b", "db_h", "db_q", "db_k"), 0)
            return {"DB": None, "UNIT": None, "BIAS_GRADIENT": 0, **empty}
        b, h, q, k = (s if n > 1 else 0 for s, n in zip(sums.total.stride(), sums.total.shape))
        return {
            "DB": sums.total, "UNIT": sums.unit, "BIAS_GRADIENT": sums.mode,
            "db_b": b, "db_h": h, "db_q": q, "db_k": k,
        }  # fmt: skip

    def result(self) -> Tensor:
        """The gradient in fp32."""
        if self.mode == 1:
            return self.total
        return (self.total.double() / self.unit.double()).float()


def _key_gradient(
    call: Call, grad: Tensor | None, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    from foveate.ops.triton.kernels.key_gradient import add_slots, key_gradient

    if _keys_differ_in_a_group(call):
        key, value = (x.repeat_interleave(call.group, 1) for x in (call.key, call.value))
        alone = replace(call, key=key, value=value)
        each = _key_gradient(alone, grad, lse, delta)
        dk, dv = (x.float().unflatten(1, (-1, call.group)).sum(2) for x in each)
        return dk.to(call.key.dtype), dv.to(call.value.dtype)
    args, dk, dv = key_arguments(call, grad, lse, delta)
    programs = args.pop("programs")
    if programs:
        key_gradient[(programs,)](**args)
    if args["DIRECT"] or call.plan is None:
        return dk, dv
    slots = call.plan.key_slots(*call.heads)
    found = [x.new_empty(x.shape) for x in (call.key, call.value)]
    batch, heads, length = call.key.shape[:3]
    sizes = head_sizes(call)
    add_slots[(-(-length // 8), batch * heads)](
        dk, dv, slots.begin, slots.slots, *found, args["groups_h"], args["batches"],
        args["heads_in"], length, D=sizes["D"], D1=sizes["D1"], DVAL=sizes["DV"],
        DV1=sizes["DV1"], TILE=call.plan.kv_tile, KEYS=8, CHUNK=4,
    )  # fmt: skip
    return found[0], found[1]


def _keys_differ_in_a_group(call: Call) -> bool:
    """Whether query heads of one key head have different indices or ranges of its keys."""
    plan = call.plan
    if plan is None or call.list_size % call.group == 0:
        return False
    tables = (plan.kv_index, plan.row_range)
    return any(table is not None and table.shape[1] > 1 for table in tables)


def key_arguments(
    call: Call, grad: Tensor | None, lse: Tensor, delta: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What `key_gradient` is called with, `programs` among it; dk; dv."""
    query, key, value = call.query, call.key, call.value
    batch, kv_heads = key.shape[:2]
    config = config_for("key gradient", query.shape[3], value.shape[3], query.dtype, query.device)
    call = call.finer(config)
    plan = call.plan
    most = (config.keys, config.rows)
    lists: dict[str, Any] = dict.fromkeys(
        ("ROWS", "KINDS", "START", "MID", "END", "ORDER", "WORDS")
    )
    lists["giants"] = 0
    if plan is None:
        cut = blocks(config.keys, config.rows, key.shape[2], 1, most)
        groups_b = groups_h = list_heads = 1
        width = visited = kv_tiles = cut.tiles
        direct = every = True
    else:
        cut = blocks(plan.kv_tile, plan.q_tile, plan.kv_rows, 1, most)
        groups_b, list_heads = plan.groups
        groups_h = 1 if list_heads == 1 else kv_heads
        width, kv_tiles = plan.by_key.work.shape[2], plan.kv_tiles
        direct = plan.keys_stand_once
        # Tiles that nothing visits get zeros by programs of their own, if each key has one slot.
        every = direct and plan.kv_index is None
        order = plan.key_order(query.shape[1], kv_heads, every)
        visited = order.lists.numel()
        by_key = plan.by_key
        lists |= {
            "ROWS": by_key.tiles, "KINDS": by_key.kinds, "START": by_key.start, "MID": by_key.mid,
            "END": by_key.end, **order_of(order),
        }  # fmt: skip
        together = list_heads == 1 or call.list_size % call.group == 0
        if together and plan.row_ranges is not None:
            lists |= as_ranges(plan.row_ranges, plan.key_kinds, "ROW_RANGE", "rr")
        elif plan.bits.shape[0]:
            lists["WORDS"] = plan.key_words
    batches, heads_in = batch // groups_b, kv_heads // groups_h
    each = [key.shape, value.shape]
    if direct:
        dk, dv = ((query.new_empty if every else query.new_zeros)(shape) for shape in each)
    else:
        slabs = max(1, visited) * batches * heads_in
        dk, dv = (
            query.new_empty(1, 1, slabs * cut.owned_tile, shape[3], dtype=torch.float32)
            for shape in each
        )
    dims = head_sizes(call)
    args = {
        "Q": query, "K": key, "V": value, "G": grad, "L": lse, "DELTA": delta, "DK": dk, "DV": dv,
        **copied(config, cut, Q_TILES=query, G_TILES=grad, L_TILES=lse, DELTA_TILES=delta),
        **strides("q", query), **strides("k", key), **strides("v", value), **strides("g", grad),
        **strides("dk", dk), **strides("dv", dv), "l_b": lse.stride(0), "l_h": lse.stride(1),
        **call.bias_strides(), **call.tables(), **call.sizes(), **lists, **call.numbers(),
        **call.features(),
        "kv_tiles": kv_tiles, "width": width, "groups_h": groups_h, "list_heads": list_heads,
        "list_size": call.list_size, "heads_in": heads_in, "batches": batches, "subs": cut.subs,
        "visited": visited,
        "slope": call.scale, "D": dims["D"], "D1": dims["D1"], "DVAL": dims["DV"],
        "DV1": dims["DV1"], "Q_TILE": cut.streamed_tile, "KV_TILE": cut.owned_tile,
        "M": cut.streamed, "N": cut.owned, "VECTOR": cut.vector, "DIRECT": direct,
        "STAGES": config.stages, **config.options(),
        "programs": visited * batches * heads_in * cut.subs,
    }  # fmt: skip
    return args, dk, dv
