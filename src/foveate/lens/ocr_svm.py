"""Where gradient descent ends: the two support vector machines of out-of-context reasoning.

    minimise ||W||  so that  W[a, s] + W[a, r] - W[a', s] - W[a', r] >= 1

for every seen triple (s, r, a) and every other answer a'. The nuclear norm is the factorised
model's, the Frobenius norm the merged one's (Huang et al. 2025, arXiv 2506.10887, theorem 1). W has
the answers as rows, subjects and relations as columns; all else would be zero.

Solved by the alternating direction method of multipliers, and certified: a solution that is scaled
to meet its constraints is an upper bound, and multipliers l >= 0 a lower one, sum(l) / ||A^T l||_*
with the dual norm (spectral, or Frobenius again).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foveate.lens.ocr import FactRecall, Triples
from foveate.ops.errors import InputError, nearest

Norm = Literal["nuclear", "frobenius"]
NORMS: tuple[Norm, ...] = ("nuclear", "frobenius")


class Machine(NamedTuple):
    """A solution.

    matrix: (2 n, subjects + 2), rows b_1 ... c_n in the order of their tokens; value: its norm;
    bound: no feasible matrix has a smaller one; steps: that it took.
    """

    matrix: Tensor
    value: float
    bound: float
    steps: int

    @property
    def nuclear(self) -> float:
        """||W||_nuc."""
        return float(torch.linalg.matrix_norm(self.matrix, "nuc"))

    @property
    def frobenius(self) -> float:
        """||W||_F."""
        return float(torch.linalg.matrix_norm(self.matrix))

    def margin(self, task: FactRecall) -> float:
        """The least margin over held-out triples and all other answers."""
        return float((constraints(task, task.held_out) @ self.matrix.flatten()).min())


def constraints(task: FactRecall, triples: Triples) -> Tensor:
    """A (triples times (2 n - 1), 2 n (subjects + 2)): A vec(W) are the margins."""
    rows, columns = 2 * task.answers, task.subjects + 2
    first = int(task.facts[0])
    found = torch.zeros(len(triples.ids), rows - 1, rows, columns, dtype=torch.float64)
    for number, (ids, answer) in enumerate(zip(triples.ids.tolist(), triples.answer.tolist())):
        own = answer - first
        rest = [a for a in range(rows) if a != own]
        for column in ids[:2]:
            found[number, :, own, column] += 1
            found[number, range(rows - 1), rest, column] -= 1
    return found.flatten(2).flatten(0, 1)


def support_vectors(
    task: FactRecall,
    norm: Norm = "nuclear",
    *,
    tolerance: float = 1e-6,
    steps: int = 40_000,
    weight: float = 1.0,
) -> Machine:
    """Solve one of the two machines.

    Args:
        task: whose seen triples bind.
        norm: "nuclear" or "frobenius".
        tolerance: of value and bound, relative.
        steps: at most.
        weight: of the penalty on what differs between the method's copies.

    Raises:
        InputError: an unknown norm, or value and bound are still apart after all steps.
    """
    if norm not in NORMS:
        raise InputError(f"support_vectors(norm={norm!r}): {nearest(str(norm), NORMS)}")
    shape = (2 * task.answers, task.subjects + 2)
    a = constraints(task, task.seen)
    inner = torch.linalg.cholesky(torch.eye(a.shape[1], dtype=a.dtype) + a.mT @ a)
    z = torch.zeros(a.shape[1], dtype=a.dtype)
    y = torch.ones(len(a), dtype=a.dtype)
    off_z, off_y = torch.zeros_like(z), torch.zeros_like(y)
    value = bound = float("nan")
    for step in range(1, steps + 1):
        right = (z - off_z + a.mT @ (y - off_y))[:, None]
        w = torch.cholesky_solve(right, inner)[:, 0]
        aw = a @ w
        over_w, over_aw = 1.6 * w - 0.6 * z, 1.6 * aw - 0.6 * y
        z = _shrunk((over_w + off_z).view(shape), 1 / weight, norm).flatten()
        y = (over_aw + off_y).clamp(min=1.0)
        off_z = off_z + over_w - z
        off_y = off_y + over_aw - y
        if step % 50:
            continue
        least = float((a @ z).min())
        if least <= 0:
            continue
        matrix = (z / least).view(shape)
        multipliers = (-off_y).clamp(min=0)
        value = _norm(matrix, norm)
        bound = float(multipliers.sum()) / _dual(((a.mT @ multipliers).view(shape)), norm)
        if value - bound <= tolerance * value:
            return Machine(matrix, value, bound, step)
    raise InputError(
        f"support_vectors: after {steps} steps the norm lies between {bound:.6g} and {value:.6g}; "
        "give more steps, or another weight."
    )


def _shrunk(matrix: Tensor, by: float, norm: Norm) -> Tensor:
    """The proximal map of by ||.||."""
    if norm == "nuclear":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return (u * (s - by).clamp(min=0)) @ vh
    size = torch.linalg.matrix_norm(matrix)
    return matrix * (1 - by / size).clamp(min=0) if float(size) > 0 else matrix


def _norm(matrix: Tensor, norm: Norm) -> float:
    return float(torch.linalg.matrix_norm(matrix, "nuc" if norm == "nuclear" else "fro"))


def _dual(matrix: Tensor, norm: Norm) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2 if norm == "nuclear" else "fro"))


def in_answers(ov: Tensor, task: FactRecall) -> Tensor:
    """The part of a trained W_OV (d, d) that the machines speak of: (2 n, subjects + 2)."""
    first = int(task.facts[0])
    return ov[first : first + 2 * task.answers, : task.subjects + 2]
