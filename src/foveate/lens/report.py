"""report.html: the heads of a model on one page that needs no network."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from typing import Any

from foveate.lens.figures import chosen, heat, lines, square, thumbnail
from foveate.runs.text import DATA

# No script, no request: the page may only use what is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
Maps = dict[tuple[int, int], Any]


def page(facts: dict[str, Any], maps: Maps) -> str:
    """The report as HTML.

    Args:
        facts: as the job returns them.
        maps: by window and layer, the pooled maps of its heads.
    """
    css = (DATA / "report.css").read_text(encoding="utf-8")
    title = f"Attention in {facts['model']}"
    parts = [
        _head(facts, title), _answer(facts), _sinks(facts), _states(facts), _heads(facts),
        _layers(facts), _patterns(facts), _maps(facts, maps), _words(facts), _environment(facts),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}"
        ".maps{display:grid;gap:3px;overflow-x:auto}.maps img{width:100%;display:block;"
        "image-rendering:pixelated;min-width:34px}.maps span{font-size:.72rem;color:var(--soft);"
        "align-self:center;text-align:center}\n"
        f"</style></head>\n<body><main>\n{''.join(parts)}</main></body></html>\n"
    )


def sentence(facts: dict[str, Any]) -> str:
    """What was found, in one sentence."""
    made, rates = facts["suggestion"], facts["segments"]["rates"]
    said = ""
    if rates:
        said = f"The first token is a sink for {100 * rates['0.3'][0]:.0f}% of the heads; "
    said += (
        f"at {100 * made['cost']:.0f}% of dense attention's tiles, a pattern for each head changes "
        f"the model by {made['harm']:.3g} of its residual stream"
    )
    if made["uniform"] is not None:
        said += (
            f", the best pattern for all alike, {made['uniform']}, by {made['uniform_harm']:.3g} "
            f"at {100 * made['uniform_cost']:.0f}%"
        )
    return said + "."


def _head(facts: dict[str, Any], title: str) -> str:
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"<header><h1>{escape(title)}</h1>\n"
        f'<p class="soft">{len(facts["layers"])} layers of {facts["heads"]} heads on '
        f"{facts['windows']} × {facts['length']:,} tokens of {escape(facts['text'])}. Written "
        f"{day} by foveate {escape(facts['environment']['foveate'])}.</p></header>\n"
    )


def _answer(facts: dict[str, Any]) -> str:
    made = facts["suggestion"]
    return (
        f'<section class="answer" id="answer"><p><b>{escape(sentence(facts))}</b></p>\n'
        f"<pre><code>{escape(made['compare'])}\n{escape(made['use'])}</code></pre>\n"
        '<p class="soft">The suggestion is an estimate, each head on its own; compare measures '
        "it.</p></section>\n"
    )


def _sinks(facts: dict[str, Any]) -> str:
    found = facts["segments"]
    rows = "".join(
        f"<tr><td>{eps}</td>" + "".join(f"<td>{100 * rate:.2f}%</td>" for rate in rates) + "</tr>"
        for eps, rates in found["rates"].items()
    )
    table = (
        '<div class="scroll"><table><thead><tr><th>above</th><th>first token</th>'
        f"<th>second token</th></tr></thead><tbody>{rows}</tbody></table></div>\n"
    )
    figures = facts["figures"]
    drawn = [
        heat(figures["importance"], "importance", "Importance of the first token", high=1.0),
        heat(figures["no_op"], "no-op", "Output that isn't the sink's", high=1.0),
    ]
    return (
        '<h2 id="sinks">Sinks</h2>\n'
        f"<p>The share of heads whose first token has an importance (mean weight from the queries "
        f"that see it) above a threshold, on {found['count']} segments of {found['length']} "
        f"tokens:</p>\n{table}" + _grid(drawn)
    )


def _states(facts: dict[str, Any]) -> str:
    states = {n: s for n, s in facts["states"].items() if s}
    if not states:
        return ""
    massive = [n for n, s in states.items() if s["massive"]]
    said = (
        f"Layers {massive[0]} to {massive[-1]} are given massive activations (over 100 and over "
        "1000 times the median), at tokens "
        + ", ".join(str(t) for t in states[massive[0]]["tokens"])
        + " and channels "
        + ", ".join(str(c) for c in states[massive[0]]["channels"])
        + "."
        if massive
        else "No layer is given massive activations (over 100 and over 1000 times the median)."
    )
    drain = facts["figures"]["drain"]
    drawn = [
        lines(
            "states", "Hidden states that go into each layer", "magnitude",
            {"largest": {n: s["largest"] for n, s in states.items()},
             "largest elsewhere": {n: s["elsewhere"] for n, s in states.items()},
             "median": {n: s["median"] for n, s in states.items()}}, log=True,
        ),
        lines(
            "norms", "The first token against the others", "ratio",
            {"residual norm / mean": {n: s["peak"] for n, s in states.items()},
             "value norm / median": {n: sum(v) / len(v) for n, v in drain.items()}}, log=True,
        ),
        lines(
            "bits", "Error of quantised hidden states", "of their root mean square",
            {"8 bits": {n: s["int8"] for n, s in states.items()},
             "4 bits": {n: s["int4"] for n, s in states.items()}}, log=True,
        ),
    ]  # fmt: skip
    return (
        f'<h2 id="states">Hidden states and values</h2>\n<p>{said} Quantised with one scale for a '
        f"layer's whole tensor.</p>\n" + _grid(drawn)
    )


def _heads(facts: dict[str, Any]) -> str:
    figures, near = facts["figures"], facts["near"]
    drawn = [
        heat(figures["spread"], "spread", "Entropy, of uniform attention's", high=1.0),
        heat(figures["near"], "near", f"Mass on keys up to {near} tokens away", high=1.0),
        heat(figures["distance"], "distance", "Mean distance, tokens"),
        heat(facts["density"]["0.95"], "density", "Keys needed for 95% of the mass", high=1.0),
        heat(figures["output_rank"], "rank", "Effective rank of the output"),
        heat(figures["map_rank"], "map-rank", "Effective rank of sampled rows of the map"),
    ]
    return '<h2 id="heads">Heads</h2>\n' + _grid(drawn)


def _layers(facts: dict[str, Any]) -> str:
    both = facts["similarity"]
    drawn = [
        square(both["maps"], facts["layers"], "alike", "Cosine of two layers' maps"),
        square(both["apart"], facts["layers"], "apart", "The same without the first token"),
    ]
    return (
        '<h2 id="layers">Layers that look alike</h2>\n<p>Cosine of rows of attention, mean over '
        "heads and sampled queries. A common sink makes all layers look alike; the second picture "
        "leaves it out.</p>\n" + _grid(drawn)
    )


def _patterns(facts: dict[str, Any]) -> str:
    made = facts["suggestion"]
    rows = "".join(
        f'<tr><td class="text"><code>{escape(name)}</code></td><td>{100 * one["cost"]:.1f}%</td>'
        f"<td>{one['harm']:.4g}</td></tr>"
        for name, one in sorted(facts["candidates"].items(), key=lambda item: item[1]["cost"])
    )
    rows += (
        '<tr class="chosen"><td class="text"><code>by-head</code>, as suggested</td>'
        f"<td>{100 * made['cost']:.1f}%</td><td>{made['harm']:.4g}</td></tr>"
    )
    drawn = [
        chosen(made["heads"], "chosen", "Suggested, within the budget of all heads"),
        chosen(facts["fits"], "fits", "Best for each head alone at that cost"),
    ]
    return (
        '<h2 id="patterns">Patterns</h2>\n<p>Each candidate for all heads alike: tiles visited, of '
        "dense attention's, and harm: the squared change of a head's contribution to the residual "
        "stream, relative to the stream, added over heads. The suggestion has the least harm at "
        f"{100 * facts['budget']:.0f}% of the tiles.</p>\n"
        '<div class="scroll"><table><thead><tr><th class="text">pattern</th><th>tiles</th>'
        f"<th>harm</th></tr></thead><tbody>{rows}</tbody></table></div>\n" + _grid(drawn)
    )


def _maps(facts: dict[str, Any], maps: Maps) -> str:
    if not any(maps.values()):
        return ""
    columns = facts["heads"] + 1
    cells = ["<span></span>", *(f"<span>{h}</span>" for h in range(facts["heads"]))]
    for (_, layer), one in sorted(maps.items()):
        cells.append(f"<span>{layer}</span>")
        for head, data in enumerate(one["heads"]):
            name = f"layer {layer}, head {head}"
            cells.append(f'<img alt="{name}" title="{name}" src="{thumbnail(data, one["cells"])}">')
    return (
        '<h2 id="maps">Maps</h2>\n<p>Every head: queries from top to bottom, keys from left to '
        "right, weight on a logarithmic scale; a row for each layer.</p>\n"
        f'<div class="maps" style="grid-template-columns:2rem repeat({columns - 1},1fr)">'
        f"{''.join(cells)}</div>\n"
    )


def _words(facts: dict[str, Any]) -> str:
    words = {
        "importance": "mean weight that a key gets from the queries that see it (alpha)",
        "no-op": "norm of a head's output without the sink's part, over the whole norm: 0 is a "
        "head that does nothing but attend to the sink",
        "entropy": "of a query's weights over the log of the number of keys that it sees",
        "density": "share of a query's keys that hold 95% of its mass, on sampled queries",
        "effective rank": "the exponential of the entropy of the normalised singular values",
        "harm": "mean over tokens of the squared change that a head makes to the residual stream, "
        "over the stream's squared norm",
    }
    inside = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in words.items())
    return f'<h2 id="words">Words</h2>\n<dl>{inside}</dl>\n'


def _environment(facts: dict[str, Any]) -> str:
    inside = "".join(
        f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>"
        for k, v in facts["environment"].items()
    )
    return f'<h2 id="environment">Environment</h2>\n<dl>{inside}</dl>\n'


def _grid(drawn: list[str]) -> str:
    return (
        '<div class="grid">'
        + "".join(f'<figure class="drawn">{svg}</figure>\n' for svg in drawn)
        + "</div>\n"
    )
