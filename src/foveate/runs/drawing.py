"""Figures of reports: one look for all, as inline SVG that needs no network."""

from __future__ import annotations

import io
import re
from typing import Any

from foveate.ops.errors import MissingPackageError

INK = "#1c2430"
SOFT = "#66707d"
GRID = "#e4e7eb"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
WIDTH = 5.4


def drawing(height: float) -> tuple[Any, Any, Any]:
    """A context (left by `as_svg`, or by its `__exit__`), a figure of this height, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    options = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": SOFT,
        "axes.linewidth": 0.8,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    context = matplotlib.rc_context(options)
    context.__enter__()
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return context, figure, axes


def as_svg(context: Any, figure: Any, name: str, title: str) -> str:
    """Inline SVG that fills the width it's given; ids are unique to the figure."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    context.__exit__(None, None, None)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = text.replace("'DejaVu Sans'", FONT).replace("DejaVu Sans", FONT)
    return text.replace("<svg ", f'<svg class="plot" role="img" aria-label="{title}" ', 1)


def need_matplotlib() -> None:
    """Say how to get what the figures need, before anything is measured.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("The report needs matplotlib: pip install 'foveate[report]'")
