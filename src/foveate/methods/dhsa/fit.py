"""Training DHSA's boundary predictor on a frozen model: key states in, jumps of attention out.

The model runs dense. Of some of its layers the keys are the features, and the attention, averaged
over heads and added up a few rows at a time, gives the labels (`labels`). Adam, focal loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.methods.dhsa.labels import Jumps, focal_loss, labels, positions
from foveate.methods.dhsa.predictor import BoundaryPredictor, features
from foveate.ops import AttentionOutput, attention, probs
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention, mask_layout
from foveate.parts.context import Context
from foveate.parts.fit_loop import loop
from foveate.parts.fitting import Artefact, Batch, Batches, Frozen, Progress, State

if TYPE_CHECKING:
    from foveate.methods.dhsa.pattern import DHSA

STEPS, LR, LAYERS = 60, 5e-4, 4
_ROWS = 256


class Watcher(Attention):
    """Dense attention that keeps features and labels of some layers."""

    def __init__(self, layers: tuple[int, ...], look: int) -> None:
        self.layers, self.look = layers, look
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`; keeps (features (B, L, C), labels (B, L)) by layer."""
        ctx = Context() if ctx is None else ctx
        result = attention(q, k, v, layout=mask_layout(ctx.mask, q, k, ctx), **ctx.options)
        if ctx.layer in self.layers:
            self.seen[ctx.layer] = (features(k.detach()), self._labels(q, k, result.lse, ctx))
        return result

    @torch.no_grad()
    def _labels(self, q: Tensor, k: Tensor, lse: Tensor, ctx: Context) -> Tensor:
        found = []
        for b in range(q.shape[0]):
            one = slice(b, b + 1)
            jumps = Jumps(k.shape[2], self.look, q.device)
            for rows in torch.arange(q.shape[2], device=q.device).split(_ROWS):
                p = probs(
                    q[one], k[one], lse[one], rows, ctx.mask, scale=ctx.scale, softcap=ctx.softcap
                )
                jumps.add(int(rows[0]), p[0].mean(0))
            found.append(labels(jumps.ratio()))
        return torch.stack(found)


def fit(
    method: DHSA, model: Frozen, batches: Batches, progress: Progress, state: State
) -> Artefact:
    """Train a predictor; `batches` are prompts without padding, of 512 tokens or more.

    Returns:
        The weights, and facts: "predictor" (its sizes), "layers", "held_out" (precision, recall
        and F1 of the labels, and their rate), "history".
    """
    if method.chunk is not None:
        raise InputError(
            f"dhsa(chunk={method.chunk}) cuts equal chunks and has no predictor to fit; leave "
            "chunk out."
        )
    torch.manual_seed(0)
    predictor = BoundaryPredictor(model.kv_heads * model.head_dim)
    first = batches.train(0).ids
    if first.shape[1] < 16 * predictor.look:
        raise InputError(f"Texts of {first.shape[1]} tokens are too short to fit dhsa; give 512.")
    predictor.to(first.device)
    spread = torch.linspace(0, len(model.layers) - 1, min(LAYERS, len(model.layers)), device="cpu")
    layers = tuple(model.layers[int(i)] for i in spread.round())
    optimizer = torch.optim.Adam(predictor.parameters(), lr=LR)

    def step(number: int) -> dict[str, float]:
        seen = _watch(model, batches.train(number), layers, predictor.look)
        optimizer.zero_grad()
        total = torch.zeros((), device=first.device)
        for x, y in seen.values():
            loss = focal_loss(predictor(x), y, predictor.look) / len(seen)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return {"loss": float(total)}

    setting = {
        "model": model.fingerprint, "text": batches.describe(), "steps": STEPS, "lr": LR,
        "layers": list(layers), "predictor": predictor.sizes,
    }  # fmt: skip
    history = loop(predictor, optimizer, step, STEPS, progress, state, setting=setting)
    facts: dict[str, Any] = setting | {
        "held_out": judge(model, predictor, batches, layers),
        "history": history,
    }
    tensors = {name: t.detach().cpu() for name, t in predictor.state_dict().items()}
    return Artefact("dhsa", facts, tensors)


@torch.no_grad()
def _watch(
    model: Frozen, batch: Batch, layers: tuple[int, ...], look: int
) -> dict[int, tuple[Tensor, Tensor]]:
    watcher = Watcher(layers, look)
    model.run(batch.ids, watcher)
    return watcher.seen


@torch.no_grad()
def judge(
    model: Frozen, predictor: BoundaryPredictor, batches: Batches, layers: tuple[int, ...]
) -> dict[str, float]:
    """Precision, recall and F1 of p >= 1/2 against the labels of held-out text, and their rate."""
    right = chosen = wanted = total = 0.0
    for batch in batches.held_out():
        for x, y in _watch(model, batch, layers, predictor.look).values():
            at = positions(x.shape[1], predictor.look).to(x.device)
            guess, truth = predictor(x)[:, at] >= 0, y[:, at] > 0
            right += float((guess & truth).sum())
            chosen += float(guess.sum())
            wanted += float(truth.sum())
            total += truth.numel()
    precision, recall = right / max(chosen, 1.0), right / max(wanted, 1.0)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
        "rate": wanted / max(total, 1.0),
    }
