"""What a compressed model is worth: weights, cache, speed against its original, perplexity.

Speeds are taken in one run, the contestants in turn, and compared round by round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foveate.runs.timing import paired, spread


def parameters(model: Any) -> int:
    """Weights; tied ones once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, batch: int = 4) -> dict[str, float]:
    """Mean nats of the next tokens of windows (N, L), their exponential, and how many there are."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for ids in windows.split(batch):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
        count += ids[:, 1:].numel()
    return {"loss": total / count, "perplexity": math.exp(total / count), "tokens": float(count)}


@torch.no_grad()
def once(model: Any, ids: Tensor, steps: int) -> tuple[float, float, int]:
    """Seconds of a prefill of ids (B, L), seconds of each decoded token, and bytes of the cache."""
    synchronise = torch.cuda.synchronize if ids.is_cuda else (lambda: None)
    synchronise()
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    synchronise()
    filled = time.perf_counter() - start
    cache = out.past_key_values
    held = cache_bytes(cache)
    start = time.perf_counter()
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    synchronise()
    return filled, (time.perf_counter() - start) / max(1, steps), held


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values: of foveate's cache, or of transformers' dynamic one."""
    if hasattr(cache, "bytes"):
        return int(cache.bytes())
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in tensors)


def speeds(
    models: Mapping[str, Any],
    base: str,
    ids: Tensor,
    steps: int,
    rounds: int,
    tell: Callable[[float, str], None],
) -> dict[str, dict[str, Any]]:
    """Each model's seconds, tokens per second and how many times faster than `base` it is.

    Args:
        models: by name.
        base: what the others are compared with.
        ids: (B, L), the prompt.
        steps: tokens decoded.
        rounds: each model runs once in each, after one that isn't counted.
        tell: hears how far it is.
    """
    order = list(models)
    filled: dict[str, list[float]] = {name: [] for name in order}
    decoded: dict[str, list[float]] = {name: [] for name in order}
    held: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name in order:
            one, two, held[name] = once(models[name], ids, steps if turn else 2)
            if turn:
                filled[name].append(one)
                decoded[name].append(two)
        order = order[1:] + order[:1]
        tell((turn + 1) / (rounds + 1), f"round {turn} of {rounds}")
    tokens = ids.numel()
    found: dict[str, dict[str, Any]] = {}
    for name in models:
        fill, step = spread(filled[name]), spread(decoded[name])
        found[name] = {
            "prefill_seconds": fill,
            "prefill_tokens_per_second": tokens / fill["median"],
            "prefill_times_faster": paired(filled[base], filled[name]),
            "decode_seconds": step,
            "decode_tokens_per_second": len(ids) / step["median"],
            "decode_times_faster": paired(decoded[base], decoded[name]),
            "cache_bytes": held[name],
        }
    return found
