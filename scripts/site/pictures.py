"""Which pairs of tokens a method visits, as a small PNG; made from its layout, never by hand."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate import Context, Layout, causal, window
from foveate.catalog import Row
from foveate.methods import make
from foveate.ops.errors import InputError
from foveate.parts import Attention, AttentionRecipe, Heads, Pattern

# Budgets small enough that what is left out shows at these lengths; a method that isn't here is
# drawn at its defaults. Grids are row by row, (rows, columns) or (frames, rows, columns).
SPECS = {
    "sink-window": "sink-window(sinks=16, window=96)",
    "a-shape": "a-shape(sinks=64, local=96)",
    "tri-shape": "tri-shape(sinks=48, local=80, bottom=64)",
    "vertical-slash": "vertical-slash(verticals=24, slashes=50, forced_slashes=50)",
    "block-sparse": "block-sparse(blocks=3, tile=32)",
    "fna": "fna(window=7)",
    "gna": "gna(window=8, stride=4)",
    "grid": "grid(stride=48)",
    "q-boundary": "q-boundary(patterns=['a-shape(sinks=32, local=64)', 'grid(stride=24)'])",
    "2d-boundary": "2d-boundary(patterns=[['a-shape(sinks=32, local=64)'], "
    "['a-shape(sinks=16, local=16)', 'grid(stride=24)']])",
    "dhsa": "dhsa(budget=96, block=32, local=32, sinks=8, instruction=24, chunk=32)",
    "flux": "flux(sinks=16, local=64, block=32, route='sparse')",
    "moba": "moba(block=32, topk=3)",
    "biformer": "biformer(topk=2, regions=4)",
    "vmoba": "vmoba(frames=1, tile=(4, 4), box=(2, 4, 4))",
    "rectified-spaattn": "rectified-spaattn(block=32, drop=0.7)",
    "sea": "sea(k=24, width=64, max_length=512)",
}
GRIDS = {
    "fna": (16, 16),
    "gna": (16, 16),
    "biformer": (16, 16),
    "vmoba": (8, 8, 8),
    "rectified-spaattn": (8, 8, 8),
}
VISION = slice(96, 384)  # of the tokens where a method looks at their kind
LENGTH, CELLS, SIZE = 512, 128, 16
SEEN, ALLOWED, HIDDEN = (57, 73, 171), (222, 225, 240), (255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A drawing of one head, and the words under it.

    Attributes:
        png: the file's bytes.
        caption: what was drawn: the call, the tokens, and the share of pairs.
    """

    png: bytes
    caption: str


def draw(row: Row) -> Picture | None:
    """The picture of a row of the catalog; None for a method that lists no pairs."""
    spec, grid = SPECS.get(row.key, row.key), GRIDS.get(row.key)
    length = LENGTH if grid is None else int(torch.tensor(grid).prod())
    mask = causal() if grid is None else window(-1, -1)
    kinds = torch.zeros(length, dtype=torch.int64)
    kinds[VISION] = 1
    try:
        layout = _layout(
            spec, Context(mask=None if grid else mask, grid=grid, modality=kinds), length
        )
    except InputError:  # it must be fitted, or runs on something else than q, k and v
        return None
    whole = mask.layout(length, length)
    if layout is None or (layout.pairs >= whole.pairs and row.miniature):  # nothing to see
        return None
    shares, allowed = (one.picture(CELLS).clamp(0, 1) for one in (layout, whole))
    of = f"a grid of {'×'.join(map(str, grid))} tokens" if grid else f"{length} tokens"
    heads = float(layout.pairs_by_group()[0, 0])
    caption = (
        f"`{spec}` on {of}: queries from top to bottom, keys from left to right. "
        f"It visits {heads / whole.pairs:.0%} of the pairs that the mask allows."
    )
    return Picture(png(shares, allowed), caption)


def _layout(spec: str, ctx: Context, length: int) -> Layout | None:
    """What the method lists, or tells of, for made tokens."""
    method = make(spec)
    q, k, v = tokens(length)
    if isinstance(method, Pattern):
        return method.layout(q, k, v, ctx)
    if isinstance(method, AttentionRecipe):
        method = method.build(Heads(SIZE, 1, 1, SIZE, SIZE))
    if not isinstance(method, Attention):  # it doesn't run on q, k and v
        return None
    told: list[Any] = []
    ctx.stats = lambda **facts: told.append(facts["layout"])
    with torch.no_grad():
        method(q, k, v, ctx)
    layouts = [one for one in told if isinstance(one, Layout)]
    return layouts[-1] if layouts else None


def tokens(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, length, SIZE) of a text with topics that come back, and a sink in front."""
    made = torch.Generator().manual_seed(7)
    topics = torch.randn(5, SIZE, generator=made)
    ends = (0.12, 0.3, 0.38, 0.6, 0.78, 0.9, 1.0)
    order = (0, 1, 2, 0, 3, 1, 4)
    place = (torch.arange(length) + 0.5) / length
    topic = topics[torch.tensor(order)[torch.bucketize(place, torch.tensor(ends))]]
    q, k, v = (topic + 0.6 * torch.randn(length, SIZE, generator=made) for _ in range(3))
    k[0] = 3 * q.mean(0) / q.mean(0).norm()
    return q[None, None], k[None, None], v[None, None]


def png(shares: Tensor, allowed: Tensor) -> bytes:
    """Shares of visited and of allowed pairs (rows, cols), 0 to 1, as a picture's bytes."""
    seen, pale, hidden = (torch.tensor(c, dtype=torch.float32) for c in (SEEN, ALLOWED, HIDDEN))
    ground = torch.lerp(hidden, pale, allowed[..., None])
    colours = torch.lerp(ground, seen.expand_as(ground), shares[..., None])
    rows, cols = shares.shape
    flat = bytes(colours.round().to(torch.uint8).flatten().tolist())
    image = Image.frombytes("RGB", (cols, rows), flat)
    factor = max(1, 384 // max(rows, cols))
    out = io.BytesIO()
    image.resize((cols * factor, rows * factor), Image.Resampling.NEAREST).save(
        out, format="PNG", optimize=True
    )
    return out.getvalue()
