"""Fitting Flux: a router for each layer of a frozen model, on prose and on prompts that look back.

See `train` for the objective. The backbone stays as it is; gradients go through it to the routers.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.methods.flux.router import Routers
from foveate.methods.flux.train import (
    TARGETS,
    Mixing,
    Multipliers,
    learning_rate,
    optimizer_of,
    temperature,
)
from foveate.ops.errors import InputError
from foveate.parts.fit_loop import loop
from foveate.parts.fitting import Artefact, Batch, Batches, Frozen, Progress, State

if TYPE_CHECKING:
    from foveate.methods.flux.pattern import Flux

STEPS, LR, LR_MULTIPLIERS, CLIP = 150, 1e-3, 2e-2, 5.0
FIRST = 8  # batches whose pooled queries say where the routers begin


class Learnt(nn.Module):
    """What a fit trains."""

    def __init__(self, layers: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.routers = Routers(layers, dim)
        self.multipliers = Multipliers()


def fit(
    method: Flux, model: Frozen, batches: Batches, progress: Progress, state: State
) -> Artefact:
    """Train a router for each layer; `batches` hold prose and retrieval, without padding.

    Returns:
        The weights, and facts: "layers", "head_dim", "pool", "held_out" (share of full attention
        and cross entropy by task, as decided without noise), "history".

    Raises:
        InputError: sequences so short that the sparse branch would see everything.
    """
    if method.route != "learned":
        raise InputError(f"flux(route={method.route!r}) has no routers to fit; leave route out.")
    if method.mode == "triangle":
        raise InputError("flux(mode='triangle'): fit with mode='streaming', then use either.")
    first = batches.train(0)
    length = first.ids.shape[1]
    block = method.block
    reach = (-(-method.sinks // block) + -(-method.local // block)) * block
    if length <= reach:
        raise InputError(
            f"At {length:,} tokens flux's sparse branch (sinks={method.sinks}, "
            f"local={method.local}) sees everything, so that there is nothing to learn; give a "
            f"greater --length, or fit flux(sinks=64, local={max(64, length // 4)}, block=64, "
            "pool=8)."
        )
    torch.manual_seed(0)
    learnt = Learnt(model.layers, model.head_dim).to(first.ids.device)
    optimizer = optimizer_of(learnt.routers, learnt.multipliers, LR, LR_MULTIPLIERS)
    rates = [group["lr"] for group in optimizer.param_groups]

    def step(number: int) -> dict[str, float]:
        batch = batches.train(number)
        random = torch.Generator().manual_seed(number)
        mixing = Mixing(
            method, learnt.routers, batch.prompt, temperature(number, STEPS), random
        )  # fmt: skip
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * learning_rate(number, STEPS)
        optimizer.zero_grad()
        entropy = model.loss(model.run(batch.ids, mixing), batch).mean()
        sparsity = mixing.sparsity
        (entropy + learnt.multipliers.constraint(sparsity, batch.task)).backward()
        nn.utils.clip_grad_norm_(learnt.routers.parameters(), CLIP)
        optimizer.step()
        found = {"loss": float(entropy.detach())}
        shares = defaultdict(list)
        for task, omega in zip(batch.task, sparsity.detach().tolist()):
            shares[f"full_{task}"].append(1.0 - omega)
        return found | {name: sum(v) / len(v) for name, v in shares.items()}

    setting: dict[str, Any] = {
        "model": model.fingerprint, "text": batches.describe(), "steps": STEPS, "lr": LR,
        "lr_multipliers": LR_MULTIPLIERS, "targets": TARGETS, "first": FIRST,
        "sinks": method.sinks, "local": method.local, "block": block, "mode": method.mode,
        "pool": method.pool, "layers": list(model.layers), "head_dim": model.head_dim,
    }  # fmt: skip
    held = state.load()
    if held is None or held[0].get("setting") != setting:
        progress(0.0, "looking at the first prompts")
        begin(method, model, learnt.routers, [first] + [batches.train(i) for i in range(1, FIRST)])
    history = loop(learnt, optimizer, step, STEPS, progress, state, setting=setting, every=5)
    facts = setting | {
        "held_out": judge(method, model, learnt.routers, batches),
        "multipliers": learnt.multipliers.values.detach().tolist(),
        "history": history,
    }
    tensors = {name: t.detach().cpu() for name, t in learnt.routers.state_dict().items()}
    return Artefact("flux", facts, tensors)


@torch.no_grad()
def begin(method: Flux, model: Frozen, routers: Routers, batches: list[Batch]) -> None:
    """Start each router at the mean and spread of its layer's pooled queries in these batches."""
    pooled: dict[int, list[Tensor]] = defaultdict(list)
    for batch in batches:
        mixing = Mixing(method, routers, batch.prompt)  # all full, which is how routers begin
        model.run(batch.ids, mixing)
        for layer, u in mixing.u.items():
            pooled[layer].append(u)
    for layer, found in pooled.items():
        routers.standardize(layer, torch.cat(found))


@torch.no_grad()
def judge(method: Flux, model: Frozen, routers: Routers, batches: Batches) -> dict[str, float]:
    """On held-out text: share of full attention and cross entropy by task, decided without noise.

    Cross entropy is of the routed model ("loss_") and of the model with full attention ("dense_").
    """
    found: dict[str, list[float]] = defaultdict(list)
    for batch in batches.held_out():
        # Without noise the straight-through decision is the one of inference.
        mixing = Mixing(method, routers, batch.prompt)
        routed = model.loss(model.run(batch.ids, mixing), batch).tolist()
        dense = model.loss(model.run(batch.ids, _full(method)), batch).tolist()
        for task, omega, ours, theirs in zip(
            batch.task, mixing.sparsity.tolist(), routed, dense, strict=True
        ):
            found[f"full_{task}"].append(1.0 - omega)
            found[f"loss_{task}"].append(ours)
            found[f"dense_{task}"].append(theirs)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def _full(method: Flux) -> Flux:
    return type(method)(route="full")
