"""One attention head that recalls: with its output and value maps apart, or merged into one.

    factorised   f(X) = W_O W_V^T X^T X W_KQ x_T          W_O, W_V (d, d_h)
    merged       f(X) = W_OV      X^T X W_KQ x_T          W_OV (d, d)

X holds one-hot rows, x_T its last one; f(X) are logits. No softmax ("linear"; with "softmax" the
weights of the tokens are softmax(X W_KQ x_T)), no positions, no residual. With W_KQ fixed, subject
and relation weigh the same: logit(a | s, r) = W_OV[a, s] + W_OV[a, r].

Both express the same functions, yet gradient descent tells them apart: it ends at the smallest
nuclear norm of W_OV where that is a product, and at the smallest Frobenius norm where it is one
matrix. So merging after training changes nothing, and before training it changes what is learnt.
Huang et al. 2025, arXiv 2506.10887.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.lens.ocr import FactRecall
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole

ATTENTIONS = ("linear", "softmax")
OPTIMIZERS = ("gd", "adam")


class OneHead(nn.Module):
    """The model.

    Args:
        task: whose tokens it knows.
        rank: d_h; None merges W_O W_V^T into one matrix.
        std: of the normal initialisation of the matrices; W_OV merged begins with the same size as
            a product with d_h = d would, std ** 2 sqrt(d). 0 begins at zero (merged only).
        attention: "linear" or "softmax".
        learn_kq: W_KQ is trained too; it begins symmetric in all tokens, where it stands fixed.
        seed: of the initialisation.

    Raises:
        InputError: an unknown attention, or a factorised model at zero, where no gradient is.
    """

    def __init__(
        self,
        task: FactRecall,
        rank: int | None = None,
        *,
        std: float = 0.05,
        attention: Literal["linear", "softmax"] = "linear",
        learn_kq: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise InputError(f"OneHead(attention={attention!r}): {nearest(attention, ATTENTIONS)}")
        if not std >= 0 or (rank is not None and std == 0):
            raise InputError(
                f"OneHead(std={std!r}): expected more than 0 (or 0 for a merged model): at zero a "
                "product has no gradient."
            )
        d = task.vocab
        random = torch.Generator().manual_seed(seed)

        def drawn(rows: int, columns: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=random, dtype=dtype) * std)

        self.attention = attention
        self.output: nn.Parameter | None = None
        self.value: nn.Parameter | None = None
        self.merged: nn.Parameter | None = None
        if rank is None:
            self.merged = drawn(d, d, std**2 * d**0.5)
        else:
            whole("OneHead", "rank", rank, least=1)
            self.output, self.value = drawn(d, rank, std), drawn(d, rank, std)
        # Linear: every token weighs 1, an end token 0. Softmax: all but the end token weigh alike.
        start = torch.full((d, d), 1.0 if attention == "linear" else 0.0, dtype=dtype)
        if task.end:
            start[task.subjects + 2] = 0.0 if attention == "linear" else -30.0
        self.kq = nn.Parameter(start, requires_grad=learn_kq)

    @property
    def vocab(self) -> int:
        """d, the number of tokens."""
        return len(self.kq)

    def ov(self) -> Tensor:
        """W_OV, (d, d): answers in rows, tokens in columns."""
        if self.merged is not None:
            return self.merged
        assert self.output is not None
        assert self.value is not None
        return self.output @ self.value.mT

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (N, d) of ids (N, T)."""
        weights = self.kq[ids, ids[:, -1:]]  # x_t^T W_KQ x_T
        if self.attention == "softmax":
            weights = weights.softmax(1)
        if self.merged is not None:
            return (weights[..., None] * self.merged.mT[ids]).sum(1)
        assert self.output is not None
        assert self.value is not None
        return (weights[..., None] * self.value[ids]).sum(1) @ self.output.mT

    @torch.no_grad()
    def merge(self) -> OneHead:
        """The same function with W_O W_V^T as one matrix: exact, and safe once it is trained."""
        made = _copy(self)
        made.merged = nn.Parameter(self.ov().detach().clone())
        made.output = made.value = None
        return made

    @torch.no_grad()
    def factorise(self, rank: int) -> OneHead:
        """The same function as a balanced product with d_h = rank; exact from W's rank on."""
        made = _copy(self)
        output, value = balanced(self.ov(), rank)
        made.merged, made.output, made.value = None, nn.Parameter(output), nn.Parameter(value)
        return made


def _copy(model: OneHead) -> OneHead:
    made = OneHead.__new__(OneHead)
    nn.Module.__init__(made)
    made.attention = model.attention
    made.kq = nn.Parameter(model.kq.detach().clone(), model.kq.requires_grad)
    return made


def balanced(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W_O = U sqrt(S), W_V = V sqrt(S), (d, rank) each: of all products that give W the smallest.

    (||W_O||_F^2 + ||W_V||_F^2) / 2 is then ||W||_nuc.
    """
    u, s, vh = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, vh[:rank].mT * root


def fit_recall(
    model: OneHead,
    task: FactRecall,
    *,
    steps: int = 8000,
    lr: float = 0.5,
    optimizer: Literal["gd", "adam"] = "gd",
    weight_decay: float = 0.0,
    shrink: float = 0.0,
    tell: Callable[[float, str], None] | None = None,
) -> list[float]:
    """Train on all seen triples at once, mean cross entropy over the vocabulary.

    Args:
        model: trained in place.
        task: whose triples are seen.
        steps: of full-batch descent.
        lr: 0.5 is stable for the factorised form, 1.0 for the merged one.
        optimizer: "gd" (what the theorems are about) or "adam", whose bias is another.
        weight_decay: L2, lr * weight_decay of the weights is taken off in each step.
        shrink: tau, taken off every singular value of a merged W_OV after each step: a penalty on
            its nuclear norm.
        tell: takes the share that is done and the loss in words.

    Returns:
        The loss before every hundredth step.

    Raises:
        InputError: an unknown optimizer, or shrink for a product.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"fit_recall(optimizer={optimizer!r}): {nearest(optimizer, OPTIMIZERS)}")
    if shrink and model.merged is None:
        raise InputError(
            "fit_recall(shrink=...): only a merged matrix has singular values of its own; a "
            "product's nuclear norm is what gradient descent lowers."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = torch.optim.SGD if optimizer == "gd" else torch.optim.Adam
    descent = kind(trained, lr=lr, weight_decay=weight_decay)
    losses = []
    for step in range(steps):
        loss = torch.nn.functional.cross_entropy(model(task.seen.ids), task.seen.answer)
        descent.zero_grad()
        loss.backward()
        descent.step()
        if shrink and model.merged is not None:
            with torch.no_grad():
                u, s, vh = torch.linalg.svd(model.merged, full_matrices=False)
                model.merged.copy_((u * (s - shrink).clamp(min=0)) @ vh)
        if step % 100 == 0:
            losses.append(float(loss.detach()))
            if tell is not None:
                tell(step / steps, f"step {step}, loss {losses[-1]:.2g}")
    return losses
