"""What SEA's estimator learns from: a dense teacher's attention, layer by layer.

    L_est   = 0.1 KL(A* || softmax(stretch(S))) + MSE(the same, A*)
    L_dense = 0.1 KL(A* || softmax(q k^T / sqrt d)) + MSE(the same, A*)
    L_ctx   = MSE(C*, O)

A*, C* are the teacher's attention and context. KL is summed over keys; its mean is over rows and
heads (causal), or its sum over all rows and heads is divided by the number of tokens
(bidirectional). L_est and L_dense look at whole rows of L keys: for long sequences take some rows.
Lee et al. 2023, arXiv 2310.01777, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.methods.sea.compress import stretched
from foveate.methods.sea.trace import Trace
from foveate.ops.errors import InputError

KL = 0.1


@dataclass(frozen=True)
class Teacher:
    """A dense layer's attention: q (B, H, L, D), k (B, Hkv, L, D), out (B, H, L, Dv), its scale."""

    q: Tensor
    k: Tensor
    out: Tensor
    scale: float


def layer_losses(
    student: Trace, teacher: Teacher, *, rows: Tensor | None = None, dense: bool = True
) -> dict[str, Tensor]:
    """The three losses of one layer, by name: "est", "dense" (unless left out), "ctx".

    Args:
        student: of SEA's call.
        teacher: of the same sequences.
        rows: (n,) indices of the queries that "est" and "dense" look at; None is all of them, which
            costs L^2.
        dense: whether to take "dense", which costs as much again.

    Raises:
        InputError: teacher and student differ in shape.
    """
    if teacher.q.shape[:3] != student.q.shape[:3] or teacher.out.shape != student.out.shape:
        raise InputError(
            f"SEA's student has queries {tuple(student.q.shape)} and outputs "
            f"{tuple(student.out.shape)}, its teacher {tuple(teacher.q.shape)} and "
            f"{tuple(teacher.out.shape)}; expected the same number of heads and tokens."
        )
    length = student.q.shape[2]
    if rows is None:
        rows = torch.arange(length, device=student.q.device)
    hidden = _hidden(student, rows, length)
    with torch.no_grad():
        goal = torch.softmax(_scores(teacher.q, teacher.k, teacher.scale, rows, hidden), -1)
        goal = goal.masked_fill(hidden, 0.0)
    real = student.real[:, rows]
    found = {"est": _attention_loss(_estimate(student, rows, hidden), goal, real, student.causal)}
    if dense:
        own = _scores(student.q, student.k, student.scale, rows, hidden)
        found["dense"] = _attention_loss(own, goal, real, student.causal)
    error = (student.out.float() - teacher.out.detach().float()).square()
    tokens = student.real[:, None, :, None]
    count = student.real.sum() * student.out.shape[1] * student.out.shape[3]
    found["ctx"] = (error * tokens).sum() / count
    return found


def _hidden(student: Trace, rows: Tensor, length: int) -> Tensor:
    """(B, 1, n, L) bool: keys that a row doesn't see."""
    at = torch.arange(length, device=rows.device) - student.shift[:, None]
    seen = (at[:, None] >= 0) & (at[:, None] < student.seen[:, rows][..., None])
    return ~seen[:, None]


def _scores(q: Tensor, k: Tensor, scale: float, rows: Tensor, hidden: Tensor) -> Tensor:
    """(B, H, n, L) of some rows, in fp32 at least, hidden keys at a low number."""
    work = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    scores = q[:, :, rows].to(work) @ k.to(work).repeat_interleave(group, 1).mT * scale
    return scores.masked_fill(hidden, torch.finfo(work).min / 2)


def _estimate(student: Trace, rows: Tensor, hidden: Tensor) -> Tensor:
    """S stretched to the keys, likewise."""
    work = torch.promote_types(student.scores.dtype, torch.float32)
    scores, length = student.scores[:, :, rows].to(work), hidden.shape[-1]
    wide = stretched(scores, length, student.seen[:, rows], student.jitter)
    if bool(student.shift.any()):  # keys are counted from each sequence's first
        at = torch.arange(length, device=rows.device) - student.shift[:, None]
        wide = wide.gather(3, (at % length)[:, None, None].expand_as(wide))
    return wide.masked_fill(hidden, torch.finfo(work).min / 2)


def _attention_loss(scores: Tensor, goal: Tensor, real: Tensor, causal: bool) -> Tensor:
    """0.1 KL(goal || softmax(scores)) + MSE, over real rows (B, n)."""
    batch, heads, n, length = goal.shape
    weight = real[:, None, :, None].to(goal.dtype)
    log = F.log_softmax(scores, -1)
    kl = (torch.xlogy(goal, goal) - goal * log) * weight
    count = real.sum().clamp_min(1)
    divisor = count * heads if causal else count
    mse = ((log.exp() - goal).square() * weight).sum() / (count * heads * length)
    return KL * kl.sum() / divisor + mse
