"""Pictures of what a pooler looks at: the words of each text, shaded by their weights."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from foveate.ops.errors import InputError

_STYLE = """
body{font:15px/1.9 system-ui,sans-serif;margin:2em;max-width:70em;color:#111;background:#fff}
p{margin:.1em 0} h2{font-size:1em;margin:1.4em 0 .2em} small{display:inline-block;width:4.5em}
span{padding:.15em .25em;border-radius:.2em}
"""


def word_picture(
    words: Sequence[Sequence[str]], weights: Tensor, titles: Sequence[str] | None = None
) -> str:
    """A page of HTML, complete by itself: for each text the mean over heads, then each head.

    A word's shade is its weight, the largest of its line being the darkest; its weight in numbers
    stands in its tooltip.

    Args:
        words: of each text; the first tokens of its row, such as those without padding behind them.
        weights: (B, m, L), a pooler's, L being the most words or more.
        titles: a line above each text, such as its label.

    Raises:
        InputError: the numbers of texts don't agree, or a text has more words than weights.
    """
    if weights.dim() != 3 or len(words) != len(weights):
        raise InputError(
            f"word_picture: {len(words)} texts, but weights are {tuple(weights.shape)}; expected "
            "(texts, heads, words)."
        )
    if titles is not None and len(titles) != len(words):
        raise InputError(f"word_picture: {len(titles)} titles for {len(words)} texts.")
    parts = []
    for at, text in enumerate(words):
        if len(text) > weights.shape[2]:
            raise InputError(
                f"word_picture: text {at} has {len(text)} words, but {weights.shape[2]} weights."
            )
        parts.append(f"<h2>{escape(titles[at] if titles is not None else f'Text {at + 1}')}</h2>")
        rows = weights[at, :, : len(text)].detach().double().cpu()
        lines = {"mean": rows.mean(0)} | {f"head {i + 1}": row for i, row in enumerate(rows)}
        for name, row in lines.items():
            shades = row / row.max().clamp(min=1e-30) if len(text) else row
            shown = " ".join(
                f'<span title="{w:.3f}" style="background:rgba(61,90,152,{s:.2f})'
                f'{";color:#fff" if s > 0.6 else ""}">{escape(word)}</span>'
                for word, w, s in zip(text, row.tolist(), shades.tolist())
            )
            parts.append(f"<p><small>{name}</small>{shown}</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>What the heads look at</title>'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )
