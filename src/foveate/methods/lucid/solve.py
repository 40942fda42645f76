"""M Y = V by blocks, never holding M: the forward substitution and its closed backward.

    M_ij = exp(kbar_i . kbar_j / sqrt(d) - sqrt(d)) for j < i,  1 for j = i,  0 for j > i

Forward (the paper's algorithm 2), blocks I in order:

    R = V_I - sum_{J < I} M_IJ Y_J,        Y_I solves the unit lower triangular M_II Y_I = R

Backward, given G = dL/dY: dV solves M^T dV = G, blocks in reverse order, and with
W = -(dV Y^T) o M, strictly lower,

    dkbar = (W kbar + W^T kbar) / sqrt(d)

The first rows may be solved already (tokens in a cache): their Y is then an input, whose gradient
is -M_{new, past}^T dV.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.methods.lucid.triangle import Rows, Run, Triangle
from foveate.parts.norm import rms
from foveate.parts.precision import uncast


def normalised(k: Tensor, eps: float) -> Tensor:
    """The kbar of k (..., D): RMS norm without a gain, in fp32 or wider."""
    return k.to(torch.promote_types(k.dtype, torch.float32)) / rms(k, eps)


def solve(kbar: Tensor, v: Tensor, past: Tensor, where: Triangle) -> Tensor:
    """Y of the new rows.

    Args:
        kbar: (B, Hkv, n, D), normalised keys of all tokens.
        v: (B, Hkv, n - p, Dv), values of the new ones, in the dtype of kbar.
        past: (B, Hkv, p, Dv), Y of the first p rows; p may be 0.
        where: which elements of M count, for rows p ... n - 1.

    Returns:
        (B, Hkv, n - p, Dv); differentiable once by kbar, v and past.
    """
    with uncast(kbar):
        return _Solve.apply(kbar, v, past, where)


def entries(kbar: Tensor, rows: slice, cols: slice) -> Tensor:
    """exp(kbar_i . kbar_j / sqrt(d) - sqrt(d)): (B, Hkv, rows, cols), the masks not applied."""
    root = kbar.shape[-1] ** 0.5
    logits = (kbar[:, :, rows] / root) @ kbar[:, :, cols].mT
    return logits.sub_(root).exp_()


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kbar: Tensor, v: Tensor, past: Tensor, where: Triangle) -> Tensor:
        start = past.shape[2]
        y = torch.cat((past, v), 2)
        for block in where.blocks:
            rows = slice(block.first, block.stop)
            right = y[:, :, rows]
            for run in block.runs:
                right = right - _tile(kbar, rows, run, where) @ y[:, :, run.first : run.stop]
            y[:, :, rows] = torch.linalg.solve_triangular(
                _diagonal(kbar, block, where), right, upper=False, unitriangular=True
            )
        ctx.where, ctx.start = where, start
        ctx.save_for_backward(kbar, y)
        return y[:, :, start:].clone() if start else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        with uncast(grad):
            return _Solve._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        kbar, y = ctx.saved_tensors
        where, start = ctx.where, ctx.start
        dv = torch.cat((y.new_zeros(*y.shape[:2], start, y.shape[3]), grad), 2)
        dk = torch.zeros_like(kbar)
        for block in reversed(where.blocks):
            rows = slice(block.first, block.stop)
            own = _diagonal(kbar, block, where)
            solved = torch.linalg.solve_triangular(
                own.mT, dv[:, :, rows], upper=True, unitriangular=True
            )
            dv[:, :, rows] = solved
            _keys(dk, kbar, rows, rows, own.mul_(solved @ y[:, :, rows].mT))
            for run in block.runs:
                cols = slice(run.first, run.stop)
                tile = _tile(kbar, rows, run, where)
                dv[:, :, cols] -= tile.mT @ solved
                _keys(dk, kbar, rows, cols, tile.mul_(solved @ y[:, :, cols].mT))
        dk /= -(kbar.shape[-1] ** 0.5)
        return dk, dv[:, :, start:], dv[:, :, :start], None


def _keys(dk: Tensor, kbar: Tensor, rows: slice, cols: slice, weights: Tensor) -> None:
    """Add W kbar to the rows' and W^T kbar to the columns' gradient."""
    dk[:, :, rows] += weights @ kbar[:, :, cols]
    dk[:, :, cols] += weights.mT @ kbar[:, :, rows]


def _tile(kbar: Tensor, rows: slice, run: Run, where: Triangle) -> Tensor:
    """M of a block of rows and a run of earlier columns."""
    cols = slice(run.first, run.stop)
    tile = entries(kbar, rows, cols)
    return _masked(tile, where.seen(rows, cols)) if run.partial else tile


def _diagonal(kbar: Tensor, block: Rows, where: Triangle) -> Tensor:
    """M - 1 of a diagonal block: strictly lower triangular."""
    rows = slice(block.first, block.stop)
    tile = entries(kbar, rows, rows).tril_(-1)
    return _masked(tile, where.seen(rows, rows)) if block.partial else tile


def _masked(tile: Tensor, seen: Tensor) -> Tensor:
    heads = tile.shape[1] // seen.shape[1]
    if seen.shape[1] > 1:
        seen = seen.repeat_interleave(heads, 1)
    return tile.masked_fill_(~seen, 0.0)
