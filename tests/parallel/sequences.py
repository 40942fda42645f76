"""What the tests of context parallelism share: problems, one rank's answer, all ranks' answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.ops import Layout, attention, causal
from foveate.parallel.context import ContextParallel, Links, run_local

NAMES = ("out", "lse", "dq", "dk", "dv")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def problem(
    length: int, heads: tuple[int, int] = (4, 2), dim: tuple[int, int] = (16, 8), batch: int = 2,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def draw(h: int, d: int) -> Tensor:
        return torch.randn(batch, h, length, d, generator=g, dtype=torch.float64).to(dtype)

    return {
        "q": draw(heads[0], dim[0]), "k": draw(heads[1], dim[0]), "v": draw(heads[1], dim[1]),
        "dout": draw(heads[0], dim[1]), "dlse": draw(heads[0], 1)[..., 0].to(
            torch.promote_types(dtype, torch.float32)),
    }  # fmt: skip


def answer(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor]) -> dict:
    """out, lse and gradients of a loss that looks at both; rows without keys have no lse there."""
    seen = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (out * p["dout"]).sum() + (seen * p["dlse"]).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads)))


def one_rank(p: dict[str, Tensor], mask: Any = None, layout: Any = None, **options: Any) -> dict:
    """The reference op in float64."""
    p = {name: x.double() for name, x in p.items()}
    q, k, v = (p[n].clone().requires_grad_() for n in "qkv")
    out, lse = attention(q, k, v, mask, layout=layout, backend="reference", **options)
    return answer(out, lse, q, k, v, p)


def this_rank(
    where: Links | None, p: dict[str, Tensor], scheme: Any, sharding: Any, mask: Any = None,
    layout: Any = None, positions: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One rank's answers, and what it sent: {"forward": numbers, "backward": numbers}."""
    cp = ContextParallel(where, scheme, sharding)
    sequence = cp.sequence(p["q"].shape[2], mask, layout=layout, positions=positions)
    own = {name: sequence.split(x, 2) for name, x in p.items()}
    q, k, v = (own[n].requires_grad_() for n in "qkv")
    out, lse = sequence.attention(q, k, v, **options)
    forward = dict(cp.traffic.numbers)
    cp.traffic.reset()
    found = answer(out, lse, q, k, v, own)
    backward = dict(cp.traffic.numbers)
    return {
        **found, "forward": forward, "backward": backward, "sharding": sequence.sharding,
    }  # fmt: skip


def on_ranks(ranks: int, *args: Any, **options: Any) -> list[dict[str, Any]]:
    """What `this_rank` returns on each of some threads."""
    return run_local(ranks, lambda links: this_rank(links, *args, **options))


def any_layouts() -> dict[str, Layout]:
    """Kinds of tiles that no mask makes: gathered keys, ranges, rows in an order of their own."""
    n, tile = 96, 16
    tiles = torch.rand(1, 4, 6, 6) < 0.3
    keys = torch.rand(1, 4, 6, n) < 0.2
    order = torch.randperm(n)[None, None].int()
    plain = causal().layout(n, n, tile)
    ranged = torch.stack((torch.arange(n) // 3, torch.arange(n) + 1), -1).int()[None, None]
    return {
        "tiles": Layout.from_tiles(tiles, n, n, tile, causal()),
        "single keys": Layout.from_selection(tiles[:, :2], keys[:, :2], n, n, tile, causal()),
        "ordered": replace(plain, q_index=order, kv_index=order, _counts=[]),
        "key ranges": replace(plain, kinds=torch.full_like(plain.kinds, -1), key_range=ranged,
                              _counts=[]),
        "row ranges": replace(plain, kinds=torch.full_like(plain.kinds, -2), row_range=ranged,
                              _counts=[]),
    }  # fmt: skip


def joined(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    sharding = found[0]["sharding"]
    return {name: sharding.join([f[name] for f in found], 2) for name in NAMES}


def check_equal(found: list[dict[str, Any]], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every output and gradient within the dtype's tolerance of the scale of what is right."""
    got, tolerance = joined(found), TOLERANCE[dtype]
    for name in NAMES:
        right, ours = want[name], got[name].double()
        empty = right == -torch.inf
        assert torch.equal(empty, ours == -torch.inf), name
        right, ours = right.masked_fill(empty, 0), ours.masked_fill(empty, 0)
        assert torch.isfinite(ours).all(), name
        scale = max(1.0, float(right.abs().max()))
        error = float((right - ours).abs().max()) / scale
        assert error <= tolerance, f"{name}: {error:.2e}"
