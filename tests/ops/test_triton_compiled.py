"""Every kernel that is shipped, compiled for Ampere and Hopper without a GPU.

It must compile, fit into shared memory, keep everything in registers, and use the instructions that
it is meant to: asynchronous copies, and on Hopper the tensor cores' own. The interpreter, which the
other tests run in, sees none of this.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import SHARED_MEMORY, Compiled, compile_kernel, launch_of
from engines import every_tile

from foveate.ops import Layout, causal, triton
from foveate.ops.triton import run_hopper
from foveate.ops.triton.config import _SHIPPED, Config, shipped

pytestmark = [
    pytest.mark.triton,
    pytest.mark.plain_empty,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or triton.interpreted(),
        reason="needs Triton, and not its interpreter",
    ),
]
SHAPES = [
    pytest.param(
        *key,
        capability,
        pair[capability >= 90],
        id=f"{key} {capability}",
        marks=() if key[1:] == (128, 2) and capability == 90 else pytest.mark.slow,
    )
    for key, pair in _SHIPPED.items()
    for capability in (80, 90)
]


def causal_lists(kernel: str = "") -> Layout:
    """One query for kinds of decoding, from pages for those."""
    if "decode" in kernel or kernel == "latent":
        return causal().layout(1, 512, 16 if "paged" in kernel else 128)
    return causal().layout(256, 512, (128, 128))


# Bytes of stack. No block of fp32 is small enough at large head sizes: its products have no tensor
# cores to go to. The gradients at head size 128 spill in the loop of partial tiles alone, and were
# the fastest of all that were measured on an H200.
SPILLS = {
    ("forward", 1024, 4, 90): 16,
    ("latent", 1024, 2, 90): 384,  # before the loop of whole tiles; the fastest of those measured
    ("decode", 128, 4, 90): 16,
    ("query gradient", 128, 2, 90): 32,
    ("query gradient", 128, 4, 90): 16,
    ("query gradient", 256, 4, 80): 208,
    ("query gradient", 256, 4, 90): 216,
    ("key gradient", 128, 2, 90): 104,
}


def sound(found: Compiled, capability: int, stack: int = 0) -> None:
    assert found.shared <= SHARED_MEMORY[capability]
    assert found.stack <= stack
    assert not re.search(r"(ld|st)\.local", found.ptx)


@pytest.mark.parametrize(("kernel", "bound", "size", "capability", "config"), SHAPES)
def test_what_is_shipped(
    kernel: str, bound: int, size: int, capability: int, config: Config
) -> None:
    dtype = torch.float32 if size == 4 else torch.bfloat16
    dims = (576, 512) if bound == 1024 else (bound, bound)
    group = 8 if "decode" in kernel else 128 if kernel == "latent" else 1
    options: dict[str, Any] = {"group": group, "latent": bound == 1024}
    launch = launch_of(kernel, config, dims, dtype, causal_lists(kernel), **options)
    found = compile_kernel(*launch, capability)
    sound(found, capability, SPILLS.get((kernel, bound, size, capability), 0))
    assert ("cp.async.bulk.tensor" in found.ptx) == config.tma
    if config.stages > 1:
        assert "cp.async" in found.ptx
    owned = config.keys if kernel == "key gradient" else config.rows
    if size == 2 and capability == 90 and owned >= 64:  # Hopper's own products take 64 rows
        assert "wgmma.mma_async" in found.ptx
    elif size == 2:
        assert "mma.sync" in found.ptx


def single_keys() -> Layout:
    tiles, keys = torch.rand(1, 1, 2, 4) < 0.5, torch.rand(1, 1, 2, 512) < 0.1
    return Layout.from_selection(tiles, keys, 256, 512, (128, 128), within=causal())


def ranged(kind: int) -> Layout:
    ends = torch.zeros(1, 1, 256 if kind == -1 else 512, 2, dtype=torch.int32)
    layout = replace(causal().layout(256, 512, (128, 128)), **{RANGES[kind]: ends})
    return replace(layout, kinds=torch.full_like(layout.kinds, kind))


RANGES = {-1: "key_range", -2: "row_range"}
VARIANTS: dict[str, Any] = {
    "dense": lambda: (None, {}),
    "packed heads": lambda: (causal().layout(8, 512, (8, 64)), {"group": 8}),
    "small tiles": lambda: (causal().layout(256, 512, (16, 16)), {}),
    "single keys": lambda: (single_keys(), {}),
    "rows and keys by index": lambda: (
        replace(
            every_tile(256, 512, 64, 0),
            q_index=torch.arange(256).int()[None, None],
            kv_index=torch.arange(512).int()[None, None],
        ),
        {},
    ),
    "key ranges": lambda: (ranged(-1), {}),
    "row ranges": lambda: (ranged(-2), {}),
    "softcap": lambda: (causal_lists(), {"softcap": 30.0}),
    "bias": lambda: (causal_lists(), {"bias": torch.empty(1, 1, 256, 512)}),
    "bias of each key": lambda: (causal_lists(), {"bias": torch.empty(1, 2, 1, 512)}),
    "relative bias": lambda: (
        causal_lists(), {"bias": torch.empty(1, 2, 1, 999), "bias_first": -500}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["forward", "query gradient", "key gradient"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_feature(variant: str, kernel: str) -> None:
    layout, options = VARIANTS[variant]()
    config = shipped(kernel, 64, 64, 2, 9)
    launch = launch_of(kernel, config, (64, 64), torch.float16, layout, **options)
    found = compile_kernel(*launch, 90)
    assert found.shared <= SHARED_MEMORY[90]


@pytest.mark.parametrize("keys", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("kernel", ["forward", "decode"])
def test_keys_of_8_bits(kernel: str, capability: int, keys: torch.dtype) -> None:
    for dims in ((128, 128), (576, 512)):
        config = shipped(kernel, *dims, 2, capability // 10)
        options: dict[str, Any] = {"group": 8 if kernel == "decode" else 1, "keys": keys}
        options["latent"] = dims == (576, 512)
        lists = causal_lists(kernel)
        launch = launch_of(kernel, config, dims, torch.bfloat16, lists, **options)
        assert launch[1]["SHARED"] == options["latent"]
        sound(compile_kernel(*launch, capability), capability, 512)


@pytest.mark.parametrize(("dims", "stack"), [((80, 96), 0), ((40, 24), 56), ((192, 128), 0)])
def test_odd_head_sizes(dims: tuple[int, int], stack: int) -> None:
    config = shipped("forward", *dims, 2, 9)
    launch = launch_of("forward", config, dims, torch.bfloat16, causal_lists())
    sound(compile_kernel(*launch, 90), 90, stack)


@pytest.mark.parametrize("kernel", ["forward", "query gradient", "key gradient"])
def test_descriptors_of_hopper(kernel: str) -> None:
    config = replace(shipped(kernel, 128, 128, 2, 9), tma=True)
    found = compile_kernel(
        *launch_of(kernel, config, (128, 128), torch.float16, causal_lists()), 90
    )
    assert "cp.async.bulk.tensor" in found.ptx
    apart = compile_kernel(
        *launch_of(kernel, replace(config, tma=False), (128, 128), torch.float16, causal_lists()),
        90,
    )
    assert "cp.async.bulk.tensor" not in apart.ptx


def test_descriptors_only_where_the_copy_engine_can_take_them() -> None:
    config = replace(shipped("forward", 128, 128, 2, 9), tma=True)
    odd = launch_of("forward", config, (120, 128), torch.float16, causal_lists())[1]
    assert odd["K_TILES"] is None
    assert odd["V_TILES"] is not None


HOPPER = [
    pytest.param(run_hopper.TWO, 128, id="128, two"),
    pytest.param(run_hopper.ONE, 64, id="64, one"),
    pytest.param(run_hopper.THREE, 64, id="64, three"),
]


@pytest.mark.parametrize(("form", "dim"), HOPPER)
@pytest.mark.parametrize("lists", ["none", "whole tiles", "causal", "causal, half tiles"])
def test_specialised_warps(lists: str, form: Any, dim: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_hopper, "form", lambda _: form)
    layout, dtype = None, torch.bfloat16
    if lists == "whole tiles":
        layout, dtype = Layout.from_dense(torch.ones(256, 512) > 0, 128), torch.float16
    elif lists != "none":
        layout = causal().layout(256, 512, (128, 64 if "half" in lists else 128))
    config = shipped("forward", dim, dim, 2, 9)
    launch = launch_of("forward on Hopper", config, (dim, dim), dtype, layout)
    found = compile_kernel(*launch, 90)
    # What lies on the stack is read between blocks, not in their loops.
    assert found.stack <= (224 if form.parts == 3 else 176)
    if form.programs == 2:
        assert 2 * (found.shared + 1024) <= SHARED_MEMORY[90] + 1024
        assert found.registers <= 128
    assert found.shared <= SHARED_MEMORY[90]
    assert "setmaxnreg" in found.ptx
    # Scores and sums of a step are in flight together.
    assert "wgmma.wait_group.sync.aligned 1;" in found.ptx
