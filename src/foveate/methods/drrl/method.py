"""DR-RL: attention of low rank, the rank chosen for each layer and segment as the text runs.

    S_r = Q_r K_r^T / sqrt(d),   A_r = softmax(S_r + mask),   O_r = A_r V

Erden 2025, "Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self Attention in
Large Language Models", arXiv 2512.15973. Every `segment` tokens a policy network picks r for each
sequence and layer, from r_min ... r_max; a bound on what a change of rank does to attention vetoes
actions (`bounds`); the policy is trained by REINFORCE (`reward`). Rules that the paper leaves out
(the energy of the singular values, a fixed rank, random ones) choose in its place.

Truncating the whole sequence's Q and K, as the paper does, lets every token see the future through
the basis. form="causal" (ours) has one basis of keys for each head, made of the segments before
(G += K^T K, its first r eigenvectors), and decides on the segment before; the first segment runs at
full rank. form="whole" is the paper's. Ranks of d and more are plain attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from foveate.methods.drrl.bounds import GUARDS
from foveate.methods.drrl.lowrank import SVDS
from foveate.methods.drrl.reward import SIMS
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention, Heads
from foveate.parts.context import Context

if TYPE_CHECKING:
    from foveate.methods.drrl.layer import DRRLLayer

_CHOICES = {
    "control": ("policy", "energy", "fixed", "random"),
    "form": ("causal", "whole"),
    "basis": ("separate", "joint"),
    "svd": SVDS,
    "refresh": ("segment", "doubling"),
    "guard": GUARDS,
    "previous": ("segment", "layer"),
    "sim": SIMS,
}


@dataclass(frozen=True)
class DRRL(Attention):
    """Low-rank attention under a policy, or a rule; see the module's text.

    In training with control="policy" the layer's aux holds "drrl_loss" (lambda L_RL, a mean over
    decisions) beside statistics; what the reward needs is computed then only. The policy belongs to
    layer `owner` and serves all layers. Freeze the model for the paper's default schedule
    (`model.requires_grad_(False)`, then the policy's parameters on); bases are constants to
    gradients, so that training both is possible too.

    A trained model (`foveate.use`) runs the rules; without a state every call makes its bases anew
    from all keys. A layer of `foveate.Attention` keeps keys, and beside them keys on the current
    basis, r numbers, which are all that a decoding step reads of them.

    Attributes:
        control: "policy", "energy" (the smallest rank whose energy ratio is tau), "fixed", "random"
            (from torch's generator, so that no two runs are alike).
        rank: of "fixed"; or one for each layer.
        tau: of "energy", sum_(k <= r) sigma_k^2 over all, a mean over heads.
        r_min, r_max, step: the actions.
        segment: tokens between decisions.
        form: "causal", or "whole" (encoders; decoders then see the future through the basis).
        basis: "separate" truncations of Q and K (of K alone in the causal form), or the "joint" one
            that is best for the scores.
        svd: of the whole form: "gram", "full" or "partial".
        refresh: make the causal basis anew at every "segment", which projects all keys again, or
            where the past has doubled, "doubling".
        guard: "tail" (the paper's), "sound", or "none"; of the policy.
        eps: eps_0 of the guard, a relative change; eps_decay for each training step.
        explore: probability of a uniform draw in training; explore_decay likewise.
        previous: the rank before: that of the "segment" before in this layer, or of the "layer"
            below, as in the released code.
        initial: index of the action before the first decision.
        alpha, beta, gamma: of the reward.
        weight: lambda.
        sim: "cosine", or "log" of its distance from 1.
        energies: whether the policy sees the energy ratios too.
        owner: layer that holds the policy.
        shared: False gives every layer a policy of its own.

    Raises:
        InputError: a value out of its range.
    """

    control: str = "policy"
    rank: int | tuple[int, ...] = 32
    tau: float = 0.95
    r_min: int = 16
    r_max: int = 64
    step: int = 8
    segment: int = 128
    form: str = "causal"
    basis: str = "separate"
    svd: str = "gram"
    refresh: str = "segment"
    guard: str = "tail"
    eps: float = 0.1
    eps_decay: float = 0.995
    explore: float = 0.1
    explore_decay: float = 0.995
    previous: str = "segment"
    initial: int = 0
    alpha: float = 1.0
    beta: float = 0.05
    gamma: float = 0.1
    weight: float = 0.1
    sim: str = "cosine"
    energies: bool = False
    owner: int = 0
    shared: bool = True

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            given = getattr(self, name)
            if given not in known:
                raise InputError(f"DRRL({name}={given!r}) is unknown; {nearest(str(given), known)}")
        for name in ("r_min", "step", "segment"):
            whole("DRRL", name, getattr(self, name), least=1)
        whole("DRRL", "r_max", self.r_max, least=self.r_min)
        if isinstance(self.rank, list | tuple):
            object.__setattr__(self, "rank", tuple(self.rank))
        for rank in self.rank if isinstance(self.rank, tuple) else (self.rank,):
            whole("DRRL", "rank", rank, least=1)
        if not -len(self.ranks) <= self.initial < len(self.ranks):
            raise InputError(
                f"DRRL(initial={self.initial}): expected an index of the {len(self.ranks)} ranks "
                f"{self.ranks}."
            )
        for name in ("tau", "eps_decay", "explore_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"DRRL({name}={getattr(self, name)!r}): expected 0 to 1, not 0.")
        for name in ("eps", "explore", "alpha", "beta", "gamma", "weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"DRRL({name}={getattr(self, name)!r}): expected 0 or more.")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The actions R, rising."""
        if self.control == "fixed":
            given = self.rank if isinstance(self.rank, tuple) else (self.rank,)
            return tuple(sorted(set(given)))
        return tuple(range(self.r_min, self.r_max + 1, self.step))

    @property
    def learns(self) -> bool:
        """Whether it has a policy."""
        return self.control == "policy"

    def fixed(self, layer: int) -> int:
        """Index of the action of a layer, where control is "fixed"."""
        rank = self.rank
        if isinstance(rank, tuple):
            if layer >= len(rank):
                raise InputError(
                    f"drrl(rank={rank}): {len(rank)} ranks, but there is a layer {layer}; give one "
                    "for each."
                )
            rank = rank[layer]
        return self.ranks.index(rank)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`; the lse is that of the truncated scores.

        Raises:
            InputError: a policy, which a layer must hold; a mask that is neither causal nor
                everyone (padding aside); a bias.
        """
        from foveate.methods.drrl.run import attend

        if self.learns:
            raise InputError(
                'drrl(control="policy") has a network that is trained: build it by '
                'foveate.Attention(dim, num_heads, attention="drrl"), or run a rule, such as '
                'drrl(control="energy") or drrl(control="fixed", rank=32).'
            )
        return attend(self, q, k, v, Context() if ctx is None else ctx)

    @override
    def placed(self, heads: Heads) -> DRRLLayer:
        from foveate.methods.drrl.layer import DRRLLayer

        return DRRLLayer(self, heads)
