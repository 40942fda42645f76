"""A mixture of experts: a router, SwiGLU experts of which each token runs a few, a shared one.

    y = shared(x) + sum over the chosen experts i of w_i expert_i(x)

Step-3 (arXiv 2507.19427): w is the softmax over all experts, not renormalised over the top 3.
DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores, a bias that counts for the choice
only, a choice of groups before the choice of experts, w renormalised and scaled.

Other scores, and averages over related tokens (arXiv 2505.00792), are parts that a router is given:
see `foveate.parts.routing`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.nn.feedforward import SwiGLU
from foveate.ops.errors import InputError
from foveate.parts.balance import Balance, load_balance
from foveate.parts.precision import uncast
from foveate.parts.routing import Around, Choice, Relation, Scores
from foveate.parts.selection import topk_mask


class Routed(NamedTuple):
    """(..., E) each, of tokens (...).

    probs: probabilities (with a relation: averaged), or sigmoid scores; weights: of the chosen
    experts, 0 elsewhere; chosen: bool; spread: what the load-balance loss is taken of.

    choice_losses: (...), of who learns to choose, None where nobody does; frozen: whether the
    choice is, so that nothing can balance the load.
    """

    probs: Tensor
    weights: Tensor
    chosen: Tensor
    spread: Tensor
    choice_losses: Tensor | None = None
    frozen: bool = False

    def flat(self) -> Routed:
        """Of sequences (B, L): the same of their tokens (B L)."""
        losses = self.choice_losses
        return Routed(
            self.probs.flatten(0, 1),
            self.weights.flatten(0, 1),
            self.chosen.flatten(0, 1),
            self.spread.flatten(0, 1),
            None if losses is None else losses.flatten(0, 1),
            self.frozen,
        )


class Router(nn.Module):
    """Which experts run for a token, and with which weight; in fp32, ties to the lower index.

    Args:
        dim: width of x.
        experts: E.
        top_k: experts for each token.
        score: "softmax" over all experts, or a "sigmoid" for each.
        renormalize: whether the chosen experts' weights sum to 1.
        scaling: factor on the weights.
        groups: experts are cut into so many groups, contiguously.
        top_groups: of them the best are kept, by the sum of their two best experts' scores.
        scores: in the place of the linear map `weight`, which isn't there then.
        relation: averages probabilities over related tokens before experts are chosen.

    Raises:
        InputError: numbers that don't fit, or a relation of sigmoid scores, which are no
            distribution.
    """

    bias: Tensor
    weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int,
        score: Literal["softmax", "sigmoid"] = "softmax",
        *,
        renormalize: bool = False,
        scaling: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        scores: Scores | None = None,
        relation: Relation | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise InputError(f"Router(top_k={top_k}): expected 1 to {experts} experts.")
        if score not in ("softmax", "sigmoid"):
            raise InputError(f"Router(score={score!r}): expected 'softmax' or 'sigmoid'.")
        if experts % groups or not 1 <= top_groups <= groups:
            raise InputError(
                f"Router(groups={groups}, top_groups={top_groups}): expected a divisor of "
                f"{experts} experts, and no more groups kept than there are."
            )
        if top_k > experts // groups * top_groups:
            raise InputError(
                f"Router(top_k={top_k}): {top_groups} groups hold {experts // groups * top_groups} "
                "experts only."
            )
        if score != "softmax" and (relation is not None or scores is not None):
            raise InputError(
                f"Router(score={score!r}): expected 'softmax' with {scores or relation}, which "
                "needs a distribution over experts."
            )
        self.dim, self.experts = dim, experts
        self.top_k, self.score, self.renormalize, self.scaling = top_k, score, renormalize, scaling
        self.groups, self.top_groups = groups, top_groups
        self.weight = nn.Parameter(torch.zeros(experts, dim)) if scores is None else None
        self.scores, self.relation = scores, relation
        self.register_buffer("bias", torch.zeros(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's Linear; the bias of the choice starts from 0."""
        if self.weight is not None:
            nn.init.uniform_(self.weight, -(self.dim**-0.5), self.dim**-0.5)
        nn.init.zeros_(self.bias)

    @property
    def active(self) -> int:
        """How many experts run for a token now."""
        return self.top_k if self.scores is None else self.scores.count(self.top_k)

    def forward(self, x: Tensor, around: Around | None = None) -> Routed:
        """Route tokens.

        Args:
            x: (..., dim); with a relation (B, L, dim).
            around: what is known of the tokens besides x; None is nothing, and every token sees
                every token.

        Raises:
            InputError: a relation, and no sequences.
        """
        work = torch.promote_types(x.dtype, torch.float32)
        rows = x.to(work)
        around = Around() if around is None else around
        choice: Choice | None = None
        with uncast(x):
            if self.scores is not None:
                logits = self.scores(rows)
                choice = self.scores.choose(rows, around)
            else:
                assert self.weight is not None
                logits = functional.linear(rows, self.weight.to(work))
        probs = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        spread = probs
        if self.relation is not None:
            if x.dim() != 3:
                raise InputError(
                    f"Router: {type(self.relation).__name__} relates the tokens of sequences; "
                    f"expected x (B, L, {self.dim}), got {tuple(x.shape)}."
                )
            probs = spread = self.relation(rows, probs, around)
        elif self.scores is not None and self.scores.temperature != 1:
            spread = (logits / self.scores.temperature).softmax(-1)
        frozen = choice is not None and not choice.learning
        if choice is not None and frozen:
            ranks = choice.logits.detach()
        else:
            ranks = probs.detach() + self.bias.to(work)
        allowed = None
        if self.groups > 1:
            by_group = ranks.unflatten(-1, (self.groups, -1))
            two = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1)
            kept = topk_mask(two, self.top_groups)
            allowed = kept.repeat_interleave(by_group.shape[-1], -1)
        chosen = topk_mask(ranks, self.active, allowed)
        weights = probs * chosen
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        losses = None
        if choice is not None and choice.learning:
            losses = -(choice.logits.log_softmax(-1) * chosen).sum(-1) / chosen.sum(-1)
        return Routed(probs, weights * self.scaling, chosen, spread, losses, frozen)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{self.dim}, experts={self.experts}, top_k={self.top_k}"


class MoE(nn.Module):
    """Experts behind a router, and optionally one expert that every token runs.

    Weights of the experts: gate and up (E, hidden, dim), down (E, dim, hidden).

    Args:
        router: as made for the same dim.
        hidden: width of an expert.
        shared: width of the shared expert, 0 for none.
        balance: weight of the load-balance loss, 0 for none.
        per_slot: whether that loss counts (token, slot) pairs, so that it is 1 for an even load;
            else tokens, so that it is top_k.
    """

    def __init__(
        self,
        router: Router,
        hidden: int,
        *,
        shared: int = 0,
        balance: float = 0.0,
        per_slot: bool = False,
    ) -> None:
        super().__init__()
        experts, dim = router.experts, router.dim
        self.router, self.balance, self.per_slot = router, balance, per_slot
        self.gate = nn.Parameter(torch.zeros(experts, hidden, dim))
        self.up = nn.Parameter(torch.zeros(experts, hidden, dim))
        self.down = nn.Parameter(torch.zeros(experts, dim, hidden))
        self.shared = SwiGLU(dim, shared) if shared else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's Linear, expert by expert."""
        for weight in (self.gate, self.up, self.down):
            bound = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self, x: Tensor, real: Tensor | None = None, around: Around | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the experts.

        Args:
            x: (B, L, dim).
            real: (B, L) bool, False on padding, which then doesn't count for the balance.
            around: what the router may know; see `Router.forward`.

        Returns:
            y (B, L, dim); "expert_load" (E,) and, in training, "expert_balance_loss" and what a
            router that learns to choose adds, "expert_choice_loss".
        """
        rows = x.reshape(-1, x.shape[-1])
        if self.router.relation is None:
            routed = self.router(rows, around)
        else:
            routed = self.router(x, around).flat()
        out = self.run(rows, routed)
        if self.shared is not None:
            out = out + self.shared(rows)
        real = None if real is None else real.reshape(-1)
        kept = self.balanced(routed, real)
        aux = {"expert_load": kept.load}
        if self.training and self.balance and not routed.frozen:
            aux["expert_balance_loss"] = self.balance * kept.loss
        if self.training and routed.choice_losses is not None:
            aux["expert_choice_loss"] = self.mean(routed.choice_losses, real)
        return out.view_as(x), aux

    def balanced(self, routed: Routed, real: Tensor | None) -> Balance:
        """The load-balance loss, not weighted yet, and the load; real (N,) bool."""
        return load_balance(routed.spread, routed.chosen, real, per_slot=self.per_slot)

    def mean(self, losses: Tensor, real: Tensor | None) -> Tensor:
        """Of tokens' losses (N,), without padding; real (N,) bool."""
        if real is not None:
            losses = losses[real]
        return losses.sum() / max(1, len(losses))

    def run(self, rows: Tensor, routed: Routed) -> Tensor:
        """The sum of the chosen experts' weighted outputs, (N, dim), for rows (N, dim)."""
        out = torch.zeros_like(rows)
        for expert in routed.chosen.any(0).nonzero()[:, 0].tolist():
            at = routed.chosen[:, expert].nonzero()[:, 0]
            mine = rows[at]
            inner = functional.silu(mine @ self.gate[expert].T) * (mine @ self.up[expert].T)
            weight = routed.weights[at, expert, None]
            out = out.index_add(0, at, ((inner @ self.down[expert].T) * weight).to(out.dtype))
        return out
