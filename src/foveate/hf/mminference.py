"""MInference's and MMInference's offline search on a model: a pattern for each layer and head.

The model runs as it is, on dense attention; every head of every layer tries the candidates on the
queries, keys and values that it is given (`foveate.methods.mminference.search`). What comes out is
plain data: an assignment that `foveate.use` takes, with the fingerprint of the model. This is for
prompts of any kind, with images too; `foveate fit --method mminference` runs the same on text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from foveate.hf.errors import ModelError
from foveate.hf.fit.artefacts import fingerprint
from foveate.hf.modality import placeholders
from foveate.hf.places import sites
from foveate.hf.using import use
from foveate.methods.mminference.search import Searcher, chosen, space


@torch.no_grad()
def search(
    model: Any,
    batches: Iterable[Any],
    progress: Callable[[float, str], None] = lambda share, doing: None,
    *,
    candidates: Sequence[str] | None = None,
    target: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Which pattern and budget each head gets.

    Args:
        model: a transformers model with causal attention.
        batches: prompts, each what the model takes: input ids (1, L), or a dict of its arguments
            (a prompt with images). Errors are averaged over them; budgets come from the first.
        progress: told the share that is done, and what.
        candidates: texts of patterns; None is the paper's space, MMInference's for a model with
            placeholders for vision, else MInference's.
        target: (sinks, local) of the A-shape whose cost every head matches; None is 1024 and 4096,
            less for prompts of fewer than 20,480 tokens.

    Returns:
        An assignment as data (`foveate.hf.Assignment.load` reads it from a JSON file), with
        "method", the model's "fingerprint", and under "search" the target and each head's error
        and share of dense attention's work.

    Raises:
        ModelError: no prompt was given, or the model's causal attention lies in several stacks.
    """
    vision = bool(placeholders(getattr(model, "config", None)))
    names = tuple(space(vision=vision) if candidates is None else candidates)
    stack, layers, heads = _causal_stack(model)
    prompts = list(batches)
    if not prompts:
        raise ModelError("search: expected at least one prompt.")
    done, total = [0], max(1, len(prompts) * layers * heads)

    def tell(layer: int, head: int) -> None:
        done[0] += 1
        progress(min(1.0, done[0] / total), f"layer {layer}, head {head}")

    searcher = Searcher(names, target, tell)
    with use(model, searcher):
        for prompt in prompts:
            inputs = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
            model(**inputs, use_cache=False)
    single = len({s.stack for s in sites(model).values() if not s.cross}) == 1
    plan = {
        str(layer) if single else f"{stack}.{layer}": heads
        for layer, heads in chosen(searcher.found).items()
    }
    details: dict[str, dict[str, Any]] = {}
    for (layer, head), found in sorted(searcher.found.items()):
        name, best = str(layer) if single else f"{stack}.{layer}", found.best
        details.setdefault(name, {})[str(head)] = {
            "pattern": best.pattern, "error": best.error, "area": best.area, "target": found.target,
        }  # fmt: skip
    return {
        "foveate": 1,
        "method": "mminference",
        "fingerprint": fingerprint(model),
        "default": "full",
        "layers": {
            name: {",".join(map(str, own)): text for text, own in patterns.items()}
            for name, patterns in plan.items()
        },
        "search": {"candidates": list(names), "target": target, "heads": details},
    }


def _causal_stack(model: nn.Module) -> tuple[str, int, int]:
    """Path of the stack of layers with causal attention, how many there are, and their heads."""
    found = [
        site
        for module, site in sites(model).items()
        if not site.cross and getattr(module, "is_causal", True)
    ]
    stacks = {site.stack for site in found}
    if len(stacks) != 1:
        raise ModelError(
            "search: expected one stack of layers with causal attention, found "
            f"{', '.join(sorted(stacks)) or 'none'}."
        )
    return found[0].stack, len(found), found[0].heads or 1
