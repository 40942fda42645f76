"""TPLA: a trained latent attention on the halves of its latent, without training it again.

One small language model on bytes with MLA (3 layers of width 128, 4 heads of 32, latent 128, rotary
part 16) is trained for each seed; every other arm is that model, converted. GLA gives each half to
one half of the heads; TPLA gives both halves to all heads, in a basis that is chosen from 2,048
training tokens (PCA), by a Hadamard matrix, or not at all. "literal" takes the paper's printed
factors, alpha = mu = share, for the record. Prefill-decode separation is judged on the second half
of every window, which is decoded token by token after a prefill of the first.

Nothing is tuned: there is one model for each seed. Counted, at DeepSeek-V3's sizes: numbers cached
for each token and layer on a device, and multiply-adds for each cached token, both on two devices.
And by the roofline ("costs"): the time of attention over a cached 32K on two H800, where the paper
measures 1.79 times as fast (a whole decoder without its experts).
Measured on two processes ("ranks", `foveate.papers.system.latents`): bytes cached, numbers summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foveate.methods.tpla import TPLA
from foveate.methods.tpla.basis import Transform
from foveate.papers.harness import Found, Paper, Trial, at_least, difference, ratio
from foveate.papers.system.costs import TPLA_ARMS, TPLA_CHECKS, tpla_costs
from foveate.papers.system.latents import LATENT_CHECKS, MLA2, TPLA2, latents
from foveate.papers.tasks import ByteText, standard_library
from foveate.papers.training import evaluate
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)
from foveate.papers.training.objective import cross_entropy

STEPS, LENGTH = 900, 128
MLA = "mla(latent=128, rope_dim=16, head_dim=32)"
WHOLE, BLOCKS = TPLA(pd_sep=False), TPLA(pd_sep=False, heads="blocks")
CONVERSIONS: dict[str, tuple[TPLA, Transform]] = {
    "GLA": (BLOCKS, "identity"),
    "GLA PCA": (BLOCKS, "pca"),
    "TPLA PCA": (WHOLE, "pca"),
    "TPLA Hadamard": (WHOLE, "hadamard"),
    "TPLA identity": (WHOLE, "identity"),
    "TPLA values only": (TPLA(pd_sep=False, norm="exact", softmax="exact"), "pca"),
}


def run(trial: Trial) -> Found:
    """Train MLA, convert it in every way, and evaluate all; or count at DeepSeek-V3's sizes."""
    if trial.cell == "at size":
        return at_size()
    if trial.cell == "ranks":
        return latents(trial)
    if trial.cell == "costs":
        return tpla_costs()
    from foveate.models import to_tpla

    model, found = trained_on_bytes(
        trial, lambda: language_model(Sizes(3, 128, 4, LENGTH), MLA), steps=STEPS, lr=2e-3
    )
    task = standard_library(LENGTH, held=16 if trial.quick else 512)
    text = task.batch(trial.seed, 0, 16).inputs.to(trial.device)

    def converted(recipe: TPLA, transform: Transform) -> Any:
        random = torch.Generator().manual_seed(trial.seed)
        return to_tpla(model, recipe, transform, text, generator=random)

    arms: dict[str, dict[str, Any]] = {"MLA": found}
    for name, (recipe, transform) in CONVERSIONS.items():
        trial.tell(1.0, f"evaluating {name}")
        arms[name] = {"loss": evaluate(converted(recipe, transform), task, "test")["loss"]}
    literal = converted(WHOLE, "pca")
    for layer in literal.model.layers:
        cut = layer.attention.projection
        cut.alpha.reciprocal_()  # it was 1 / share
        cut.mu.copy_(cut.alpha)
    arms["TPLA literal"] = {"loss": evaluate(literal, task, "test")["loss"]}
    together = converted(WHOLE, "pca")
    apart = converted(TPLA(pd_sep=True), "pca")
    arms["MLA"]["second half"] = second_half(model, task)
    arms["TPLA PCA"]["second half"] = second_half(together, task)
    arms["TPLA pd sep"] = {"second half": second_half(apart, task, decoded=True)}
    return arms


@torch.no_grad()
def second_half(model: Any, task: ByteText, *, decoded: bool = False) -> float:
    """Nats for each byte of the second halves of the test windows, at once or token by token."""
    loss = count = 0.0
    for inputs, targets in _batches(model, task):
        half = inputs.shape[1] // 2
        if decoded:
            out = model(inputs[:, :half], use_cache=True)
            cache, parts = out.past_key_values, []
            for at in range(half, inputs.shape[1]):
                parts.append(model(inputs[:, at : at + 1], past_key_values=cache).logits)
            logits = torch.cat(parts, 1)
        else:
            logits = model(inputs).logits[:, half:]
        wanted = targets[:, half:]
        loss += cross_entropy(logits, wanted, "sum").item()
        count += wanted.numel()
    return loss / count


def _batches(model: Any, task: ByteText) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for batch in task.held_out("test", 64):
        yield batch.to(device)


def at_size() -> Found:
    """DeepSeek-V3 on two devices: numbers cached, multiply-adds for each cached token."""
    from foveate.nn import Attention

    sizes = "(latent=512, rope_dim=64, head_dim=128"
    with torch.device("meta"):
        mla: Any = Attention(7168, 128, f"mla{sizes})").projection
        tpla: Any = Attention(7168, 128, f"tpla{sizes}, pd_sep=False)").projection
    latent, rope = mla.latent, mla.rope_dim
    per_device = tpla.elements_per_device
    return {
        "DeepSeek-V3 MLA": {
            "cache": float(mla.new_cache().elements_per_token),
            "multiply-adds": float(mla.heads // 2 * 2 * (2 * latent + rope)),
        },
        "DeepSeek-V3 TPLA": {
            "cache": float(per_device),
            "multiply-adds": float(tpla.heads * 2 * (per_device + tpla.slice_width)),
        },
    }


def _times_closer(at: Found) -> float:
    lost = at["TPLA PCA"]["loss"] - at["MLA"]["loss"]
    return float(at["GLA"]["loss"] - at["MLA"]["loss"] - 10 * lost)


PAPER = Paper(
    key="tpla",
    claim="A trained MLA becomes a TPLA without training and loses next to nothing, where GLA "
    "loses most of its quality; each of two devices then holds 5/9 of the cache.",
    metric="test loss in nats for each byte; numbers cached for each token, layer and device",
    cells=("at size", "costs", "ranks", "trained"),
    run=run,
    baseline=("MLA", "GLA", "GLA PCA", "DeepSeek-V3 MLA", TPLA_ARMS[0], MLA2),
    ours=("TPLA PCA", "TPLA Hadamard", "TPLA identity", "TPLA values only", "TPLA literal",
          "TPLA pd sep", "DeepSeek-V3 TPLA", TPLA_ARMS[1], TPLA2),
    checks=(
        at_least("loss: GLA - MLA - 10 (TPLA PCA - MLA)", _times_closer, 0.0, refuted=-math.inf),
        difference("TPLA PCA", "GLA", 0.0),
        difference("TPLA PCA", "MLA", 0.05),
        difference("TPLA PCA", "TPLA Hadamard", 0.0, refuted=math.inf),
        difference("TPLA PCA", "TPLA identity", 0.0, refuted=math.inf),
        difference("TPLA pd sep", "TPLA PCA", 0.005, "second half", refuted=math.inf),
        ratio("DeepSeek-V3 MLA", "DeepSeek-V3 TPLA", 1.8, "cache", exact=True),
        ratio("DeepSeek-V3 MLA", "DeepSeek-V3 TPLA", 0.944, "multiply-adds", exact=True),
        *TPLA_CHECKS,
        *LATENT_CHECKS,
    ),
    needs=(learnt("MLA"),),
    requires=REQUIRES,
    data=lambda: standard_library().describe(),
    alone=("ranks",),
)  # fmt: skip
