"""Ridge regression in closed form, primal or dual, and for many ridges from one decomposition.

    primal    v = (Phi^T Phi + lambda n I)^-1 Phi^T y            K x K
    dual      v = Phi^T (Phi Phi^T + lambda n I)^-1 y            n x n, where n < K

Both are the same v; in float64 whatever the features are in, since a ridge of 1e-7 n is at the edge
of what float32 resolves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.projection import positive


def ridge(
    phi: Tensor, y: Tensor, penalty: float, form: Literal["auto", "primal", "dual"] = "auto"
) -> Tensor:
    """The least of ||phi v - y||^2 + penalty n ||v||^2.

    Args:
        phi: (n, K) features.
        y: (n, outputs).
        penalty: lambda, above 0.
        form: "auto" takes the smaller system.

    Returns:
        v (K, outputs), in float64.

    Raises:
        InputError: shapes don't fit, the penalty isn't above 0, or an unknown form.
    """
    _check(phi, y)
    positive("ridge", penalty=penalty)
    n, k = phi.shape
    phi, y = phi.double(), y.double()
    if form not in ("auto", "primal", "dual"):
        raise InputError(f"ridge(form={form!r}): expected 'auto', 'primal' or 'dual'.")
    if form == "auto":
        form = "dual" if n < k else "primal"
    if form == "dual":
        return phi.T @ torch.cholesky_solve(y, _factor(phi @ phi.T, penalty * n))
    return torch.cholesky_solve(phi.T @ y, _factor(phi.T @ phi, penalty * n))


class RidgePath:
    """Predictions for any ridge, from one decomposition of the Gram matrix.

    Args:
        gram: (n, n), Phi Phi^T, or a kernel of the examples.
        y: (n, outputs).

    Raises:
        InputError: shapes don't fit.
    """

    def __init__(self, gram: Tensor, y: Tensor) -> None:
        _check(gram, y)
        if gram.shape[0] != gram.shape[1]:
            raise InputError(f"RidgePath: expected a square Gram matrix, got {tuple(gram.shape)}.")
        self.values, self.vectors = torch.linalg.eigh(gram.double())
        self.turned = self.vectors.T @ y.double()

    def weights(self, penalty: float) -> Tensor:
        """(Gram + penalty n I)^-1 y: (n, outputs)."""
        positive("RidgePath", penalty=penalty)
        n = len(self.values)
        return self.vectors @ (self.turned / (self.values.clamp_min(0)[:, None] + penalty * n))

    def predict(self, cross: Tensor, penalty: float) -> Tensor:
        """Of other examples: cross (n', n), their features' products -> (n', outputs)."""
        return cross.double() @ self.weights(penalty)

    def best(self, cross: Tensor, y: Tensor, penalties: Sequence[float]) -> list[float]:
        """By output the ridge with the least squared error on other examples.

        Args:
            cross: (n', n), of a validation split.
            y: (n', outputs), theirs.
            penalties: to choose from.
        """
        errors = torch.stack([(self.predict(cross, p) - y).square().mean(0) for p in penalties])
        return [penalties[i] for i in errors.argmin(0).tolist()]


def _factor(gram: Tensor, ridge: float) -> Tensor:
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(gram + ridge * eye)


def _check(rows: Tensor, y: Tensor) -> None:
    if rows.dim() != 2 or y.dim() != 2 or len(rows) != len(y) or not len(y):
        raise InputError(
            f"ridge: expected (n, K) and (n, outputs), got {tuple(rows.shape)} and "
            f"{tuple(y.shape)}."
        )
