"""The forward: which blocks, how many splits, and the launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.ops.layout import Layout
from foveate.ops.triton import run_hopper
from foveate.ops.triton.call import (
    Blocks,
    Call,
    copied,
    describe,
    head_sizes,
    row_blocks,
    row_lists,
    strides,
)
from foveate.ops.triton.config import Config, config_for, padded, processors, split_dim

_FEW = 64  # rows of a tile, all packed heads together, from which a block is no longer for decoding
_FEW_ROWS = 16  # rows of a block that are read for memory's sake
_SPLIT_SLOTS = 256  # keys that a split has at least
_SPLITS = 128
_LATENT = (257, 576)  # head sizes of latent caches, as in MLA, that have their own configurations
_MERGED = 4096  # numbers that a step of the merge holds
_PAGE = 32  # keys of a tile below which a step takes several
_FILL, _FILL_PAGES = 2, 4  # decoding programs for each multiprocessor, for whole tiles and pages


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    bias_first: int | None,
) -> tuple[Tensor, Tensor]:
    """See `foveate.ops.triton.forward`."""
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not lse.numel() or not key.shape[2] or not value.shape[3]:
        return out.zero_(), lse.fill_(-torch.inf)
    call = describe(query, key, value, layout, scale, softcap, bias, bias_first)
    if run_hopper.takes(call):
        with on_device(query.device):
            run_hopper.launch(call, out, lse)
    else:
        launch(call, out, lse)
    return out, lse


def launch(call: Call, out: Tensor, lse: Tensor, splits: int | None = None) -> None:
    """Run the kernels; `splits` cuts each list in so many parts, None: as many as fill the chip."""
    from foveate.ops.triton.kernels.attend import attend

    device = call.query.device
    call = call.finer(choose(call)[0])
    args, cut = arguments(call)
    programs = args.pop("programs")
    if splits is None:
        splits = _splits(call, cut, programs, device)
    plan = call.plan
    virtual = plan is not None and plan.q_index is not None and not plan.query_places.unique
    absent = plan is not None and plan.q_index is not None  # queries that no tile holds
    if absent:
        out.zero_()
        lse.fill_(-torch.inf)
    parts, part_lses = out, lse
    rows = out.shape[2]
    if virtual or splits > 1:
        rows = plan.q_rows if virtual and plan is not None else rows
        shape = (splits, *out.shape[:2], rows, out.shape[3])
        parts = torch.empty(shape, dtype=torch.float32, device=device)
        part_lses = torch.empty(shape[:4], dtype=torch.float32, device=device)
        if absent:
            part_lses.fill_(-torch.inf)
    o_s, l_s = (x.stride(0) if x.dim() > y else 0 for x, y in ((parts, 4), (part_lses, 3)))
    with on_device(device):
        attend[(programs, splits)](
            O=parts, L=part_lses, **strides("o", parts if parts.dim() == 4 else parts[0]),
            o_s=o_s, l_s=l_s, l_b=part_lses.stride(-3), l_h=part_lses.stride(-2), splits=splits,
            VIRTUAL=virtual, **args,
        )  # fmt: skip
        if parts is not out:
            _merge(call, parts, part_lses, out, lse, virtual)


def arguments(call: Call) -> tuple[dict[str, Any], Blocks]:
    """What `attend` is called with but for outputs and splits, `programs` among it."""
    config, factor = choose(call)
    cut = row_blocks(call, config, factor)
    dim = call.query.shape[3]
    sizes = head_sizes(call)
    sizes["D1"], sizes["D2"] = split_dim(dim)
    shared = _shared(call)
    args = {
        "Q": call.query, "K": call.key, "V": call.value,
        **copied(config, cut, K_TILES=call.key, V_TILES=None if shared else call.value),
        **strides("q", call.query), **strides("k", call.key), **strides("v", call.value),
        **call.bias_strides(), **call.tables(), **call.sizes(), **row_lists(call, cut, factor),
        **call.numbers(), **call.features(), **sizes,
        "Q_TILE": cut.owned_tile, "KV_TILE": cut.streamed_tile, "M": cut.owned, "N": cut.streamed,
        "VECTOR": cut.vector, "PACK": factor, "SHARED": shared,
        "STAGES": config.stages, **config.options(),
    }  # fmt: skip
    return args, cut


def choose(call: Call) -> tuple[Config, int]:
    """The configuration for a call, and how many heads a block packs."""
    dim, value_dim = call.query.shape[3], call.value.shape[3]
    tile = call.query.shape[2] if call.plan is None else min(call.plan.q_tile, call.plan.q_rows)
    together = call.pack(tile, 1 << 30)
    kernel = "decode" if tile * together <= 16 else "forward"
    if _latent(call):
        kernel = "latent decode" if kernel == "decode" else "latent"
    elif kernel == "decode" and call.plan is not None and call.plan.kv_tile < _PAGE:
        kernel = "paged decode"
    config = config_for(kernel, dim, value_dim, call.query.dtype, call.query.device)
    if call.bias is not None:  # tiles of it are kept in stages too
        config = replace(config, keys=min(config.keys, 64), stages=min(config.stages, 2))
    return config, together if tile < _FEW else 1


def _shared(call: Call) -> bool:
    """Whether the values are the first elements of the keys, which a step then loads once."""
    key, value = call.key, call.value
    same = value.data_ptr() == key.data_ptr() and value.stride()[:3] == key.stride()[:3]
    dim, value_dim = key.shape[3], value.shape[3]
    return same and value_dim <= dim and split_dim(dim)[0] == padded(value_dim)


def _latent(call: Call) -> bool:
    """Whether keys and values are one cache of large rows, for which there are configurations."""
    if call.bias is not None or (call.plan is not None and call.plan.kv_tile < _PAGE):
        return False  # what these read beside the keys would no longer fit
    least, most = _LATENT
    fits = least <= call.key.shape[3] <= most and call.query.element_size() == 2
    return fits and call.key.dtype == call.query.dtype and _shared(call)


def _splits(call: Call, cut: Blocks, programs: int, device: torch.device) -> int:
    """Parts of each list, so that a few rows against many keys fill the chip."""
    chip = processors(device.index or 0) if device.type == "cuda" else 4
    few = cut.owned <= _FEW_ROWS
    fill = _FILL_PAGES if cut.vector else _FILL
    if programs >= (fill * chip if few else chip // 2):
        return 1  # large blocks are split only where most of the chip would idle
    slots = call.key.shape[2]
    if call.plan is not None:
        slots = call.plan.longest * cut.streamed_tile
    # Large blocks may leave no room for a second one: no more than two rounds of them.
    parts = -(-fill * chip // programs) if few else 2 * chip // programs
    return max(1, min(parts, slots // _SPLIT_SLOTS, _SPLITS))


def _merge(
    call: Call, parts: Tensor, lses: Tensor, out: Tensor, lse: Tensor, virtual: bool
) -> None:
    from foveate.ops.triton.kernels.merge import merge_parts

    inverse, copies, i_b, i_h = None, 1, 0, 0
    if virtual and call.plan is not None:
        inverse = call.plan.query_places.at
        copies = inverse.shape[3]
        size = call.list_size if inverse.shape[1] > 1 else 1
        if size > 1:
            inverse = inverse.repeat_interleave(size, 1)
        i_b, i_h = (inverse.stride(i) if inverse.shape[i] > 1 else 0 for i in (0, 1))
    batch, heads, q_len, value_dim = out.shape
    wide = head_sizes(call)["DV1"]
    merge_parts[(q_len, batch * heads)](
        parts, lses, inverse, out, lse,
        parts.shape[0], copies, heads, parts.shape[3], q_len,
        lses.stride(0), lses.stride(2), *out.stride()[:3], i_b, i_h,
        DV=value_dim, DV1=wide, CHUNK=min(64, max(8, _MERGED // wide)),
    )  # fmt: skip


def on_device(device: torch.device) -> Any:
    """A context in which `device` is the current one, where kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
