"""From the records of single passes to one row per method and length.

A speed is the median of paired ratios, dense time over method time within one round, with the
smallest and the largest of them; it is None where the outputs failed their check.

    ideal attention = dense attention time * visited tile area / tile area of the model's own mask
    realised share  = ideal attention / attention time, layouts apart; counted: with them
    ideal prefill   = dense prefill - dense attention + ideal attention
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from foveate.compare import verify
from foveate.compare.plan import Entry


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of paired figures."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """The spread of some values; None if there are none."""
        return cls(median(values), min(values), max(values)) if values else None

    def as_dict(self) -> dict[str, float]:
        """As plain data."""
        return {"median": self.middle, "min": self.low, "max": self.high}


@dataclass(frozen=True)
class Row:
    """What is known of one method at one length; None is not measured or not to be shown.

    Attributes:
        entry: the method.
        length: tokens of each prompt.
        passes: how many were measured.
        passed: whether the outputs passed their check; said: in a sentence how.
        prefill: dense's time over the method's. decode: likewise per token.
        prefill_seconds, dense_prefill_seconds, decode_seconds, dense_decode_seconds: medians.
        attention: dense's attention time over the method's, layouts apart; attention_seconds,
            dense_attention_seconds: medians.
        ideal_attention, ideal_prefill: what these ratios would be at dense's speed per tile area.
        realised: attained share of the ideal, in attention; realised_prefill: end to end, with
            layout building.
        attention_counted, realised_counted: as attention and realised, with the time of estimating
            and of building layouts.
        build_seconds: of the layouts in a pass, median; build_first: in the first pass.
        area, pairs: visited share of the tile area, and of the pairs, of the model's own mask.
        peak_bytes, cache_bytes (and dense_): memory of the pass beyond the weights, and the cache.
        kl, agreement, perplexity, dense_perplexity, loss, loss_error: see quality.py; loss_error
            is the standard error of the loss over tokens.
        cosine, worst_cosine, state_error: of an encoder.
        found, dense_found, hidden: keys found, by dense, and how many there were.
    """

    entry: Entry
    length: int
    passes: int
    passed: bool
    said: str
    prefill: Spread | None = None
    prefill_seconds: float | None = None
    dense_prefill_seconds: float | None = None
    decode: Spread | None = None
    decode_seconds: float | None = None
    dense_decode_seconds: float | None = None
    attention: Spread | None = None
    attention_seconds: float | None = None
    dense_attention_seconds: float | None = None
    ideal_attention: float | None = None
    ideal_prefill: float | None = None
    realised: Spread | None = None
    realised_prefill: Spread | None = None
    attention_counted: Spread | None = None
    realised_counted: Spread | None = None
    build_seconds: float | None = None
    build_first: float | None = None
    area: float | None = None
    pairs: float | None = None
    peak_bytes: int | None = None
    dense_peak_bytes: int | None = None
    cache_bytes: int | None = None
    dense_cache_bytes: int | None = None
    kl: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    dense_perplexity: float | None = None
    loss: float | None = None
    loss_error: float | None = None
    cosine: float | None = None
    worst_cosine: float | None = None
    state_error: float | None = None
    found: int | None = None
    dense_found: int | None = None
    hidden: int = 0
    picture: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def cache(self) -> float | None:
        """Share of dense's cache that is held."""
        if not self.cache_bytes or not self.dense_cache_bytes:
            return None
        return self.cache_bytes / self.dense_cache_bytes

    @property
    def quality_loss(self) -> float | None:
        """Perplexity loss of a language model, 1 - mean cosine of an encoder."""
        return self.loss if self.cosine is None else 1 - self.cosine

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "entry":
                plain |= {"method": value.name, "reserved": value.reserved}
            elif isinstance(value, Spread):
                plain[name] = value.as_dict()
            elif name != "picture":
                plain[name] = value
        return plain


def summarise(entry: Entry, length: int, found: list[dict[str, Any]], dtype: torch.dtype) -> Row:
    """The row of a method at a length.

    Args:
        entry: the method.
        length: tokens.
        found: the values of its records, in the order of the passes; at least one.
        dtype: of the run, for the tolerances of the check.
    """
    quality = _quality([v["quality"] for v in found if "quality" in v])
    states = _states([v["states"] for v in found if "states" in v])
    passed, said = _check(entry, found, dtype)
    values: dict[str, Any] = quality | states | _needles(found) | _memory(found)
    areas = [v for v in found if v.get("mask_area")]
    if areas:
        values["area"] = median(v["area"] / v["mask_area"] for v in areas)
        values["pairs"] = median(v["pairs"] / v["mask_pairs"] for v in areas)
    values["picture"] = next((v["picture"] for v in found if v.get("picture")), None)
    if passed:
        values |= _speeds(found)
    return Row(entry, length, len(found), passed, said, **values)


def _check(entry: Entry, found: list[dict[str, Any]], dtype: torch.dtype) -> tuple[bool, str]:
    checks = [v["check"] for v in found if "check" in v]
    if not checks:
        return False, "not checked yet"
    error = max(math.inf if c["error"] is None else c["error"] for c in checks)
    problems = [p for c in checks for p in c["problems"]]
    most: dict[str, float] = {}
    for v in found:
        for name in ("max_logit", "max_difference"):
            value = v.get("quality", {}).get(name, 0.0)
            most[name] = max(most.get(name, 0.0), math.inf if value is None else value)
    if not any("quality" in v for v in found):
        most = {}
    return verify.verdict(entry.method(), dtype, error, problems, most)


def _speeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "prefill": Spread.of([v["dense_seconds"] / v["seconds"] for v in found]),
        "prefill_seconds": median(v["seconds"] for v in found),
        "dense_prefill_seconds": median(v["dense_seconds"] for v in found),
        "build_seconds": median(v["build_seconds"] for v in found),
        "build_first": found[0]["build_seconds"],
    }
    timed = [v for v in found if v.get("decode_seconds")]
    if timed:
        values["decode"] = Spread.of(
            [v["dense_decode_seconds"] / v["decode_seconds"] for v in timed]
        )
        values["decode_seconds"] = median(v["decode_seconds"] for v in timed)
        values["dense_decode_seconds"] = median(v["dense_decode_seconds"] for v in timed)
    inside = [v for v in found if v.get("attention_seconds") and v.get("dense_attention_seconds")]
    ratios = [v["dense_attention_seconds"] / v["attention_seconds"] for v in inside]
    values["attention"] = Spread.of(ratios)
    values["attention_counted"] = Spread.of(
        [v["dense_attention_seconds"] / _counted(v) for v in inside]
    )
    for name in ("attention_seconds", "dense_attention_seconds") if inside else ():
        values[name] = median(v[name] for v in inside)
    tiled = [v for v in inside if v.get("mask_area")]
    if tiled:
        ideals = [v["dense_attention_seconds"] * v["area"] / v["mask_area"] for v in tiled]
        wholes = [
            v["dense_seconds"] - v["dense_attention_seconds"] + ideal
            for v, ideal in zip(tiled, ideals)
        ]
        values["ideal_attention"] = median(
            v["dense_attention_seconds"] / ideal for v, ideal in zip(tiled, ideals)
        )
        values["ideal_prefill"] = median(v["dense_seconds"] / w for v, w in zip(tiled, wholes))
        values["realised"] = Spread.of([i / v["attention_seconds"] for v, i in zip(tiled, ideals)])
        values["realised_counted"] = Spread.of([i / _counted(v) for v, i in zip(tiled, ideals)])
        values["realised_prefill"] = Spread.of([w / v["seconds"] for v, w in zip(tiled, wholes)])
    return values


def _counted(values: dict[str, Any]) -> float:
    """Seconds of attention with all that was done to choose."""
    return float(values["attention_seconds"] + values["build_seconds"])


def _memory(found: list[dict[str, Any]]) -> dict[str, Any]:
    # The first pass keeps tensors for the check: its memory counts only if there is no other.
    clean = found[1:] or found
    values: dict[str, Any] = {}
    for name, pick in (("peak_bytes", min), ("cache_bytes", max)):
        for side in ("", "dense_"):
            known = [v[side + name] for v in clean if v.get(side + name)]
            values[side + name] = _integer(pick, known)
    return values


def _integer(pick: Callable[[list[int]], int], known: list[int]) -> int | None:
    return int(pick(known)) if known else None


def _quality(parts: list[dict[str, Any]]) -> dict[str, Any]:
    if not parts:
        return {}
    total = {name: sum(_number(p[name]) for p in parts) for name in parts[0]}
    n = total["tokens"]
    mean = (total["nll"] - total["nll_dense"]) / n
    variance = max(0.0, total["nll_difference_squared"] / n - mean * mean)
    factor = _exp(mean)
    return {
        "kl": total["kl"] / n,
        "agreement": total["agree"] / n,
        "perplexity": _exp(total["nll"] / n),
        "dense_perplexity": _exp(total["nll_dense"] / n),
        "loss": factor - 1,
        "loss_error": factor * math.sqrt(variance / n),
    }


def _states(parts: list[dict[str, Any]]) -> dict[str, Any]:
    if not parts:
        return {}
    total = {name: sum(_number(p[name]) for p in parts) for name in parts[0]}
    return {
        "cosine": total["cosine"] / total["tokens"],
        "worst_cosine": min(_number(p["worst_cosine"]) for p in parts),
        "state_error": math.sqrt(total["error_squared"] / max(total["norm_squared"], 1e-300)),
    }


def _needles(found: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [v["needle"] for v in found if v.get("needle")]
    if not parts:
        return {}
    return {
        "found": sum(sum(p["found"]) for p in parts),
        "dense_found": sum(sum(p["dense_found"]) for p in parts),
        "hidden": sum(len(p["keys"]) for p in parts),
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
