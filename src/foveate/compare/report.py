"""report.html: everything a run found, in one file that needs no network, and table.md."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.compare import words
from foveate.compare.figures import CURVES, Styles, curve, legend, pareto, pattern, split
from foveate.compare.summary import Row
from foveate.compare.table import COLUMNS, cells, columns_for, markdown
from foveate.runs.text import DATA

if TYPE_CHECKING:
    from foveate.compare.run import Result

# No script, no request: the page may only use what is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TEXT = ' class="text"'


def write(result: Result) -> dict[str, Path]:
    """Write table.md and report.html into the output folder; their paths by kind."""
    folder = result.job.options.folder
    notes = [
        result.recommendation.sentence,
        f"Limits: {result.recommendation.limits}.",
        *words.summary_lines(result),
    ]
    title = f"Attention for {result.job.info.name}"
    files = {"table": folder / "table.md", "report": folder / "report.html"}
    _replace(files["table"], markdown(result.rows, title, notes))
    _replace(files["report"], page(result, title))
    return files


def page(result: Result, title: str) -> str:
    """The report as HTML."""
    styles = Styles(result.rows)
    css = (DATA / "report.css").read_text(encoding="utf-8")
    parts = [
        _head(result, title),
        _answer(result),
        _table(result),
        _pareto(result, styles),
        _curves(result, styles),
        _times(result),
        _patterns(result),
        _methods(result),
        _taken(result),
        _environment(result),
        _raw(result),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style></head>\n"
        f"<body><main>\n{''.join(parts)}</main></body></html>\n"
    )


def _head(result: Result, title: str) -> str:
    run, where = result.plan.fingerprint, result.environment
    lengths = ", ".join(f"{n:,}" for n in result.plan.lengths)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"<header><h1>{escape(title)}</h1>\n"
        f'<p class="soft">{len(result.plan.entries)} methods against dense attention, at {lengths} '
        f"tokens of {escape(run['text'])}. {escape(where.get('gpu', where['processor']))}, "
        f"{words.threads(run['threads'])}, {run['dtype']}. Written {day} by foveate "
        f"{escape(where['foveate'])}.</p></header>\n"
    )


def _answer(result: Result) -> str:
    answer = result.recommendation
    return (
        f'<section class="answer" id="answer"><p><b>{escape(answer.sentence)}</b></p>\n'
        f"<pre><code>{escape(answer.code)}</code></pre>\n"
        f'<p class="soft">The rule: the fastest method in prefill with {escape(answer.limits)}; '
        "otherwise dense.</p></section>\n"
    )


def _table(result: Result) -> str:
    return (
        '<h2 id="table">What was measured</h2>\n'
        f"<p>Every figure is against dense, transformers' own {words.dense_name(result)} "
        "attention, on the same prompts in the same run. Speeds are ratios of paired passes: the "
        "median, and in parentheses the smallest and the largest. The shaded row is the choice at "
        "its length.</p>\n" + _html_table(result.rows, columns_for(result.rows, full=False), result)
    )


def _html_table(rows: list[Row], names: list[str], result: Result) -> str:
    chosen = {(v.length, v.use) for v in result.recommendation.verdicts}
    names = [name for name in names if name != "length"]
    head = "".join(
        f'<th scope="col"{_class(name)} title="{escape(COLUMNS[name].meaning)}">'
        f"{escape(COLUMNS[name].heading)}</th>"
        for name in names
    )
    body, last = [], None
    for row in rows:
        if row.length != last:
            last = row.length
            body.append(
                f'<tr class="group"><th colspan="{len(names)}" scope="rowgroup">'
                f"<span>{row.length:,} tokens</span></th></tr>"
            )
        picked = (row.length, row.entry.name) in chosen
        kinds = " ".join(k for k, on in (("chosen", picked), ("failed", not row.passed)) if on)
        texts = []
        for name, value in zip(names, cells(row, names)):
            shown = escape(value)
            first, _, more = shown.partition("(" if name == "method" else " (")
            if name == "method":
                shown = f"<code>{first}</code>" + (" (chosen)" if picked else "")
                shown += f'<span class="more"><code>{more.removesuffix(")")}</code></span>' * bool(
                    more
                )
            elif more:
                shown = f'{first}<span class="more">({more}</span>'
            texts.append(f"<td{_class(name)}>{shown}</td>")
        body.append(f'<tr class="{kinds}">{"".join(texts)}</tr>')
    failed = "".join(
        f"<p>{escape(row.entry.name)} at {row.length:,} tokens has no speed: "
        f"{escape(row.said)}.</p>"
        for row in rows
        if not row.passed
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>\n{failed}"
    )


def _class(name: str) -> str:
    return {"method": ' class="method"', "check": TEXT}.get(name, "")


def _figures(pictures: list[tuple[str, str]]) -> str:
    inside = "".join(
        f'<figure class="drawn">{svg}<figcaption>{escape(caption)}</figcaption></figure>\n'
        for svg, caption in pictures
    )
    return f'<div class="grid">{inside}</div>\n'


def _pareto(result: Result, styles: Styles) -> str:
    limit = result.job.options.max_ppl_loss
    drawn = [
        (svg, "Up and to the left is better. Bars span the paired passes.")
        for length in result.plan.lengths
        if (svg := pareto(result.rows, styles, length, limit))
    ]
    if not drawn:
        return ""
    return (
        '<h2 id="pareto">Speed against quality</h2>\n'
        "<p>Each method at its budget; the line joins those that none beats in both. The tinted "
        "area holds what the quality limit and dense's speed leave.</p>\n"
        + legend(result.rows, styles, dense=True)
        + _figures(drawn)
    )


def _curves(result: Result, styles: Styles) -> str:
    captions = {
        "prefill": "The whole model's forward over the prompt; layouts included.",
        "decode": "Seconds per generated token, from the cache that the prefill filled.",
        "kl": "Mean over the scored tokens; methods that equal dense have none to draw.",
        "loss": "On the same tokens as dense.",
        "cosine": "Over all positions.",
        "realised": "100% is dense's attention time times the visited tile area.",
    }
    drawn = [(svg, captions[kind]) for kind in CURVES if (svg := curve(result.rows, styles, kind))]
    if not drawn:
        return ""
    key = legend(result.rows, styles, dense=False)
    return f'<h2 id="curves">Over the length</h2>\n{key}{_figures(drawn)}'


def _times(result: Result) -> str:
    drawn = [
        (svg, "The black bar is where the method would be at dense's speed per visited tile.")
        for length in result.plan.lengths
        if (svg := split(result.rows, length))
    ]
    if not drawn:
        return ""
    return (
        '<h2 id="time">Where the time goes</h2>\n<p>Medians of the passes. What is not attention '
        "can't become faster, so it bounds the gain at these lengths.</p>\n" + _figures(drawn)
    )


def _patterns(result: Result) -> str:
    longest = result.plan.lengths[-1]
    causal = result.job.info.kind == "causal-lm"
    shown = []
    for row in result.rows:
        if row.length != longest or row.picture is None:
            continue
        found = row.picture
        who = "all heads" if found["shared"] else f"head {found['head']} (the median one)"
        text = (
            f"<b>{escape(row.entry.name)}</b><br>layer {found['layer']}, {who}; attends to "
            f"{100 * found['density']:.1f}% of all pairs"
        )
        shown.append(
            f'<figure class="drawn"><img alt="Which keys each query of {escape(row.entry.name)} '
            f'attends to" src="{pattern(found | {"causal": causal})}">'
            f"<figcaption>{text}</figcaption></figure>\n"
        )
    if not shown:
        return ""
    later = " Grey keys come after their query." if causal else ""
    return (
        '<h2 id="patterns">What they attended to</h2>\n'
        f"<p>On this very text, at {longest:,} tokens: queries downwards, keys to the right, the "
        f"first token at the top left. Darker cells hold more attended pairs.{later}</p>\n"
        f'<div class="pictures">{"".join(shown)}</div>\n'
    )


def _methods(result: Result) -> str:
    items = "".join(
        f"<dt><code>{escape(entry.name)}</code></dt><dd>{escape(text)}</dd>"
        for entry, text in words.entries(result)
    )
    return (
        '<h2 id="methods">What each method always keeps</h2>\n'
        "<p>Trained models put much of their attention on the first tokens and on the nearest; a "
        "method that reserves these is helped by it, so it's told here.</p>\n"
        f"<dl>{items}</dl>\n"
    )


def _taken(result: Result) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in words.how_taken(result))
    names = columns_for(result.rows, full=True)
    legend = "".join(
        f"<dt>{escape(column.heading)}</dt><dd>{escape(column.meaning.replace('`', ''))}</dd>"
        for column in (COLUMNS[name] for name in names)
    )
    return f'<h2 id="taken">How each number was taken</h2>\n<ul>{items}</ul>\n<dl>{legend}</dl>\n'


def _environment(result: Result) -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in words.environment_lines(result)
    )
    return f'<h2 id="environment">Environment</h2>\n<dl>{items}</dl>\n'


def _raw(result: Result) -> str:
    names = columns_for(result.rows, full=True)
    head = (
        "tokens", "method", "pass", "dense was", "dense prefill s", "prefill s", "ratio",
        "dense attention s", "attention s", "layouts s", "dense decode ms", "decode ms",
        "peak MB", "load", "answer", "dense's answer", "key",
    )  # fmt: skip
    rows = []
    for record in result.raw:
        cell, v = record["cell"], record["values"]
        needle = v.get("needle") or {}
        trusted = any(
            r.passed and r.length == cell["length"] and r.entry.name == cell["method"]
            for r in result.rows
        )
        texts = [f"{cell['length']:,}", cell["method"], cell["pass"] + 1, v.get("dense_came", "")]
        speeds: list[Any] = [
            _number(v.get("dense_seconds"), 3),
            _number(v.get("seconds"), 3),
            _number(v["dense_seconds"] / v["seconds"], 3) if v.get("seconds") else "",
            _number(v.get("dense_attention_seconds"), 3),
            _number(v.get("attention_seconds"), 3),
            _number(v.get("build_seconds"), 4),
            _number(v.get("dense_decode_seconds"), 1, 1e3),
            _number(v.get("decode_seconds"), 1, 1e3),
        ]
        texts += speeds if trusted else ["–"] * len(speeds)
        texts += [
            _number(v.get("peak_bytes"), 0, 1e-6),
            _number(v.get("load"), 2),
            *(" | ".join(needle.get(name, [])) for name in ("answers", "dense_answers", "keys")),
        ]
        rows.append(
            "<tr>"
            + "".join(
                f"<td{TEXT if i in (1, 14, 15) else ''}>{escape(str(t))}</td>"
                for i, t in enumerate(texts)
            )
            + "</tr>"
        )
    heading = "".join(f"<th>{escape(h)}</th>" for h in head)
    return (
        '<h2 id="raw">Raw figures</h2>\n<p>All columns of the table, and every pass; both are also '
        "in results.jsonl and table.md beside this file.</p>\n"
        + _html_table(result.rows, names, result)
        + f'<details class="screen"><summary>Every pass ({len(rows)})</summary>'
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heading}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>\n"
    )


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
