"""Is a contestant right? Sampled query rows against float64, before any speed is taken.

No L x L matrix is held: the rows' own keys are all that is looked at. The backward is judged with
a gradient that is zero but at these rows, which makes the reference as cheap, and still every
gradient of keys and values is compared, and those of all other queries must be zero.

An error may be at most twice that of torch's own attention on the same rows in the same dtype,
plus a rounding band. A row that attends to nothing must give 0, and -inf as its lse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.bench.case import Case
from foveate.ops.reference import reference_attention

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

_ROWS = 48
_SCORES = 1 << 24  # float64 scores that a check holds at most
_LSE = {torch.float32: 1e-5}  # else 1e-3: the exp may be as coarse as the weights


@dataclass
class Verdict:
    """Largest error and what it may be, for each output that was checked."""

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was checked and every error is within its limit; NaN is not."""
        return bool(self.errors) and all(error <= limit for error, limit in self.errors.values())

    def as_dict(self) -> dict[str, Any]:
        """As JSON: errors that aren't numbers are null."""
        return {
            name: {"error": error if math.isfinite(error) else None, "limit": limit}
            for name, (error, limit) in self.errors.items()
        }

    def __str__(self) -> str:
        wrong = [
            f"{name} is off by {error:.2g} where {limit:.2g} is allowed"
            for name, (error, limit) in self.errors.items()
            if not error <= limit
        ]
        return "; ".join(wrong) or "right"


class Judge:
    """Knows the right answer at sampled rows of one problem.

    Args:
        query: (B, Hq, L, D), the very tensors that are timed; likewise key and value.
        key: (B, Hkv, Lkv, D).
        value: (B, Hkv, Lkv, Dv).
        allowed: for rows (n,), bool (1, heads or 1, n, Lkv); None is everything.
        tile: rows at the edges of tiles are among the sampled ones.
        seed: of the other rows, and of the gradient.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Callable[[Tensor], Tensor] | None,
        tile: int = 64,
        seed: int = 0,
    ) -> None:
        self.tensors = (query, key, value)
        heads, length, kv_len = query.shape[1], query.shape[2], key.shape[2]
        random = torch.Generator().manual_seed(seed)
        most = max(4, min(_ROWS, _SCORES // (query.shape[0] * heads * kv_len)))
        self.rows = _sample(length, tile, most, random)
        self.allowed = None
        if allowed is not None:
            seen = allowed(self.rows).to(query.device)
            if seen.shape[1] > 1:
                seen = seen.repeat_interleave(heads // seen.shape[1], 1)
            self.allowed = seen
        shape = (*query.shape[:2], len(self.rows), value.shape[-1])
        self.grad_rows = torch.randn(shape, generator=random).to(query)
        self._gradients: tuple[list[Tensor], list[float]] | None = None
        with torch.no_grad():
            right = self._exact(*self._doubled())
            self.out, self.lse = right
            self.some = self.lse > -torch.inf
            theirs = self._torch(query[:, :, self.rows], key, value)
        self.torch_error = _error(theirs[self.some], self.out[self.some])

    @classmethod
    def of(
        cls, case: Case, query: Tensor, key: Tensor, value: Tensor, tile: int, seed: int = 0
    ) -> Judge:
        """The judge of a case."""
        return cls(query, key, value, None if case.dense else case.allowed, tile, seed)

    def forward(self, call: Call) -> Verdict:
        """The verdict on output and lse (where the contestant gives one)."""
        with torch.no_grad():
            out, lse = call(*self.tensors)
        found = Verdict()
        limit = self._limit(self.torch_error, self.out)
        found.errors["out"] = (_error(out[:, :, self.rows], self.out), limit)
        if lse is not None:
            some, own = self.some, lse[:, :, self.rows]
            band = _LSE.get(out.dtype, 1e-3)
            empty = bool((own[~some] == -torch.inf).all())
            error = _error(own[some], self.lse[some]) if empty else math.inf
            found.errors["lse"] = (error, band)
        return found

    def backward(self, call: Call) -> Verdict:
        """The verdict on the gradients of query, key and value."""
        leaves = [x.detach().clone().requires_grad_() for x in self.tensors]
        out, _ = call(*leaves)
        grad = torch.zeros_like(out)
        grad[:, :, self.rows] = self.grad_rows
        dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        others = torch.ones(dq.shape[2], dtype=torch.bool, device=dq.device)
        others[self.rows] = False
        exact, theirs = self._exact_gradients()
        found = Verdict()
        for name, mine, right, error in zip(
            ("dq", "dk", "dv"), (dq[:, :, self.rows], dk, dv), exact, theirs
        ):
            found.errors[name] = (_error(mine, right), self._limit(error, right))
        rest = _error(dq[:, :, others].double(), torch.zeros_like(dq[:, :, others]).double())
        found.errors["dq of other rows"] = (rest, 0.0)
        return found

    def _doubled(self) -> list[Tensor]:
        query, key, value = self.tensors
        return [x.detach().double() for x in (query[:, :, self.rows], key, value)]

    def _exact(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's output and lse."""
        scale, rows = query.shape[-1] ** -0.5, query.shape[2]
        folded, allowed = self._folded(query, self.allowed)
        out, lse = reference_attention(folded, key, value, allowed, scale=scale)
        return (
            out.unflatten(2, (-1, rows)).flatten(1, 2),
            lse.unflatten(2, (-1, rows)).flatten(1, 2),
        )

    def _torch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What torch's own attention gives."""
        folded, allowed = self._folded(query, self._visible())
        out = scaled_dot_product_attention(folded, key, value, allowed)
        return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2)

    def _folded(self, query: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The heads of one key/value head as rows, so that keys needn't be repeated."""
        heads, kv_heads = query.shape[1], self.tensors[1].shape[1]
        folded = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        if allowed is not None:
            allowed = allowed.expand(-1, heads, -1, -1)
            allowed = allowed.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        return folded, allowed

    def _visible(self) -> Tensor | None:
        """`allowed`, but rows that see nothing see everything: torch gives NaN for them."""
        if self.allowed is None:
            return None
        return self.allowed | ~self.allowed.any(-1, keepdim=True)

    def _exact_gradients(self) -> tuple[list[Tensor], list[float]]:
        """(gradients in float64, errors of torch's own), for the gradient at the sampled rows."""
        if self._gradients is None:
            leaves = [x.requires_grad_() for x in self._doubled()]
            out, _ = self._exact(*leaves)
            right = list(torch.autograd.grad(out, leaves, self.grad_rows.double()))
            query, key, value = self.tensors
            own = [x.detach().clone() for x in (query[:, :, self.rows], key, value)]
            own = [x.requires_grad_() for x in own]
            grad = self.grad_rows.masked_fill(~self.some[..., None], 0.0)
            theirs = torch.autograd.grad(self._torch(*own), own, grad)
            self._gradients = right, [_error(a, b) for a, b in zip(theirs, right)]
        return self._gradients

    def _limit(self, torch_error: float, right: Tensor) -> float:
        dtype = self.tensors[0].dtype
        unit = max(torch.finfo(dtype).eps / 2, 4 * torch.finfo(torch.float32).eps)
        return 2 * torch_error + unit * _largest(right)


def _sample(length: int, tile: int, most: int, random: torch.Generator) -> Tensor:
    """Rows at both ends, around edges of tiles, and anywhere: sorted, each once."""
    middle = length // tile // 2 * tile
    edges = [0, length - 1, tile - 1, tile, middle - 1, middle, length - tile]
    fixed = [row for row in edges if 0 <= row < length][:most]
    drawn = torch.randperm(length, generator=random)[: max(0, most - len(fixed))]
    return torch.cat((torch.tensor(fixed), drawn)).unique()


def _error(found: Tensor, right: Tensor) -> float:
    """Largest absolute difference; NaN if any is."""
    if not right.numel():
        return 0.0
    return float((found.double() - right.double()).abs().max())


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
