"""Parts put together by their lse: splits of a list, and tiles that hold the same query."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from foveate.ops.triton.kernels.tiles import LN2, LOG2E


@triton.jit(do_not_specialize=["parts", "copies", "heads", "rows", "p_s", "p_h", "i_b", "i_h"])
def merge_parts(
    PARTS, LSES, INVERSE, O, L,
    parts, copies, heads, rows, q_len,
    p_s, p_h, o_b, o_h, o_l, i_b, i_h,
    DV: tl.constexpr, DV1: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query: lse = log sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p.

    PARTS (splits, B * Hq, rows, DV) and LSES (splits, B * Hq, rows) in fp32; INVERSE, if given,
    lists the rows where each query stands, `copies` of them, -1 is none.
    """
    query = tl.program_id(0)
    which = tl.program_id(1)  # batch entry and head
    batch, head = which // heads, which % heads
    dv = tl.arange(0, DV1)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DV1], tl.float32)
    for start in range(0, parts * copies, CHUNK):
        p = start + tl.arange(0, CHUNK)
        there = p < parts * copies
        row = tl.zeros([CHUNK], tl.int32) + query
        if INVERSE is not None:
            at = batch * i_b + head * i_h + (query * copies + p % copies)
            row = tl.load(INVERSE + at, mask=there, other=-1)
            there = there & (row >= 0)
        part = (p // copies).to(tl.int64) * p_s + which.to(tl.int64) * p_h + row
        lse = tl.load(LSES + part, mask=there, other=float("-inf")) * LOG2E
        new = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - base)
        keep = tl.exp2(top - base)
        outs = tl.load(
            PARTS + (part * DV)[:, None] + dv[None, :],
            mask=(there & (weight > 0))[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc = acc * keep + tl.sum(outs * weight[:, None], 0)
        total = total * keep + tl.sum(weight, 0)
        top = new
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    to = batch.to(tl.int64) * o_b + head.to(tl.int64) * o_h + query.to(tl.int64) * o_l
    tl.store(O + to + dv, acc.to(O.dtype.element_ty), mask=dv < DV)
    tl.store(L + which.to(tl.int64) * q_len + query, lse)
