"""Choosing a rank: what is known of the spectra, the guard, and who decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.drrl.bounds import sound_cost, tail, tail_cost, weight_bound
from foveate.methods.drrl.lowrank import energy
from foveate.methods.drrl.method import DRRL
from foveate.methods.drrl.policy import Choice, Policy, choose, weight_features
from foveate.ops.errors import InputError


class Spectra(NamedTuple):
    """Singular values that a decision looks at.

    cut: (B, H, d) of each truncated matrix (of S itself, times sqrt(d), for a joint basis).
    q, k: (B, H, d), for the sound bound; rows: queries they come from; cut_q: whether queries are
    truncated too; joint: whether `cut` is of S.
    """

    cut: list[Tensor]
    q: Tensor | None
    k: Tensor
    rows: int
    cut_q: bool
    joint: bool


@dataclass
class Decider:
    """Decides for one layer in one call, and remembers what training needs.

    Attributes:
        method: the hyper-parameters.
        layer: its index.
        width: d.
        policy: the network, if it decides.
        weights: W_Q, W_K and W_V of the layer, where they are known.
        training: sample, and keep log-probabilities.
        generator: of draws.
        below: by (layer, rows' key, segment) the actions of this forward's layers.
        log_probs, rewards: of the decisions, (B,) each.
        taken: ranks of the decisions, (B,) each.
        ran: ranks (B,) that segments ran at, and the pairs of queries and keys of each.
    """

    method: DRRL
    layer: int
    width: int
    policy: Policy | None = None
    weights: tuple[Tensor, ...] = ()
    training: bool = False
    generator: torch.Generator | None = None
    below: dict[tuple[int, object, int], Tensor] = field(default_factory=dict)
    log_probs: list[Tensor] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    taken: list[Tensor] = field(default_factory=list)
    ran: list[tuple[Tensor, int]] = field(default_factory=list)

    @cached_property
    def features(self) -> Tensor:
        """(9,) of the layer's weights; read once, and only if something is to be decided."""
        return weight_features(self.weights)

    @property
    def judges(self) -> bool:
        """Whether decisions get a reward."""
        return self.training and self.method.learns

    @property
    def ranks(self) -> Tensor:
        """(R,) on the CPU."""
        return torch.tensor(self.method.ranks)

    def first(self, batch: int, device: torch.device) -> Tensor:
        """Actions before any decision, (B,)."""
        count = len(self.method.ranks)
        return torch.full((batch,), self.method.initial % count, device=device)

    def of_below(self, key: object, number: int, rows: Tensor) -> Tensor:
        """Actions (B,) of the nearest layer below for these rows and this segment, or the first."""
        layers = (n for n in range(self.layer - 1, -1, -1) if (n, key, number) in self.below)
        found = next((self.below[n, key, number] for n in layers), None)
        return self.first(len(rows), rows.device) if found is None else found

    def safe(self, spectra: Spectra, current: Tensor) -> Tensor | None:
        """Which actions the guard lets through, (B, R); None is all.

        Args:
            spectra: of the matrices whose rank changes.
            current: (B,) action indices.
        """
        method = self.method
        if method.guard == "none" or not method.learns:
            return None
        ranks = self.ranks.to(current.device)
        at = ranks[current]
        if method.guard == "tail":
            cost = tail_cost(spectra.cut, at, ranks)
        elif spectra.joint:
            s = spectra.cut[0]
            cost = _joint_cost(s, at, ranks, spectra.rows, self.width)
        else:
            assert spectra.q is not None
            cost = sound_cost(
                spectra.q, spectra.k, at, ranks, spectra.rows, self.width, cut_q=spectra.cut_q
            )
        steps = 0 if self.policy is None else int(self.policy.steps)
        safe = cost <= method.eps * method.eps_decay**steps
        return safe.scatter(1, current[:, None], True)

    def decide(self, spectra: Spectra, x: Tensor | None, previous: Tensor) -> Tensor:
        """Action indices (B,).

        Args:
            spectra: as they say.
            x: (B, T, D), hidden states of the segment that is looked at.
            previous: (B,) action indices.
        """
        method, batch, device = self.method, len(previous), previous.device
        ranks = self.ranks.to(device)
        if method.control == "fixed":
            action = torch.full((batch,), method.fixed(self.layer), device=device)
        elif method.control == "random":
            action = torch.randint(len(ranks), (batch,), generator=self.generator, device=device)
        elif method.control == "energy":
            ratio = energy(torch.cat(spectra.cut, 1), ranks).mean(1)
            enough = ratio >= method.tau
            last = torch.full((batch,), len(ranks) - 1, device=device)
            action = torch.where(enough.any(1), enough.int().argmax(1), last)
        else:
            action = self._by_policy(spectra, x, previous)
        self.taken.append(ranks[action])
        return action

    def _by_policy(self, spectra: Spectra, x: Tensor | None, previous: Tensor) -> Tensor:
        if self.policy is None or x is None:
            raise InputError(
                f"drrl: layer {self.layer} has no policy to ask; layer {self.method.owner} holds "
                "it and must run before, in the same forward (or give shared=False), and the "
                "policy reads the layer's input, which only foveate.Attention passes."
            )
        method = self.method
        ratio = None
        if method.energies:
            ratio = energy(torch.cat(spectra.cut, 1), self.ranks.to(x.device)).mean(1)
        logits = self.policy(x.detach(), self.features.to(x.device), previous, ratio)
        steps = int(self.policy.steps)
        found: Choice = choose(
            logits,
            self.safe(spectra, previous),
            sample=self.training,
            explore=method.explore * method.explore_decay**steps,
            generator=self.generator,
        )
        if self.training:
            self.log_probs.append(found.log_prob)
        return found.action


def _joint_cost(s: Tensor, at: Tensor, ranks: Tensor, rows: int, width: int) -> Tensor:
    """||dS||_F is known exactly on the tokens that the basis is of; then as `sound_cost`."""
    change = tail(s[:, :, None], at[:, None, None], ranks[None, None]) * width**-0.5
    return (weight_bound(change) / max(1, rows) ** 0.5).amax(1)
