"""Centroids, learnt by online k-means while the model trains.

Routing Transformer, arXiv 2003.05997, section 4.1 and algorithm 1; the released code's form, for
tokens x of a batch (queries, and keys where they are others), a their nearest centroid:

    N_c <- lambda N_c + (1 - lambda) |{x : a(x) = c}|
    S_c <- lambda S_c + (1 - lambda) sum_{a(x) = c} x
    mu_c <- S_c / Nbar_c,   Nbar_c = (N_c + 1e-5) / (sum N + C 1e-5) sum N

No gradient and no optimiser (and so no weight decay) touches mu, N, S: they are buffers, kept in
fp32 and saved with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.ops.errors import InputError

UPDATES = ("ema", "sum", "spherical", "gradient", "none")
INITS = ("normal", "data", "hash")
_SMALL = 1e-5
_ROUNDS = 10  # of k-means, to begin with


def layer_norm(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-6) over the last axis, of norm sqrt(D); fp32 inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return nn.functional.layer_norm(wide, wide.shape[-1:], eps=1e-6).to(x.dtype)


class Centroids(nn.Module):
    """C centroids for each key/value head, and their update.

    Args:
        heads: H, key/value heads that route.
        clusters: C.
        dim: D, width of queries and keys.
        update: "ema" is the form above; "sum" the paper's printed one, mu <- lambda mu +
            (1 - lambda) / 2 (sum of queries + sum of keys); "spherical" an average of directions,
            empty clusters staying (lucidrains); "gradient" learns mu by its distance to the tokens,
            as a parameter; "none" leaves it as it began.
        init: "normal" draws and normalises; "data" runs 10 rounds of k-means on the first batch
            that is trained on; "hash" takes sums of log2 C orthogonal directions with all signs, so
            that a token's nearest centroid is its sign hash.
        decay: lambda.
        micro_batches: training calls that make up one step; mu moves with the last of them.

    Raises:
        InputError: "hash" and C isn't a power of two, or has more bits than D dimensions.
    """

    mu: Tensor
    number: Tensor
    total: Tensor
    waiting_number: Tensor
    waiting_total: Tensor
    calls: Tensor
    begun: Tensor

    def __init__(
        self,
        heads: int,
        clusters: int,
        dim: int,
        *,
        update: str = "ema",
        init: str = "normal",
        decay: float = 0.999,
        micro_batches: int = 1,
    ) -> None:
        super().__init__()
        bits = clusters.bit_length() - 1
        if init == "hash" and (clusters != 1 << bits or bits > dim):
            raise InputError(
                f"routing-transformer(clusters={clusters}, init='hash'): expected a power of two, "
                f"of at most {dim} bits."
            )
        self.update, self.init, self.decay = update, init, decay
        self.micro_batches = micro_batches
        self.group: torch.distributed.ProcessGroup | None = None
        self._before: Tensor | None = None
        mu = torch.empty(heads, clusters, dim, dtype=torch.float32)
        if update == "gradient":
            self.mu = nn.Parameter(mu)
        else:
            self.register_buffer("mu", mu)
        zero = torch.zeros(heads, clusters, dtype=torch.float32)
        for name, value in (
            ("number", zero),
            ("total", torch.zeros_like(mu)),
            ("waiting_number", zero.clone()),
            ("waiting_total", torch.zeros_like(mu)),
            ("calls", torch.zeros((), dtype=torch.int64)),
            ("begun", torch.zeros((), dtype=torch.bool)),
        ):
            self.register_buffer(name, value)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin afresh."""
        heads, clusters, dim = self.mu.shape
        if self.init == "hash":
            bits = clusters.bit_length() - 1
            drawn = torch.randn(heads, dim, max(1, bits), device=self.mu.device)
            directions = torch.linalg.qr(drawn.double()).Q.float()[..., :bits]
            code = torch.arange(clusters, device=self.mu.device)[:, None]
            signs = (code >> torch.arange(bits, device=self.mu.device)) % 2 * 2.0 - 1.0
            self.mu.copy_(signs @ directions.mT)
        else:
            self.mu.copy_(layer_norm(torch.randn_like(self.mu)))
        if self.update == "spherical":
            self.mu.copy_(nn.functional.normalize(self.mu, dim=-1))
        self.total.copy_(self.mu)
        for x in (self.number, self.waiting_number, self.waiting_total, self.calls, self.begun):
            x.zero_()
        self._before = None

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never to less than fp32: an average of many steps needs its digits."""
        kept = {k: x for k, x in self._buffers.items() if x is not None and x.is_floating_point()}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            now = self._buffers[name]
            assert now is not None
            if now.dtype != x.dtype and not x.is_meta:
                wide = torch.promote_types(now.dtype, torch.float32)
                self._buffers[name] = x.to(now.device, wide)
        return self

    def sum_over(self, group: torch.distributed.ProcessGroup | None) -> None:
        """Count the tokens of all ranks of a process group, so that their centroids stay alike."""
        self.group = group

    # -- one call ---------------------------------------------------------------------------------
    def scores(self, x: Tensor) -> Tensor:
        """How near tokens are to each centroid: (B, H * G, C, L), in fp32 or wider, no gradient.

        Their norms being equal, the largest product is the nearest centroid if those are of one
        length. A block that is run again in the backward is given the centroids of its first run.

        Args:
            x: (B, H * G, L, D), normalised.
        """
        mu = self._current()
        wide = torch.promote_types(x.dtype, torch.float32)
        mu = mu.to(wide).repeat_interleave(x.shape[1] // len(mu), 0)
        return mu @ x.detach().to(wide).mT

    def _current(self) -> Tensor:
        """Those to route with; in a block that is run again, those of its first run.

        Only in training did they move since.
        """
        before = self._before if self.training and _again() else None
        return self.mu.detach() if before is None else before

    @torch.no_grad()
    def begin(self, tokens: list[tuple[Tensor, Tensor | None]]) -> None:
        """Choose the first centroids from data where `init` says so; once, before routing.

        Args:
            tokens: as in `learn`.
        """
        if self.init != "data" or _again() or bool(self.begun):
            return
        x, weight = self._by_head(tokens)
        dim = self.mu.shape[2]
        real = weight.nonzero()[:, 0]
        if not len(real):
            return
        some = torch.randint(len(real), self.mu.shape[:2], device=x.device)
        mu = x.gather(1, real[some][..., None].expand(-1, -1, dim))
        if self.group is not None:
            torch.distributed.broadcast(mu, group=self.group, group_src=0)
        for _ in range(_ROUNDS):
            if self.update == "spherical":
                mu = nn.functional.normalize(mu, dim=-1)
            number, total = self._sums(x, weight, (x @ mu.mT).argmax(-1))
            mu = torch.where(number[..., None] > 0, total / number.clamp_min(1)[..., None], mu)
        if self.update == "spherical":
            mu = nn.functional.normalize(mu, dim=-1)
        self.mu.copy_(mu)
        self.number.copy_(number)
        self.total.copy_(torch.where(number[..., None] > 0, total, mu * _SMALL))
        self.begun.fill_(True)

    @torch.no_grad()
    def learn(
        self, tokens: list[tuple[Tensor, Tensor | None]], near: list[Tensor] | None = None
    ) -> None:
        """Move the centroids towards their tokens; after routing, in training alone.

        What is run a second time in the backward (recomputed activations) changes nothing.

        Args:
            tokens: for queries, and for keys where they are others: x (B, H * G, L, D) normalised,
                and which are real, bool (B or 1, L); None is all.
            near: for each of these the nearest centroid of each token, (B, H * G, L), if known.
        """
        if _again() or self.update in ("gradient", "none"):
            return
        self._before = self.mu.clone()
        near = [self.nearest(self.scores(x)) for x, _ in tokens] if near is None else near
        number, total = self._sums(*self._by_head(tokens), self._near_by_head(near))
        if self.update == "sum" and len(tokens) == 1:  # keys are the queries
            total = total * 2
        self.waiting_number += number
        self.waiting_total += total
        self.calls += 1
        if int(self.calls) % self.micro_batches:
            return
        number, total = self.waiting_number, self.waiting_total
        rest = 1 - self.decay
        if self.update == "ema":
            self.number.mul_(self.decay).add_(number, alpha=rest)
            self.total.mul_(self.decay).add_(total, alpha=rest)
            all_ = self.number.sum(-1, keepdim=True)
            clusters = self.number.shape[-1]
            smooth = (self.number + _SMALL) / (all_ + clusters * _SMALL) * all_
            # Without a single token so far there is nothing to divide by.
            some = all_ > 0
            self.mu.copy_(
                torch.where(
                    some[..., None], self.total / smooth.clamp_min(1e-30)[..., None], self.mu
                )
            )
        elif self.update == "sum":
            self.mu.mul_(self.decay).add_(total, alpha=rest / 2)
        else:
            mean = nn.functional.normalize(total, dim=-1)
            mean = torch.where(number[..., None] > 0, mean, self.mu)
            self.mu.copy_(nn.functional.normalize(torch.lerp(self.mu, mean, rest), dim=-1))
        self.waiting_number.zero_()
        self.waiting_total.zero_()

    @staticmethod
    def nearest(scores: Tensor) -> Tensor:
        """The nearest centroid of each token: (B, H, C, L) to (B, H, L)."""
        return scores.argmax(2)

    def losses(
        self, x: Tensor, real: Tensor | None, beta: float, near: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Pulls tokens to their centroids: beta mean |x - sg(mu_a)|^2 over tokens and dimensions.

        Where mu is learnt by gradient, also mean |sg(x) - mu_a|^2.

        Args:
            x: (B, H * G, L, D) normalised, with its gradient.
            real: bool (B or 1, L); None is all.
            beta: weight of the first.
            near: (B, H * G, L) nearest centroids, if known.
        """
        near = self.nearest(self.scores(x)) if near is None else near
        mu = self._current()
        group = x.shape[1] // len(self.mu)
        wide = torch.promote_types(x.dtype, torch.float32)

        def at(mu: Tensor) -> Tensor:
            head = torch.arange(x.shape[1], device=x.device) // group
            return mu.to(wide)[head[None, :, None], near]

        found = {"commitment_loss": beta * _mean((x.to(wide) - at(mu)).square(), real)}
        if self.update == "gradient":
            found["centroid_loss"] = _mean((x.detach().to(wide) - at(self.mu)).square(), real)
        return found

    # -- the sums ---------------------------------------------------------------------------------
    def _by_head(self, tokens: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """All tokens of each head: x (H, n, D) as the centroids, weight (n,), 0 on padding."""
        heads = len(self.mu)
        every, weights = [], []
        for x, real in tokens:
            batch, all_heads, length, dim = x.shape
            group = all_heads // heads
            x = x.detach().to(self.mu.dtype).view(batch, heads, group, length, dim)
            every.append(x.transpose(0, 1).reshape(heads, -1, dim))
            weight = x.new_ones(batch, length) if real is None else real.to(x).expand(batch, -1)
            weights.append(weight[:, None].expand(-1, group, -1).reshape(-1))
        return torch.cat(every, 1), torch.cat(weights)

    def _near_by_head(self, near: list[Tensor]) -> Tensor:
        """Nearest centroids in the order of `_by_head`, (H, n)."""
        heads = len(self.mu)
        return torch.cat([x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1) for x in near], 1)

    def _sums(self, x: Tensor, weight: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (H, C) and their sum (H, C, D) of each cluster, over all ranks; near (H, n)."""
        heads, clusters, dim = self.mu.shape
        near = (near + torch.arange(heads, device=x.device)[:, None] * clusters).reshape(-1)
        weights = weight.expand(heads, -1).reshape(-1)
        number = x.new_zeros(heads * clusters).index_add_(0, near, weights)
        weighted = (x * weight[:, None]).reshape(-1, dim)
        total = x.new_zeros(heads * clusters, dim).index_add_(0, near, weighted)
        both = torch.cat((number[:, None], total), 1)
        if self.group is not None:
            torch.distributed.all_reduce(both, group=self.group)
        return both[:, 0].view(heads, clusters), both[:, 1:].view(heads, clusters, dim)

    @override
    def extra_repr(self) -> str:
        heads, clusters, dim = self.mu.shape
        return f"{clusters} for each of {heads} heads, width {dim}, update={self.update!r}"


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """Mean over heads, real tokens and dimensions; x (B, H, L, D)."""
    if real is None:
        return x.mean()
    weight = real.to(x.dtype).expand(len(x), -1)[:, None, :, None]
    return (x * weight).sum() / (weight.sum() * x.shape[1] * x.shape[3]).clamp_min(1)


def _again() -> bool:
    """Whether this runs inside a backward: a block whose activations are being recomputed."""
    return torch._C._current_graph_task_id() != -1
