"""Kernels compiled for a GPU that needn't be there, and what the compiler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.ops import Layout
from foveate.ops.triton import run_backward, run_forward
from foveate.ops.triton.call import describe
from foveate.ops.triton.config import Config, Forced

SHARED_MEMORY = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
}  # of a block at most, by compute capability
_TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """ptx, sass; bytes of shared memory of a block, of stack of a thread (0: nothing spills)."""

    ptx: str
    sass: str
    shared: int
    stack: int
    registers: int


def compile_kernel(kernel: Any, args: dict[str, Any], capability: int) -> Compiled:
    """A kernel compiled as a launch with these arguments would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    args = dict(args)
    names = ("num_warps", "num_stages", "maxnreg")
    options = {name: args.pop(name) for name in names if name in args}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, param in enumerate(kernel.params):
        x = args.pop(param.name)
        kind, special = _kind(x, param)
        signature[param.name] = kind
        if kind == "constexpr":
            constants[param.name] = x
        elif special:
            aligned[(index,)] = [["tt.divisibility", 16]]
    assert not args, args.keys()
    kinds: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kinds  # noqa: N813
    source = kinds(kernel, signature, constants, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _tool("cuobjdump", "-res-usage", found.asm["cubin"])
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        found.asm["ptx"],
        _tool("cuobjdump", "-sass", found.asm["cubin"]),
        found.metadata.shared,
        numbers["STACK"] + numbers["LOCAL"],
        numbers["REG"],
    )


def _kind(x: Any, param: Any) -> tuple[str, bool]:
    """(type of an argument, whether Triton would see that it is a multiple of 16)."""
    if param.is_constexpr or x is None:
        return "constexpr", False
    if isinstance(x, Tensor):
        return _TYPES[x.dtype], x.data_ptr() % 16 == 0
    if hasattr(x, "block_shape"):
        layout = f",{x.layout!r}" if hasattr(x, "layout") else ""
        return f"tensordesc<{_TYPES[x.base.dtype][1:]}{x.block_shape}{layout}>", False
    if isinstance(x, float):
        return "fp32", False
    if x == 1 and not param.do_not_specialize:
        return "constexpr", False
    wide = not -(1 << 31) <= x < 1 << 31
    return "i64" if wide else "i32", x % 16 == 0 and not param.do_not_specialize


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [str(path), option, file.name]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def launch_of(
    kernel: str,
    config: Config,
    dims: tuple[int, int],
    dtype: torch.dtype,
    layout: Layout | None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """(kernel, arguments) of a launch, for tensors that nothing is ever read from.

    options: group, latent (values within the keys), softcap, bias, bias_first, keys (their dtype).
    """
    from foveate.ops.triton.kernels.attend import attend
    from foveate.ops.triton.kernels.key_gradient import key_gradient
    from foveate.ops.triton.kernels.query_gradient import query_gradient

    dim, value_dim = dims
    q_len, kv_len = (256, 512) if layout is None else (layout.q_len, layout.kv_len)
    group = options.get("group", 1)
    query = torch.empty(1, 2 * group, q_len, dim, dtype=dtype)
    narrow = options.get("keys", dtype)
    key = torch.empty(1, 2, kv_len, dim, dtype=narrow)
    value = torch.empty(1, 2, kv_len, value_dim, dtype=narrow)
    if options.get("latent"):
        value = key[..., :value_dim]
    softcap, bias, first = (options.get(name) for name in ("softcap", "bias", "bias_first"))
    out, lse = torch.empty(*query.shape[:3], value_dim, dtype=dtype), torch.empty(query.shape[:3])
    with Forced(config):
        call = describe(query, key, value, layout, 0.1, softcap, bias, first)
        if kernel == "forward on Hopper":
            from foveate.ops.triton import run_hopper
            from foveate.ops.triton.kernels.hopper import attend_hopper

            return attend_hopper, run_hopper.arguments(call, out, lse)
        if kernel == "query gradient":
            args, _, _ = run_backward.query_arguments(call, run_backward.Rows(out, out, lse, None))
            found = query_gradient
        elif kernel == "key gradient":
            args, _, _ = run_backward.key_arguments(call, out, lse, lse)
            found = key_gradient
        else:
            call = call.finer(run_forward.choose(call)[0])
            args, _ = run_forward.arguments(call)
            found = attend
            steps = dict(zip(("o_b", "o_h", "o_l"), out.stride()))
            steps |= {"l_b": lse.stride(0), "l_h": lse.stride(1)}
            args |= {"O": out, "L": lse, "o_s": 0, "l_s": 0, "splits": 1, "VIRTUAL": False, **steps}
    args.pop("programs")
    return found, args
