"""Which attention to use: the fastest that loses little enough, or dense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from foveate.compare.summary import Row

DENSE = "dense"
# Three pairs of equal speed are all above 1 now and then: a gain must be more than their noise.
LEAST_GAIN = 1.03
LEAST_PAIRS = 3


@dataclass(frozen=True)
class Verdict:
    """What to use at one length.

    Attributes:
        length: tokens.
        use: the method's text, or "dense".
        row: its row; None for dense.
        why: in a sentence.
    """

    length: int
    use: str
    row: Row | None
    why: str


@dataclass(frozen=True)
class Recommendation:
    """The answer of a run.

    Attributes:
        use: what to use at the longest length.
        verdicts: one for each length that was measured, rising.
        sentence: the answer in words.
        code: lines of Python that load the model and adopt it, as they are.
        limits: the limits that were applied, in words.
    """

    use: str
    verdicts: tuple[Verdict, ...]
    sentence: str
    code: str
    limits: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "use": self.use,
            "sentence": self.sentence,
            "code": self.code,
            "limits": self.limits,
            "lengths": [{"length": v.length, "use": v.use, "why": v.why} for v in self.verdicts],
        }


def faults(row: Row, max_loss: float, max_needle_loss: float) -> list[str]:
    """Why a row can't be recommended; empty if it can."""
    found = _costs(row, max_loss, max_needle_loss)
    if not row.passed:
        return found
    if row.passes < LEAST_PAIRS:
        found.append(f"{row.passes} pairs are too few to tell a speed (at least {LEAST_PAIRS})")
    elif not _faster(row):
        speed = "unknown" if row.prefill is None else _times(row)
        found.append(f"not clearly faster than dense (prefill {speed})")
    return found


def _costs(row: Row, max_loss: float, max_needle_loss: float) -> list[str]:
    """What a row loses beyond the limits, speed apart; empty if nothing."""
    if not row.passed:
        return [f"its check failed ({row.said})"]
    found: list[str] = []
    loss = row.quality_loss
    what = "perplexity" if row.cosine is None else "1 - cosine"
    if loss is None or not loss <= max_loss:
        found.append(f"{what} {_percent(loss)} (limit {_percent(max_loss)})")
    if row.hidden and row.found is not None and row.dense_found is not None:
        lost = (row.dense_found - row.found) / row.hidden
        if lost > max_needle_loss + 1e-9:
            found.append(f"finds {row.found} of {row.hidden} keys (dense {row.dense_found})")
    return found


def _faster(row: Row) -> bool:
    """Whether a row is faster than dense in every pair, by more than noise."""
    gain = row.prefill
    return gain is not None and gain.low > 1 and gain.middle >= LEAST_GAIN


def recommend(
    rows: list[Row], *, max_loss: float, max_needle_loss: float, loading: str
) -> Recommendation:
    """The answer for all measured rows.

    Args:
        rows: what was measured.
        max_loss: largest perplexity loss, or 1 - mean cosine for an encoder, as a share.
        max_needle_loss: largest loss of the share of keys that dense finds.
        loading: lines of Python that make `model`.
    """
    verdicts = []
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        verdicts.append(_at(here, length, max_loss, max_needle_loss))
    last = verdicts[-1]
    encoder = any(row.cosine is not None for row in rows)
    what = "1 - mean cosine" if encoder else "perplexity loss"
    limits = f"{what} at most {_percent(max_loss, sign=False)}"
    if not encoder:
        limits += (
            ", keys found no fewer than dense"
            if not max_needle_loss
            else f", at most {_percent(max_needle_loss, sign=False)} fewer keys found than dense"
        )
    limits += f", prefill faster than dense in every pair and by {LEAST_GAIN - 1:.0%} at least"
    sentence = _sentence(verdicts, rows)
    sentence += _smaller(
        [row for row in rows if row.length == last.length], max_loss, max_needle_loss
    )
    return Recommendation(last.use, tuple(verdicts), sentence, _code(last, loading), limits)


def _at(rows: list[Row], length: int, max_loss: float, max_needle_loss: float) -> Verdict:
    rows = [row for row in rows if not row.entry.evicts]  # their prefill is dense
    good = [row for row in rows if not faults(row, max_loss, max_needle_loss)]
    if good:
        best = max(good, key=lambda row: row.prefill.middle if row.prefill else 0.0)
        return Verdict(length, best.entry.name, best, describe(best))
    fast = [row for row in rows if _faster(row)]
    if not fast:
        return Verdict(length, DENSE, None, "no method was clearly faster than dense")
    near = max(fast, key=lambda row: -(row.quality_loss if row.quality_loss is not None else 9e9))
    reasons = "; ".join(faults(near, max_loss, max_needle_loss))
    return Verdict(
        length,
        DENSE,
        None,
        f"the nearest is {near.entry.name}, prefill {_times(near)}, but {reasons}",
    )


def describe(row: Row) -> str:
    """What a method gains and costs, in a clause."""
    parts = [f"prefill {_times(row)}"]
    if row.decode is not None:
        parts.append(f"decoding {row.decode.middle:.2f}x")
    if row.cosine is not None:
        parts.append(f"mean cosine to dense {row.cosine:.4f}")
    elif row.loss is not None:
        parts.append(f"perplexity {_percent(row.loss)}")
    if row.hidden:
        parts.append(f"keys {row.found} of {row.hidden} (dense {row.dense_found})")
    return ", ".join(parts) + f"; always keeps {row.entry.reserved}"


def _sentence(verdicts: list[Verdict], rows: list[Row]) -> str:
    last = verdicts[-1]
    if last.row is None:
        text = f"At {last.length:,} tokens stay dense: {last.why}."
    else:
        text = f"Use {last.use} at {last.length:,} tokens: {last.why}."
    others = [v for v in verdicts[:-1] if v.use != last.use]
    if any(row.hidden and not row.dense_found for row in rows):
        blind = sorted({row.length for row in rows if row.hidden and not row.dense_found})
        where = " and ".join(f"{n:,}" for n in blind)
        text += f" (Dense itself finds no key at {where} tokens: the keys say nothing there.)"
    if others:
        told = "; ".join(
            f"at {v.length:,} "
            + ("stay dense" if v.row is None else f"use {v.use} ({describe(v.row)})")
            for v in others
        )
        text += f" It differs by length: {told}."
    return text


def _smaller(rows: list[Row], max_loss: float, max_needle_loss: float) -> str:
    """Which method holds the smallest cache within the limits, as a sentence; or nothing."""
    cut = [row for row in rows if row.entry.evicts and row.cache is not None]
    if not cut:
        return ""
    within = [row for row in cut if not _costs_decoding(row, max_loss, max_needle_loss)]
    small = [row for row in within if (row.cache or 1.0) < 1]
    if not small:
        return " No method that drops keys from the cache stays within the limits." + _nearest(
            [row for row in cut if row not in within], max_loss, max_needle_loss
        )
    best = min(small, key=lambda row: row.cache or 1.0)
    speed = "" if best.decode is None else f"decoding {best.decode.middle:.2f}x, "
    return (
        f" For a smaller cache, {best.entry.name} holds {100 * (best.cache or 1.0):.0f}% of "
        f"dense's after the prompt: {speed}perplexity {_percent(best.loss)} on what is decoded "
        f"(KL {max(0.0, _kl(best)):.2g})."
    )


def _costs_decoding(row: Row, max_loss: float, max_needle_loss: float) -> list[str]:
    """As `_costs`, for the few tokens that are decoded, where luck makes a perplexity lower.

    KL(dense, method) is the log of the perplexity loss to be expected on text that dense itself
    writes. It asks for whole distributions, not for the tokens that came, so luck hardly moves it.
    """
    found = _costs(row, max_loss, max_needle_loss)
    if row.passed and not _kl(row) <= math.log1p(max_loss):
        found.append(f"KL {_kl(row):.2g} (limit {math.log1p(max_loss):.2g})")
    return found


def _nearest(rows: list[Row], max_loss: float, max_needle_loss: float) -> str:
    """The nearest of those that cost too much, as a sentence; or nothing."""
    rows = [row for row in rows if _kl(row) < math.inf]
    if not rows:
        return ""
    near = min(rows, key=_kl)
    reasons = "; ".join(_costs_decoding(near, max_loss, max_needle_loss))
    return f" The nearest is {near.entry.name}, but {reasons}."


def _kl(row: Row) -> float:
    return math.nan if row.kl is None else row.kl


def _code(last: Verdict, loading: str) -> str:
    if last.row is None:
        return loading + "  # dense as it comes: nothing to adopt"
    quote = "'" if '"' in last.use else '"'
    return f"import foveate\n{loading}\nfoveate.use(model, {quote}{last.use}{quote})"


def _times(row: Row) -> str:
    assert row.prefill is not None
    return f"{row.prefill.middle:.2f}x ({row.prefill.low:.2f}-{row.prefill.high:.2f})"


def _percent(value: float | None, sign: bool = True) -> str:
    if value is None:
        return "unknown"
    return f"{100 * value:+.2f}%" if sign else f"{100 * value:g}%"
