"""The table: on screen with rich, in Markdown, and the words that explain its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from foveate.compare.summary import Row, Spread

NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: heading, explanation, whether it's only in the long table."""

    heading: str
    meaning: str
    extra: bool = False


COLUMNS = {
    "length": Column("tokens", "length of each prompt"),
    "method": Column("method", "as `foveate.use` takes it"),
    "prefill": Column(
        "prefill ×",
        "time of dense (transformers' own attention) over the method's, for the whole model, end "
        "to end: median of the paired passes (smallest–largest). Above 1 is faster.",
    ),
    "ideal": Column(
        "ideal ×",
        "what prefill × would be if attention took dense's time times the visited tile area",
    ),
    "realised": Column(
        "realised",
        "attained share of that ideal in attention alone, layouts apart (with the time of choosing "
        "and building them); medians. Above 100% "
        "attention is faster per tile than dense's",
    ),
    "attention": Column(
        "attention ×",
        "time of dense's attention over the method's, choosing and building layouts counted",
        True,
    ),
    "layouts": Column(
        "layouts", "time for building layouts in a pass, all layers: median (first pass)"
    ),
    "decode": Column(
        "decode ×", "seconds per token of dense over the method's, greedy, from the filled cache"
    ),
    "memory": Column("peak MB", "peak memory of the pass beyond what was held before it (dense's)"),
    "cache": Column("cache MB", "bytes of the key/value cache after prefill (dense's)", True),
    "visited": Column("tiles", "visited tile area, of dense's"),
    "pairs": Column("pairs", "query-key pairs that attend, of dense's", True),
    "kl": Column(
        "KL", "mean KL(dense || method) of the next-token distribution, in nats per token"
    ),
    "agreement": Column("top-1", "tokens whose most likely next token is dense's"),
    "loss": Column(
        "perplexity", "change of perplexity against dense on the same tokens, ± one standard error"
    ),
    "needle": Column("keys", "hidden pass keys found, of all (dense's)"),
    "cosine": Column(
        "cosine", "mean cosine of final hidden states with dense's (worst position's)"
    ),
    "error": Column("error", "relative error of all final hidden states"),
    "check": Column("check", "of the outputs in this run; without it no speed is shown"),
}
LANGUAGE = (
    "length", "method", "prefill", "attention", "ideal", "realised", "layouts", "decode", "memory",
    "cache", "visited", "pairs", "kl", "agreement", "loss", "needle", "check",
)  # fmt: skip
ENCODER = (
    "length", "method", "prefill", "attention", "ideal", "realised", "layouts", "memory", "visited",
    "pairs", "cosine", "error", "check",
)  # fmt: skip


def columns_for(rows: list[Row], full: bool) -> list[str]:
    """Names of the columns that these rows fill."""
    names = ENCODER if any(row.cosine is not None for row in rows) else LANGUAGE
    kept = [name for name in names if full or not COLUMNS[name].extra]
    if not any(row.hidden for row in rows) and "needle" in kept:
        kept.remove("needle")
    if any(row.cache is not None and row.cache < 0.95 for row in rows) and "cache" not in kept:
        kept.insert(kept.index("memory") + 1, "cache")
    if not any(row.decode for row in rows) and "decode" in kept:
        kept.remove("decode")
    return kept


def cells(row: Row, names: list[str]) -> list[str]:
    """A row as text."""
    values = {
        "length": f"{row.length:,}",
        "method": row.entry.name,
        "prefill": times(row.prefill),
        "ideal": NONE if row.ideal_prefill is None else f"{row.ideal_prefill:.2f}",
        "attention": times(row.attention_counted),
        "realised": _pair(_share(row.realised), _share(row.realised_counted)),
        "layouts": _pair(_duration(row.build_seconds), _duration(row.build_first)),
        "decode": times(row.decode),
        "memory": _pair(_mega(row.peak_bytes), _mega(row.dense_peak_bytes)),
        "cache": _pair(_mega(row.cache_bytes), _mega(row.dense_cache_bytes)),
        "visited": NONE if row.area is None else f"{100 * row.area:.0f}%",
        "pairs": NONE if row.pairs is None else f"{100 * row.pairs:.0f}%",
        "kl": NONE if row.kl is None else f"{max(0.0, row.kl):.2g}" if row.kl > 1e-7 else "0",
        "agreement": NONE if row.agreement is None else f"{100 * row.agreement:.1f}%",
        "loss": _loss(row),
        "needle": f"{row.found}/{row.hidden} ({row.dense_found})" if row.hidden else NONE,
        "cosine": NONE if row.cosine is None else f"{row.cosine:.4f} ({row.worst_cosine:.3f})",
        "error": NONE if row.state_error is None else f"{row.state_error:.2g}",
        "check": "passed" if row.passed else "FAILED",
    }
    return [values[name] for name in names]


def times(spread: Spread | None) -> str:
    """A ratio with its spread."""
    if spread is None:
        return NONE
    return f"{spread.middle:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def screen_table(rows: list[Row]) -> Table:
    """The table for a terminal."""
    names = columns_for(rows, full=False)
    table = Table(pad_edge=False, header_style="bold", expand=False, box=box.SIMPLE_HEAD)
    for name in names:
        justify: Any = "left" if name in ("method", "check") else "right"
        wide = min(34, max(len(row.entry.name) for row in rows)) if name == "method" else None
        table.add_column(COLUMNS[name].heading, justify=justify, overflow="fold", min_width=wide)
    last = None
    for row in rows:
        if last is not None and row.length != last:
            table.add_section()
        last = row.length
        texts = [
            Text(text if name == "method" else text.replace(" (", "\n("))
            for name, text in zip(names, cells(row, names))
        ]
        if not row.passed:
            texts[-1].stylize("bold red")
        table.add_row(*texts)
    return table


def line(row: Row) -> str:
    """A finished row in one line, for the progress."""
    parts = [f"{row.length:>6,}  {row.entry.name}"]
    if not row.passed:
        parts.append(f"check FAILED: {row.said}; no speed is shown")
    if row.prefill:
        parts.append(f"prefill {times(row.prefill)}x")
    if row.decode:
        parts.append(f"decode {row.decode.middle:.2f}x")
    if row.loss is not None:
        parts.append(f"perplexity {100 * row.loss:+.2f}%")
    if row.cosine is not None:
        parts.append(f"cosine {row.cosine:.4f}")
    if row.hidden:
        parts.append(f"keys {row.found}/{row.hidden}")
    return "  ".join(parts)


def markdown(rows: list[Row], title: str, notes: list[str]) -> str:
    """The table with its legend, as Markdown."""
    names = columns_for(rows, full=True)
    out = [f"# {title}", ""]
    out.append("| " + " | ".join(COLUMNS[name].heading for name in names) + " |")
    out.append(
        "|" + "".join(" --- |" if name in ("method", "check") else " ---: |" for name in names)
    )
    for row in rows:
        texts = cells(row, names)
        at = names.index("method")
        texts[at] = f"`{texts[at]}`"
        out.append("| " + " | ".join(texts) + " |")
    failed = [row for row in rows if not row.passed]
    out += ["", *(f"- {note}" for note in notes)]
    out += [f"- check of {row.entry.name} at {row.length:,}: {row.said}" for row in failed]
    out += ["", "Columns", ""]
    out += [f"- **{COLUMNS[name].heading}**: {COLUMNS[name].meaning}" for name in names]
    return "\n".join(out) + "\n"


def _loss(row: Row) -> str:
    if row.loss is None:
        return NONE
    if row.loss_error is None or row.loss_error < 5e-7:
        return f"{100 * row.loss:+.2f}%"
    return f"{100 * row.loss:+.2f}% (±{100 * row.loss_error:.2f})"


def _pair(value: str, other: str) -> str:
    return NONE if value == NONE else f"{value} ({other})"


def _share(spread: Spread | None) -> str:
    return NONE if spread is None else f"{100 * spread.middle:.0f}%"


def _mega(count: int | None) -> str:
    if count is None:
        return NONE
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
