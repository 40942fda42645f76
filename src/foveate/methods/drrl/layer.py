"""DR-RL in a layer: its policy, its training losses, and the state that it decodes from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.drrl.control import Decider
from foveate.methods.drrl.memory import DRRLState
from foveate.methods.drrl.method import DRRL
from foveate.methods.drrl.policy import Policy
from foveate.methods.drrl.reward import reinforce
from foveate.methods.drrl.run import attend, check, in_order
from foveate.ops import AttentionOutput
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.parts.attention import Heads
from foveate.parts.context import Context
from foveate.parts.form import check_step
from foveate.parts.state import State, Stateful

_POLICY = "drrl policy"
_BELOW = "drrl actions"
_RAN = "drrl ran"
_PACE = 0.1  # of the rewards' running mean


class DRRLLayer(Stateful, nn.Module):
    """See the package's text.

    Args:
        method: the hyper-parameters.
        heads: sizes of the layer.
    """

    baseline: Tensor
    seen: Tensor

    def __init__(self, method: DRRL, heads: Heads) -> None:
        super().__init__()
        if method.control == "fixed":
            method.fixed(heads.layer)
        self.method, self.heads = method, heads
        self.policy: Policy | None = None
        if method.learns:
            if not method.shared or heads.layer == method.owner:
                self.policy = Policy(heads.dim, len(method.ranks), method.energies)
            self.register_buffer("baseline", torch.zeros(()))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """No reward was seen yet."""
        if self.method.learns:
            self.baseline.zero_()
            self.seen.zero_()

    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        decider = self._decider(q, ctx)
        made = attend(self.method, q, k, v, ctx, decider)
        self._learn(decider, ctx)
        return made

    @override
    def new_state(self) -> DRRLState:
        if self.method.form == "whole":
            raise InputError(
                'drrl(form="whole") makes its bases of the whole sequence and can\'t decode; '
                'form="causal" can.'
            )
        return DRRLState(self.heads, self.method.segment, max(self.method.ranks))

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """New tokens, segment by segment; shapes as in `Stateful`."""
        assert isinstance(state, DRRLState)
        check_tensors(q, k, v)
        check(self.method, ctx)
        check_step("drrl", q, k, replace(ctx, real=None), len(state))
        real = ctx.real
        if real is None:
            real = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
        decider = self._decider(q, ctx)
        out = v.new_zeros(*q.shape[:3], v.shape[3])
        work = torch.promote_types(q.dtype, torch.float32)
        lse = out.new_full(out.shape[:3], -torch.inf, dtype=work)
        for rows, first, memory in state.admit(real.expand(len(q), -1)):
            assert memory.tokens is not None
            held = memory.tokens.append({"k": k[rows, :, first:], "v": v[rows, :, first:]})
            x = None if ctx.hidden is None else ctx.hidden[rows, first:]
            key = int(state.pads[rows[0].cpu()]) if state.pads is not None else 0
            got = in_order(decider, q[rows, :, first:], held["k"], held["v"], x, ctx, memory, key)
            if len(rows) == len(q) and not first:
                out, lse = got.out, got.lse
                continue
            at = torch.arange(first, q.shape[2], device=q.device)
            place = (rows[:, None, None], torch.arange(q.shape[1], device=q.device)[:, None], at)
            out = out.index_put(place, got.out.to(out.dtype))
            lse = lse.index_put(place, got.lse.to(lse.dtype))
        return AttentionOutput(out, lse)

    # -- deciding and learning ---------------------------------------------------------------------
    def _decider(self, q: Tensor, ctx: Context) -> Decider:
        method, policy = self.method, self.policy
        if method.learns and method.shared:
            if policy is not None:
                ctx.store[_POLICY] = policy
            policy = ctx.store.get(_POLICY)
        training = self.training and ctx.phase == "train" and torch.is_grad_enabled()
        again = bool(method.learns and self._ran(ctx, training))
        if training and self.policy is not None and not again:
            self.policy.steps += 1
        return Decider(
            method,
            ctx.layer,
            q.shape[3],
            policy,
            ctx.weights,
            training,
            ctx.generator,
            ctx.store.setdefault(_BELOW, {}),
        )

    def _ran(self, ctx: Context, training: bool) -> dict[str, Any]:
        """What the layer did in this forward; gradient checkpointing runs it twice."""
        ran: dict[str, Any] | None = ctx.store.get((_RAN, ctx.layer))
        if ran is None:
            ctx.store[_RAN, ctx.layer] = {"training": training}
            return {}
        if training and not ran["training"]:
            raise InputError(
                f"drrl: layer {ctx.layer} ran without gradients before, in the same forward, and "
                "its policy can't learn so; with gradient checkpointing use use_reentrant=False."
            )
        return ran

    def _learn(self, decider: Decider, ctx: Context) -> None:
        """Leave the loss and what was chosen in `ctx.aux`."""
        if decider.taken:
            ctx.aux["drrl_rank"] = torch.cat(decider.taken).float().mean()
        if decider.ran:  # later segments see more keys, and cost more at the same rank
            pairs = torch.tensor([float(n) for ranks, n in decider.ran for _ in ranks])
            ranks = torch.cat([ranks for ranks, _ in decider.ran]).float()
            ctx.aux["drrl_rank_of_pairs"] = (ranks * pairs.to(ranks)).sum() / pairs.sum()
        if not decider.rewards or not decider.log_probs:
            return
        rewards, log_probs = torch.cat(decider.rewards), torch.cat(decider.log_probs)
        mean = rewards.mean()
        ran = ctx.store[_RAN, ctx.layer]
        before = ran.get("baseline")
        if before is None:
            before = ran["baseline"] = torch.where(self.seen > 0, self.baseline, mean)
            with torch.no_grad():
                self.baseline.copy_(before + _PACE * (mean - before))
                self.seen += 1
        loss = reinforce(log_probs, rewards, before)
        ctx.aux["drrl_loss"] = self.method.weight * loss
        ctx.aux["drrl_reward"] = mean

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return repr(self.method)
