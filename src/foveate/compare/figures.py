"""The report's figures, as SVG that stands inside a page, and pictures as PNG.

Methods differ by colour (Okabe and Ito's, safe for colour-blind eyes) and by marker.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from html import escape
from typing import Any

from foveate.compare.summary import Row, Spread
from foveate.runs.drawing import INK, SOFT, as_svg, drawing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00", "#7A7A7A", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


class Styles:
    """One colour and marker for each method key, in the order in which they were given."""

    def __init__(self, rows: list[Row]) -> None:
        keys = list(dict.fromkeys(row.entry.key for row in rows))
        self.many = len({row.entry.name for row in rows}) > len(keys)
        self._of = {
            key: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
            for i, key in enumerate(keys)
        }

    def __getitem__(self, key: str) -> tuple[str, str]:
        return self._of[key]


def _legend(axes: Any, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=9.5,
            handletextpad=0.5, columnspacing=1.4,
        )  # fmt: skip


def pareto(rows: list[Row], styles: Styles, length: int, limit: float) -> str | None:
    """Speed against quality at one length; None if nothing has both."""
    shown = [
        r
        for r in rows
        if r.length == length and r.prefill is not None and r.quality_loss is not None
    ]
    if not shown:
        return None
    encoder = shown[0].cosine is not None
    context, figure, axes = drawing(3.9)
    points = [(100 * (r.quality_loss or 0.0), r.prefill.middle, r) for r in shown if r.prefill]
    linear = 100 * limit if limit > 0 else 1.0
    axes.set_xscale("symlog", linthresh=linear, linscale=1.0)
    least = min(0.0, *(x for x, _, _ in points))
    low = least * 1.9 if least < -linear else least - 0.35 * linear
    high = max(linear * 3, *(x for x, _, _ in points)) * 1.9
    axes.set_xlim(low, high)
    speeds = [1.0] + [s for r in shown if r.prefill for s in (r.prefill.low, r.prefill.high)]
    span = max(speeds) - min(speeds) or 0.2
    axes.set_ylim(min(speeds) - 0.12 * span, max(speeds) + 0.22 * span)
    axes.axhline(1, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    top = axes.get_ylim()[1]
    if top > 1:
        axes.fill_between([low, 100 * limit], 1, top, color="#009E73", alpha=0.09, linewidth=0)
        axes.text(
            low,
            top - 0.02 * span,
            "  may be recommended",
            va="top",
            ha="left",
            fontsize=8.5,
            color="#00694d",
        )
    for key in dict.fromkeys(r.entry.key for _, _, r in points):
        colour, marker = styles[key]
        mine = [p for p in points if p[2].entry.key == key]
        if len(mine) > 1:
            axes.plot([p[0] for p in mine], [p[1] for p in mine], color=colour, linewidth=1.3)
        for x, y, row in mine:
            assert row.prefill is not None
            axes.errorbar(
                x, y, yerr=[[y - row.prefill.low], [row.prefill.high - y]], fmt=marker,
                color=colour, markersize=8, markeredgecolor="white", elinewidth=1.1, capsize=2.5,
                zorder=4,
            )  # fmt: skip
            if styles.many and len(mine) > 1:
                axes.annotate(
                    _budget(row), (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8,
                    color=INK,
                )  # fmt: skip
    front = _front([(0.0, 1.0), *((x, y) for x, y, _ in points)])
    axes.step(
        [x for x, _ in front], [y for _, y in front], where="post", color=INK, linewidth=1,
        alpha=0.55, zorder=2,
    )  # fmt: skip
    axes.plot(
        0, 1, marker="*", markersize=14, color="black", markeredgecolor="white", linestyle="",
        zorder=5,
    )  # fmt: skip
    axes.set_xlabel(
        "loss: 1 − mean cosine with dense, % (lower is better)"
        if encoder
        else "perplexity loss against dense, % (lower is better)"
    )
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_ylabel("prefill speed, times dense")
    axes.set_title(f"{length:,} tokens", fontsize=11, loc="left")
    return as_svg(context, figure, f"pareto{length}", f"Speed against quality at {length} tokens")


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that nothing beats both in loss (x, lower) and speed (y, higher), by rising loss."""
    best, front = -math.inf, []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if y > best:
            best = y
            front.append((x, y))
    return front


CURVES: dict[str, tuple[str, str, Callable[[Row], Spread | float | None], bool, float | None]] = {
    "prefill": ("Prefill speed", "times dense", lambda r: r.prefill, False, 1.0),
    "decode": ("Decoding speed", "times dense, per token", lambda r: r.decode, False, 1.0),
    "kl": ("Divergence from dense", "KL, nats per token", lambda r: r.kl, True, None),
    "loss": (
        "Perplexity loss",
        "% against dense",
        lambda r: None if r.loss is None else 100 * r.loss,
        False,
        0.0,
    ),
    "cosine": (
        "Distance from dense",
        "1 − mean cosine of hidden states",
        lambda r: None if r.cosine is None else 1 - r.cosine,
        True,
        None,
    ),
    "realised": (
        "Realised share of the ideal, in attention",
        "%, layouts apart",
        lambda r: None if r.realised is None else 100 * r.realised.middle,
        False,
        100.0,
    ),
}


def curve(rows: list[Row], styles: Styles, kind: str) -> str | None:
    """One quantity over the lengths, a line for each method; None if it wasn't measured."""
    title, unit, pick, logarithmic, line = CURVES[kind]
    lengths = sorted({row.length for row in rows})
    drawn = False
    context, figure, axes = drawing(3.4)
    floor = 1e-7
    for number, name in enumerate(dict.fromkeys(row.entry.name for row in rows)):
        mine = [row for row in rows if row.entry.name == name]
        found = [(row.length, pick(row), row) for row in mine]
        values = [(x, v) for x, v, _ in found if v is not None]
        if logarithmic:
            values = [(x, v) for x, v in values if isinstance(v, float) and v > floor]
        if not values:
            continue
        drawn = True
        colour, marker = styles[mine[0].entry.key]
        xs = [x * 2 ** (0.02 * (number % 5 - 2)) for x, _ in values]
        ys = [v.middle if isinstance(v, Spread) else v for _, v in values]
        spread = None
        if all(isinstance(v, Spread) for _, v in values):
            both = [v for _, v in values if isinstance(v, Spread)]
            spread = [[v.middle - v.low for v in both], [v.high - v.middle for v in both]]
        axes.errorbar(
            xs, ys, yerr=spread, color=colour, marker=marker, markersize=7,
            markeredgecolor="white", linewidth=1.6, elinewidth=1, capsize=2.5,
            alpha=0.55 + 0.45 * (not styles.many),
        )  # fmt: skip
        if styles.many and ys:
            axes.annotate(
                _budget(mine[-1]), (xs[-1], ys[-1]), textcoords="offset points", xytext=(7, -3),
                fontsize=8, color=INK,
            )  # fmt: skip
    if not drawn:
        context.__exit__(None, None, None)
        return None
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] / 2**0.35, lengths[-1] * 2**0.35)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
    if line is not None:
        axes.axhline(line, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=11, loc="left")
    return as_svg(context, figure, f"curve-{kind}", f"{title} over length")


_PARTS = (
    ("rest of the model", "#c9d1da", ""),
    ("attention", "#0072B2", ""),
    ("layouts", "#D55E00", "////"),
)


def split(rows: list[Row], length: int) -> str | None:
    """Where the time of a prefill goes, dense = 100%, with the ideal marked."""
    shown = [
        r
        for r in rows
        if r.length == length and r.prefill and r.attention_seconds and r.dense_attention_seconds
    ]
    if not shown:
        return None
    names, parts, ideals = ["dense"], [], [None]
    first = shown[0]
    assert first.dense_prefill_seconds and first.dense_attention_seconds
    share = first.dense_attention_seconds / first.dense_prefill_seconds
    parts.append((100 * (1 - share), 100 * share, 0.0))
    for row in shown:
        assert row.dense_prefill_seconds and row.prefill_seconds and row.attention_seconds
        whole, build = row.dense_prefill_seconds, row.build_seconds or 0.0
        rest = row.prefill_seconds - row.attention_seconds - build
        names.append(row.entry.name)
        parts.append((100 * rest / whole, 100 * row.attention_seconds / whole, 100 * build / whole))
        ideals.append(100 / row.ideal_prefill if row.ideal_prefill else None)  # type: ignore[arg-type]
    context, figure, axes = drawing(1.5 + 0.42 * len(names))
    left = [0.0] * len(names)
    for i, (label, colour, hatch) in enumerate(_PARTS):
        widths = [p[i] for p in parts]
        axes.barh(
            range(len(names)), widths, left=left, color=colour, hatch=hatch, edgecolor="white",
            height=0.62, label=label,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, widths)]
    marks = [(ideal, i) for i, ideal in enumerate(ideals) if ideal is not None]
    if marks:
        axes.scatter(
            [m[0] for m in marks], [m[1] for m in marks], marker="|", s=260, color="black",
            linewidths=2.2, label="ideal", zorder=4,
        )  # fmt: skip
    axes.axvline(100, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max(104.0, 1.04 * max(left)))
    axes.set_yticks(range(len(names)), [_wrapped(n) for n in names], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of a prefill, % of dense's (lower is better)")
    axes.set_title(f"{length:,} tokens", fontsize=11, loc="left")
    _legend(axes, 4)
    return as_svg(context, figure, f"split{length}", f"Where the time goes at {length} tokens")


def pattern(picture: dict[str, Any]) -> str:
    """A PNG data URI of which pairs attend: white none, dark blue all; grey can't by causality."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.image import imsave

    shares = np.frombuffer(base64.b64decode(picture["shares"]), dtype=np.uint8)
    grid = shares.reshape(picture["rows"], picture["cols"]) / 255
    colours = LinearSegmentedColormap.from_list(
        "reads", ["#ffffff", "#9cc8e3", "#0072B2", "#03304b"]
    )
    pixels = colours(np.sqrt(grid))
    if picture.get("causal", True):
        later = np.triu(np.ones_like(grid, dtype=bool), 1) & (grid == 0)
        pixels[later] = (0.91, 0.92, 0.93, 1)
    out = io.BytesIO()
    imsave(out, np.repeat(np.repeat(pixels, 3, 0), 3, 1), format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


# Unit shapes for the legend, in a box of 20 by 20; the figures' markers.
_SHAPES = {
    "o": '<circle cx="10" cy="10" r="6"/>',
    "s": '<rect x="4.5" y="4.5" width="11" height="11"/>',
    "^": '<path d="M10 3.5 16.5 15.5H3.5Z"/>',
    "D": '<path d="M10 3 17 10 10 17 3 10Z"/>',
    "v": '<path d="M10 16.5 3.5 4.5h13Z"/>',
    "P": '<path d="M7.5 3h5v4.500h4.500v5h-4.500v4.500h-5v-4.500H3v-5h4.500Z"/>',
    "X": '<path d="M6 3 10 7 14 3 17 6 13 10 17 14 14 17 10 13 6 17 3 14 7 10 3 6Z"/>',
    "h": '<path d="M10 3 16 6.500V13.500L10 17 4 13.500V6.500Z"/>',
    "*": '<path d="M10 2 12 7.800 18 7.900 13.200 11.600 14.900 17.500 10 14 5.100 17.500 '
    '6.800 11.600 2 7.900 8 7.800Z"/>',
}


def legend(rows: list[Row], styles: Styles, *, dense: bool) -> str:
    """The methods' markers with their names, once for several figures, as HTML."""
    shown: dict[str, tuple[str, str]] = {"dense": ("#000000", "*")} if dense else {}
    for row in rows:
        shown[row.entry.key if styles.many else row.entry.name] = styles[row.entry.key]
    items = "".join(
        f'<li><svg viewBox="0 0 20 20" width="15" height="15" aria-hidden="true" fill="{colour}">'
        f"{_SHAPES[marker]}</svg>{escape(name)}</li>"
        for name, (colour, marker) in shown.items()
    )
    return f'<ul class="legend">{items}</ul>\n'


def _budget(row: Row) -> str:
    inside = row.entry.name.partition("(")[2].removesuffix(")")
    return inside.partition(",")[0].partition("=")[2] or "default"


def _wrapped(name: str) -> str:
    key, mark, rest = name.partition("(")
    return f"{key}\n({rest}" if mark and len(name) > 20 else name
