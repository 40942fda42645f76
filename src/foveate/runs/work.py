"""Counting what a call does, whatever it is made of: multiplications, and numbers written.

Attention by the core op counts the pairs that its mask or layout lets attend: 2 (D + Dv) operations
each in the forward, 2 (3 D + 2 Dv) in the backward (scores again, and four gradients). Products of
matrices count as torch's own counter has them. Everything else counts the numbers that it writes,
by themselves: they are memory traffic, not arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from foveate.ops import library


class Work(TorchDispatchMode):
    """Counts while it is active.

        with Work() as work:
            layer(x).sum().backward()
        work.flops, work.numbers

    Attributes:
        flops: floating-point operations of attention and of products of matrices.
        numbers: that all other operations wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.numbers = 0.0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _OURS:
            self.flops += _OURS[packet](*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif not getattr(func, "is_view", False):
            self.numbers += sum(x.numel() for x in _tensors(out))
        return out


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, list | tuple):
        return [x for one in out for x in _tensors(one)]
    return []


def _forward(*call: Any) -> float:
    q, v = call[0], call[2]
    return 2.0 * _pairs(*call) * (q.shape[3] + v.shape[3])


def _backward(*call: Any) -> float:
    q, v = call[4], call[6]
    return 2.0 * _pairs(*call[4:]) * (3 * q.shape[3] + 2 * v.shape[3])


def _pairs(*call: Any) -> float:
    """Of all batch entries and heads."""
    q, k = call[:2]
    return q.shape[0] * q.shape[1] * library.pairs(*call)


def _solve(a: Tensor, b: Tensor, *_: Any, **__: Any) -> float:
    """A triangular system: n^2 operations for each right side."""
    n = a.shape[-1]
    return float(prod(b.shape[:-2]) * n * n * b.shape[-1])


_OURS: dict[Any, Callable[..., float]] = {
    torch.ops.foveate.attention: _forward,
    torch.ops.foveate.attention_backward: _backward,
    torch.ops.aten.linalg_solve_triangular: _solve,
}
