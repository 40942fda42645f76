"""One FFN rank's part of a model's feed-forward layers: experts by number and width, no state.

    y = sum over FFN ranks of (shared(x) + sum over chosen experts i of w_i expert_i(x)), each rank
        with its own experts and its own slice of the inner width

Step-3, arXiv 2507.19427, section on AFD: TP, EP or both; routing is the attention side's. On a
single FFN rank every sum runs in the order of `foveate.nn.MoE`, so that results are bit-equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.nn.feedforward import GELU, SwiGLU
from foveate.nn.moe import MoE, Router
from foveate.ops.errors import InputError
from foveate.parallel.disaggregate.plan import Plan


class Routes:
    """Which experts each of N rows runs: ids (N, k) int32 and weights (N, k); none: dense."""

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        self.ids, self.weights = ids, weights


def route(router: Router | None, rows: Tensor) -> Routes | None:
    """The router's choice for rows (N, dim), ids ascending; None for a dense layer.

    Chosen are `top_k` of each row; where a router allows fewer, the rest has weight 0.
    """
    if router is None:
        return None
    routed = router(rows)
    # A stable sort of "not chosen" brings the chosen experts forward, in ascending order.
    ids = (~routed.chosen).to(torch.uint8).sort(dim=-1, stable=True).indices[:, : router.top_k]
    weights = routed.weights.gather(1, ids) * routed.chosen.gather(1, ids)
    return Routes(ids.to(torch.int32), weights)


def check_feedforward(layer: nn.Module, at: int) -> None:
    """Refuse what can't be split.

    Raises:
        InputError: neither SwiGLU nor experts.
    """
    if isinstance(layer, GELU) or not isinstance(layer, SwiGLU | MoE):
        raise InputError(
            f"disaggregate: layer {at} has a {type(layer).__name__}; expected SwiGLU or experts "
            "(FoveateConfig(feedforward='swiglu'))."
        )
    if isinstance(layer, MoE) and (layer.router.relation or layer.router.scores) is not None:
        raise InputError(
            f"disaggregate: layer {at}'s router is {layer.router.relation or layer.router.scores}; "
            "expected one that scores each token by a linear map (FoveateConfig(router='top-k'))."
        )


class FFNPart(nn.Module):
    """One rank's part of one layer.

    Args:
        layer: the whole feed-forward layer; what this rank needs of it is copied.
        plan: all ranks.
        index: this rank among the FFN ranks.
    """

    def __init__(self, layer: SwiGLU | MoE, plan: Plan, index: int) -> None:
        super().__init__()
        instance, part = divmod(index, plan.tp)
        dense = layer.shared if isinstance(layer, MoE) else layer
        self.dense = None if dense is None else _narrow(dense, index, plan.ffn_ranks)
        self.experts = range(0)
        if isinstance(layer, MoE):
            self.experts = range(*_span(len(layer.gate), instance, plan.ffn))
            inner = slice(*_span(layer.gate.shape[1], part, plan.tp))
            mine = slice(self.experts.start, self.experts.stop)
            self.gate = _kept(layer.gate[mine, inner])
            self.up = _kept(layer.up[mine, inner])
            self.down = _kept(layer.down[mine, :, inner])

    def forward(self, rows: Tensor, routes: Routes) -> Tensor:
        """This rank's part of y (N, dim) for rows (N, dim)."""
        if not self.experts and self.dense is not None:
            return self.dense(rows)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            at, place = (routes.ids == expert).nonzero(as_tuple=True)
            if not len(at):
                continue
            mine = rows[at]
            inner = functional.silu(mine @ self.gate[i].T) * (mine @ self.up[i].T)
            weight = routes.weights[at, place, None]
            out = out.index_add(0, at, ((inner @ self.down[i].T) * weight).to(out.dtype))
        return out if self.dense is None else out + self.dense(rows)


def _span(total: int, index: int, parts: int) -> tuple[int, int]:
    """Where part `index` of `parts` begins and ends; sizes differ by at most one."""
    return total * index // parts, total * (index + 1) // parts


def _kept(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def _narrow(layer: SwiGLU, index: int, parts: int) -> SwiGLU:
    """A SwiGLU with a slice of the inner width; the parts' outputs sum to the whole one's."""
    at = slice(*_span(layer.gate.out_features, index, parts))
    with torch.device("meta"):
        made = SwiGLU(layer.gate.in_features, at.stop - at.start)
    made.gate.weight, made.up.weight = _kept(layer.gate.weight[at]), _kept(layer.up.weight[at])
    made.down.weight = _kept(layer.down.weight[:, at])
    return made
