"""What one rank of `foveate bench parallel` does: check, count, and take the time, in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foveate.bench.job import DTYPES
from foveate.ops import Layout, attention
from foveate.ops.errors import FoveateError
from foveate.parallel.context import (
    ContextParallel,
    LinkError,
    Sizes,
    balance,
    scheme_of,
    volume,
)
from foveate.parallel.context.attend import Sequence
from foveate.parallel.spawn import Place
from foveate.parts.longcontext import draw_documents, seen_by, settings
from foveate.runs.memory import Peak

# Of the largest right value: sums of other orders, in the dtype.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Task:
    """What all ranks are told.

    Attributes:
        mask: a name of the catalogue.
        length: tokens of the sequence.
        heads: query heads.
        kv_heads: key heads.
        head_dim: of keys and values.
        dtype: of tensors.
        contestants: pairs of a scheme and a sharding.
        documents: their distribution.
        repeats: rounds.
        seed: of tensors, documents and tables.
    """

    mask: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    contestants: tuple[tuple[str, str], ...]
    documents: str
    repeats: int
    seed: int


def rank_of(place: Place, task: Task) -> list[dict[str, Any]]:
    """The results of one rank, one for each contestant; the first is one rank with everything."""
    where = torch.Generator().manual_seed(task.seed)
    drawn = [
        torch.randn(1, h, task.length, task.head_dim, generator=where).to(DTYPES[task.dtype])
        for h in (task.heads, task.kv_heads, task.kv_heads, task.heads)
    ]
    tile = max(8, min(64, task.length // 16 // 8 * 8))
    s = settings(
        draw_documents(task.length, task.documents, task.seed), heads=task.heads, tile=tile,
        seed=task.seed,
    )  # fmt: skip
    seen = seen_by(task.mask, s)
    right, alone = _alone(place, drawn, seen, task.repeats)
    results = [alone]
    ready: list[tuple[dict[str, Any], Sequence, list[Tensor]]] = []
    for scheme, sharding in task.contestants:
        result: dict[str, Any] = {"scheme": scheme, "sharding": sharding}
        results.append(result)
        try:
            sequence, own = _prepared(scheme, sharding, drawn, seen, task)
            _judged(place, result, sequence, own, right, task)
        except LinkError:  # another rank is gone: no refusal
            raise
        except FoveateError as error:
            result["refused"] = " ".join(str(error).split())
            continue
        ready.append((result, sequence, own))
    for turn in range(task.repeats):
        for result, sequence, own in (
            ready[turn % max(1, len(ready)) :] + ready[: turn % max(1, len(ready))]
        ):
            _timed(result, sequence, own)
    return results


def _alone(
    place: Place, drawn: list[Tensor], seen: Any, repeats: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Rank 0 computes everything; its answers go to all ranks, its seconds are the base."""
    q, k, v, dout = drawn
    wall: list[float] = []
    cpu: list[float] = []
    found = [torch.zeros_like(x) for x in (q, q, k, v)]
    if place.rank == 0:
        given = {"layout": seen} if isinstance(seen, Layout) else {"mask": seen}
        for _ in range(repeats + 1):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            begin = (time.perf_counter(), time.process_time())
            out = attention(*leaves, **given).out
            grads = torch.autograd.grad(out, leaves, dout)
            wall.append(time.perf_counter() - begin[0])
            cpu.append(time.process_time() - begin[1])
        found = [out.detach(), *grads]
    for x in found:
        shared = x.float()
        dist.broadcast(shared, 0)
        x.copy_(shared)
    return found, {"scheme": "one rank", "sharding": "", "wall": wall[1:], "cpu": cpu[1:]}


def _prepared(
    scheme: str, sharding: str, drawn: list[Tensor], seen: Any, task: Task
) -> tuple[Sequence, list[Tensor]]:
    cp = ContextParallel(None, scheme, sharding)
    given = {"layout": seen} if isinstance(seen, Layout) else {"mask": seen}
    sequence = cp.sequence(task.length, **given)
    scheme_of(scheme).check(cp.ranks, task.heads)
    return sequence, [sequence.split(x, 2) for x in drawn]


def _step(sequence: Sequence, own: list[Tensor]) -> tuple[list[Tensor], dict[str, int]]:
    """(out, dq, dk, dv) and what was sent forward."""
    leaves = [x.detach().requires_grad_() for x in own[:3]]
    out = sequence.attention(*leaves).out
    forward = dict(sequence.cp.traffic.numbers)
    return [out.detach(), *torch.autograd.grad(out, leaves, own[3])], forward


def _judged(
    place: Place,
    result: dict[str, Any],
    sequence: Sequence,
    own: list[Tensor],
    right: list[Tensor],
    task: Task,
) -> None:
    """The first step: how long planning took, what was sent against theory, is it right."""
    traffic = sequence.cp.traffic
    traffic.reset()
    begin = time.perf_counter()
    found, forward = _step(sequence, own)
    result["first_seconds"] = time.perf_counter() - begin
    backward = {w: n - forward.get(w, 0) for w, n in traffic.numbers.items()}
    sizes = Sizes(task.length, place.size, task.heads, task.kv_heads, task.head_dim, task.head_dim)
    told = volume(sequence.cp.scheme, sizes, sequence.plan, place.rank)
    result["sent"] = {"forward": sum(forward.values()), "backward": sum(backward.values())}
    result["bytes"] = sum(traffic.bytes.values())
    result["theory"] = {
        "forward": float(sum(told.forward.values())), "backward": float(sum(told.backward.values()))
    }  # fmt: skip
    errors = [torch.zeros(())]
    for got, whole in zip(found, right):
        scale = float(whole.abs().max()) or 1.0
        off = (got.float() - sequence.split(whole, 2).float()).abs()
        errors += [off.max() / scale] if off.numel() else []
    result["error"] = float(torch.stack(errors).max())  # NaN if one is, as Python's max isn't
    result["right"] = result["error"] <= TOLERANCE[task.dtype]
    if place.rank == 0:
        even = balance(sequence.rule, sequence.sharding)
        result["imbalance"], result["area_imbalance"] = even.imbalance, even.area_imbalance
    with Peak(torch.device("cpu")) as peak:
        _step(sequence, own)
    result["peak_bytes"] = peak.bytes
    result["wall"], result["cpu"] = [], []


def _timed(result: dict[str, Any], sequence: Sequence, own: list[Tensor]) -> None:
    dist.barrier()
    begin = (time.perf_counter(), time.process_time())
    _step(sequence, own)
    result["wall"].append(time.perf_counter() - begin[0])
    result["cpu"].append(time.process_time() - begin[1])
