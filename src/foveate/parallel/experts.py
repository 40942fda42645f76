"""Experts over ranks: each rank holds some of them, tokens travel to their experts and back.

    part = expert_part(model, group)             # on every rank; the model is whole before
    loss = part(ids, labels=ids).loss            # each rank with sequences of its own
    loss.backward()
    share_gradients(part, group)                 # then every rank steps its optimizer

Rank r holds experts floor(E r / R) to floor(E (r + 1) / R) of every mixture; all else is whole on
every rank. A layer makes two exchanges, of rows to the ranks of their experts and of outputs back,
and two more in the backward: each token sends a row to every rank that holds one of its experts, D
numbers, with the weights of that rank's experts, and gets D numbers back. Routing stays with the
token's rank, by similarity or attention too: its sequence is there, so neither needs an exchange of
its own.

What ranks compute is what one process does with the sequences of all of them: outputs, gradients
after `share_gradients`, and the load-balance loss, whose loads are counted over all ranks (one
exchange of E + 1 numbers). Losses are to be means over as many tokens on each rank, as with DDP.

Nguyen et al. 2025, arXiv 2505.00792, adds no exchange to a mixture's own; GShard (Lepikhin et al.
2020, arXiv 2006.16668, section 3.2) is where experts over ranks come from. It takes gloo or NCCL.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.nn import functional
from typing_extensions import override

from foveate.nn import MoE
from foveate.nn.moe import Routed
from foveate.ops.errors import InputError
from foveate.parts.balance import Balance

Group = distributed.ProcessGroup | None
M = TypeVar("M", bound=nn.Module)
_WEIGHTS = ("gate", "up", "down")


class ExpertPart(MoE):
    """One rank's part of a mixture of experts; stands where the whole layer stood.

    Args:
        layer: whole; the rank's experts are copied, and whatever every rank has.
        group: the ranks that share it; None is the default group.

    Attributes:
        experts: numbers of those that are here.
        sent: rows that the last forward sent to other ranks.

    Raises:
        InputError: fewer experts than ranks, or this rank isn't in the group.
    """

    def __init__(self, layer: MoE, group: Group = None) -> None:
        nn.Module.__init__(self)
        rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
        total = layer.router.experts
        if rank < 0:
            raise InputError("ExpertPart: this rank isn't in the group.")
        if total < ranks:
            raise InputError(
                f"ExpertPart: {total} experts can't be dealt to {ranks} ranks; expected no more "
                "ranks than experts."
            )
        self.group, self.rank, self.ranks = group, rank, ranks
        self.cuts = [total * r // ranks for r in range(ranks + 1)]
        self.experts = range(self.cuts[rank], self.cuts[rank + 1])
        self.sent = 0
        self.router, self.shared = deepcopy(layer.router), deepcopy(layer.shared)
        self.balance, self.per_slot = layer.balance, layer.per_slot
        mine = slice(self.experts.start, self.experts.stop)
        for name in _WEIGHTS:
            whole = getattr(layer, name)
            setattr(self, name, nn.Parameter(whole.detach()[mine].clone()))
        self.train(layer.training)

    @override
    def run(self, rows: Tensor, routed: Routed) -> Tensor:
        """As `MoE.run` for this rank's rows, with all ranks' experts; every rank must call it."""
        going: list[Tensor] = []  # rows for each rank, by their index
        for start, stop in zip(self.cuts, self.cuts[1:]):
            going.append(routed.chosen[:, start:stop].any(1).nonzero()[:, 0])
        out_sizes = [len(at) for at in going]
        self.sent = sum(n for r, n in enumerate(out_sizes) if r != self.rank)
        most = max(stop - start for start, stop in zip(self.cuts, self.cuts[1:]))
        weights = routed.weights * routed.chosen
        given = []
        for at, start, stop in zip(going, self.cuts, self.cuts[1:]):
            given.append(functional.pad(weights[at, start:stop], (0, most - (stop - start))))
        in_sizes = self._sizes(out_sizes, rows.device)
        index = torch.cat(going)
        found = exchange(rows[index], out_sizes, in_sizes, self.group)
        shares = exchange(torch.cat(given), out_sizes, in_sizes, self.group)
        done = exchange(self._computed(found, shares), in_sizes, out_sizes, self.group)
        return torch.zeros_like(rows).index_add(0, index, done)

    def _computed(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of this rank's experts for rows (n, dim) of any rank."""
        out = torch.zeros_like(rows)
        for i in range(len(self.experts)):
            # Without rows too: the backward's exchanges need every rank, so what comes out is
            # always connected with this rank's weights.
            at = (weights[:, i] != 0).nonzero()[:, 0]
            mine, weight = rows[at], weights[at, i, None]
            inner = functional.silu(mine @ self.gate[i].T) * (mine @ self.up[i].T)
            out = out.index_add(0, at, ((inner @ self.down[i].T) * weight).to(out.dtype))
        return out

    def _sizes(self, going: list[int], device: torch.device) -> list[int]:
        """How many rows come from each rank."""
        sent = torch.tensor(going, device=device)
        got = torch.zeros_like(sent)
        distributed.all_to_all_single(got, sent, group=self.group)
        return [int(n) for n in got.tolist()]

    @override
    def balanced(self, routed: Routed, real: Tensor | None) -> Balance:
        """Loads over all ranks; the mean over ranks of the loss is that of all tokens together."""
        probs = routed.spread.to(torch.promote_types(routed.spread.dtype, torch.float32))
        rows = torch.ones_like(probs[:, 0]) if real is None else real.to(probs.dtype)
        counts = torch.cat(((routed.chosen * rows[:, None]).sum(0), rows.sum()[None])).detach()
        distributed.all_reduce(counts, group=self.group)
        load, total = counts[:-1] / counts[-1].clamp_min(1), counts[-1].clamp_min(1)
        share = load / load.sum().clamp_min(1e-9) if self.per_slot else load
        mean = (probs * rows[:, None]).sum(0) * (self.ranks / total)
        return Balance(len(load) * (mean * share).sum(), load)

    @override
    def mean(self, losses: Tensor, real: Tensor | None) -> Tensor:
        """Over all ranks' tokens: the mean over ranks of what each returns."""
        if real is not None:
            losses = losses[real]
        count = torch.tensor(len(losses), device=losses.device)
        distributed.all_reduce(count, group=self.group)
        return losses.sum() * (self.ranks / max(1, int(count)))


class _Exchange(Function):
    """Rows to the ranks that they are for; gradients travel the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: Group
    ) -> Tensor:
        ctx.sizes, ctx.group = (out_sizes, in_sizes), group
        return _moved(rows, out_sizes, in_sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out_sizes, in_sizes = ctx.sizes
        return _moved(grad, in_sizes, out_sizes, ctx.group), None, None, None


def _moved(rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: Group) -> Tensor:
    got = rows.new_zeros(sum(in_sizes), *rows.shape[1:])
    distributed.all_to_all_single(got, rows.contiguous(), in_sizes, out_sizes, group=group)
    return got


def exchange(rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: Group) -> Tensor:
    """Rows (n, ...) in order of the ranks that they are for, for those that are for this one.

    Args:
        rows: n = sum(out_sizes), the first out_sizes[0] for rank 0, and so on.
        out_sizes: rows for each rank.
        in_sizes: rows from each rank.
        group: the ranks.

    Returns:
        (sum(in_sizes), ...), in order of the ranks that they come from; differentiable.
    """
    return _Exchange.apply(rows, out_sizes, in_sizes, group)


def expert_part(model: M, group: Group = None) -> M:
    """A copy of a model in which every mixture of experts is this rank's part.

    Args:
        model: of `foveate.models`, causal or encoder, alike on all ranks.
        group: the ranks; None is the default group.

    Raises:
        InputError: it has no experts, or fewer than ranks.
    """
    made = deepcopy(model)
    found = 0
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MoE):
                setattr(parent, name, ExpertPart(child, group))
                found += 1
    if not found:
        raise InputError(
            "expert_part: the model has no experts; give it some (FoveateConfig(moe_layers=...))."
        )
    return made


def share_gradients(model: nn.Module, group: Group = None) -> None:
    """Make every rank's gradients those of the mean over ranks of their losses.

    Gradients of what all ranks hold are averaged; an expert has its gradients of all ranks' tokens
    already, as a sum. Call it on all ranks, after the backward and before the optimizer's step.
    """
    ranks = distributed.get_world_size(group)
    own = _own(model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # no token came by here; others may have sent some
            parameter.grad = torch.zeros_like(parameter)
        if id(parameter) not in own:
            distributed.all_reduce(parameter.grad, group=group)
        parameter.grad /= ranks


def whole_state(model: nn.Module, group: Group = None) -> dict[str, Tensor]:
    """The state dict of the whole model, on every rank: what `expert_part` was given, trained on.

    Call it on all ranks; `whole.load_state_dict(...)` and `save_pretrained` then work as ever.
    """
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for at, part in model.named_modules():
        if not isinstance(part, ExpertPart):
            continue
        sizes = [stop - start for start, stop in zip(part.cuts, part.cuts[1:])]
        for name in _WEIGHTS:
            mine = getattr(part, name).detach()
            room = functional.pad(mine, (0, 0, 0, 0, 0, max(sizes) - len(mine)))
            every = [torch.zeros_like(room) for _ in sizes]
            distributed.all_gather(every, room, group=group)
            state[f"{at}.{name}"] = torch.cat([one[:n] for one, n in zip(every, sizes)])
    return state


def _own(model: nn.Module) -> set[int]:
    """Parameters that only this rank has."""
    parts = [m for m in model.modules() if isinstance(m, ExpertPart)]
    return {id(getattr(part, name)) for part in parts for name in _WEIGHTS}
