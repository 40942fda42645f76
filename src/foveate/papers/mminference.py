"""MMInference: grids found in the input, boundaries between modalities, and the search per head.

Recall is the part of dense attention's mass that a pattern keeps, mean over rows; budgets are
matched on the exact mask's pairs. Data are planted heads of 2,048 tokens (d = 64):

- **grid** (A): q = N(0, 1) + 6 u, k[p::s] += 6 u for a unit u, s in 8 ... 24. A grid whose stride
  and phase are found, against vertical-slash, an A-shape, and the best columns there are (an oracle
  that sees all of dense attention).
- **mixed** (B): four segments of 400 vision tokens between texts of random length, the prompt ends
  in 80 of text. Vision queries like grid keys, counted in vision tokens; text queries like 20 text
  and 10 vision keys. Q- and 2D-Boundary, against vertical-slash and a grid on the whole sequence
  (the grid takes the pairs that its stride makes, fewer than the others).
- **search** (C): 12 heads of 4 kinds, of 1,024 tokens; is each given its own pattern, and is the
  mean error below that of the best single pattern for all?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.methods.mminference import AShape, Grid, QBoundary, TwoDBoundary, VerticalSlash
from foveate.methods.mminference.problem import problems, problems_by_pair
from foveate.methods.mminference.search import search_head
from foveate.ops import causal
from foveate.ops.errors import FoveateError
from foveate.papers.harness import Found, Paper, Trial, at_least, at_most, ratio
from foveate.parts import Context

GRID, SLASH, A_SHAPE, COLUMNS = "grid", "vertical-slash", "A-shape", "best columns"
TWO_D, BY_QUERY, NO_SLASH, NO_GRID = (
    "2D-Boundary", "Q-Boundary", "no boundary, vertical-slash", "no boundary, grid",
)  # fmt: skip
SEARCH, SINGLE = "search", "best single pattern"
KINDS = {"local": "a-shape", "columns": "vertical-slash", "blocks": "block-sparse", "grid": "grid"}
BUDGETS = (
    "a-shape(sinks=64, local=256)",
    "vertical-slash(verticals=200, slashes=60, forced_slashes=50)",
    "block-sparse(blocks=4)",
    "grid(horizontal=False, max_stride=40)",
)
TARGET = (32, 128)


@torch.no_grad()
def run(trial: Trial) -> Found:
    """Run one part."""
    torch.manual_seed(trial.seed)
    cells = {"grid": planted_grid, "mixed": mixed_modalities, "search": searched}
    return cells[trial.cell](trial)


# -- what a mask keeps --------------------------------------------------------------------------
def mass(q: Tensor, k: Tensor) -> Tensor:
    """Dense causal attention of one head, (n, n)."""
    scores = q[0, 0] @ k[0, 0].T / q.shape[3] ** 0.5
    return scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf).softmax(-1)


def recall(weights: Tensor, mask: Tensor) -> float:
    """Mean over rows of the mass on the mask."""
    return float((weights * mask).sum(1).mean())


def matched(mask_of: Callable[[int], Tensor], most: int, pairs: int) -> Tensor:
    """The mask of the largest budget, up to `most`, that holds no more than so many pairs."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(mask_of(middle).sum()) <= pairs else (low, middle - 1)
    return mask_of(low)


def baselines(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> dict[str, Tensor]:
    """Masks of vertical-slash (the best of three splits of its budget) and A-shape.

    Both forced parts are those of the paper's search, 30 columns and 30 distances.
    """
    n, ctx = q.shape[2], Context(mask=causal())
    weights = mass(q, k)

    def slash(share: float) -> Tensor:
        def of(budget: int) -> Tensor:
            method = VerticalSlash(
                round(share * budget), budget - round(share * budget), forced_slashes=30
            )
            return method.index(q, k, ctx).token_mask(n)[0, 0]

        return matched(of, 2 * n, pairs)

    def a_shape(budget: int) -> Tensor:
        method = AShape(min(128, budget // 2), max(1, budget - min(128, budget // 2)))
        return method.layout(q, k, v, ctx).dense()[0, 0]

    splits = [slash(share) for share in (0.5, 0.8, 0.95)]
    best = max(splits, key=lambda mask: recall(weights, mask))
    return {SLASH: best, A_SHAPE: matched(a_shape, n, pairs)}


def _unit(dim: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(dim), dim=0)


# -- A ------------------------------------------------------------------------------------------
def planted_grid(trial: Trial) -> Found:
    """Recall at the pairs that the grid takes, and whether stride and phase are right."""
    n, dim = (512 if trial.quick else 2048), 64
    stride = int(torch.randint(8, 25, ()))
    phase, u = int(torch.randint(stride, ())), _unit(dim)
    q, k, v = torch.randn(3, 1, 1, n, dim)
    q = q + 6 * u
    k[:, :, phase::stride] += 6 * u
    ctx, weights = Context(mask=causal()), mass(q, k)
    method = Grid(max_stride=64, horizontal=False)
    found = method.find(problems(q, k, ctx, 64, "grid")[0])
    mask = method.layout(q, k, v, ctx).dense()[0, 0]
    pairs = int(mask.sum())
    others = baselines(q, k, v, pairs)
    # The best columns: those of the largest mass, as many as fit.
    order = weights.sum(0).argsort(descending=True)
    j = torch.arange(n)
    count = int((n - order).cumsum(0).le(pairs).sum())
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[:count]] = True
    others[COLUMNS] = chosen & (j <= j[:, None])
    right = (int(found.stride[0]), int(found.phase[0])) == (stride, phase)
    return {
        GRID: {"recall": recall(weights, mask), "found": float(right)},
        **{arm: {"recall": recall(weights, one)} for arm, one in others.items()},
    }


# -- B ------------------------------------------------------------------------------------------
def mixed_stream(segments: int, size: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """q, k, v, the modality of each token, and the grid's stride."""
    kinds: list[int] = []
    for _ in range(segments):
        kinds += [0] * int(torch.randint(40, 120, ())) + [1] * size
    modality = torch.tensor(kinds + [0] * 80)
    sight = modality == 1
    stride = int(torch.randint(8, 25, ()))
    phase = int(torch.randint(stride, ()))
    u, w = _unit(dim), _unit(dim)
    q, k, v = torch.randn(3, 1, 1, len(modality), dim)
    q[:, :, sight] += 6 * u
    q[:, :, ~sight] += 6 * w
    k[:, :, sight & ((sight.cumsum(0) - 1) % stride == phase)] += 6 * u
    for own, count in ((~sight, 20), (sight, 10)):
        at = own.nonzero()[:, 0]
        k[:, :, at[torch.randperm(len(at))[:count]]] += 6 * w
    return q, k, v, modality, stride


def mixed_modalities(trial: Trial) -> Found:
    """Recall of both boundaries, and of patterns without one at as many pairs."""
    size = 120 if trial.quick else 400
    q, k, v, modality, stride = mixed_stream(4, size, 64)
    weights = mass(q, k)
    plain, ctx = Context(mask=causal()), Context(mask=causal(), modality=modality)
    text = "vertical-slash(verticals=60, slashes=50, forced_slashes=30)"
    grid = "grid(horizontal=False, max_stride=64)"
    masks = {
        BY_QUERY: QBoundary((text, grid)).layout(q, k, v, ctx).dense()[0, 0],
        TWO_D: TwoDBoundary(((text, text), ("a-shape(sinks=0, local=1)", grid)))
        .layout(q, k, v, ctx).dense()[0, 0],
    }  # fmt: skip
    pairs = max(int(mask.sum()) for mask in masks.values())
    masks[NO_SLASH] = baselines(q, k, v, pairs)[SLASH]
    masks[NO_GRID] = Grid(max_stride=64, horizontal=False).layout(q, k, v, plain).dense()[0, 0]
    found: dict[str, dict[str, Any]] = {
        arm: {"recall": recall(weights, mask), "area": float(mask.sum() / weights.numel() * 2)}
        for arm, mask in masks.items()
    }
    own = {(a, b): p for a, b, p in problems_by_pair(q, k, ctx, 64, "2d")[0]}[1, 1]
    search = Grid(max_stride=64)
    found[TWO_D]["found"] = float(int(search.find(own).stride[0]) == stride)
    whole = problems(q, k, plain, 64, "grid")[0]
    found[NO_GRID]["found"] = float(int(search.find(whole).stride[0]) == stride)
    return found


# -- C ------------------------------------------------------------------------------------------
def bank(kind: str, n: int, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A planted head: neighbours, a few columns, blocks alike, or a grid."""
    q, k, v = torch.randn(3, 1, 1, n, dim)
    u = _unit(dim)
    if kind == "local":
        # Slow rotations of many planes: the score falls off with the distance.
        angle = torch.arange(n)[:, None] * torch.linspace(0.005, 0.1, dim // 2)
        wave = 3 * torch.cat((angle.cos(), angle.sin()), 1)
        return 0.3 * q + wave, 0.3 * k + wave, v
    if kind == "columns":
        k[:, :, torch.randperm(n)[: n // 16]] += 6 * u
        return q + 6 * u, k, v
    if kind == "grid":
        stride = int(torch.randint(12, 25, ()))
        k[:, :, int(torch.randint(stride, ())) :: stride] += 6 * u
        return q + 6 * u, k, v
    # Blocks of 64 tokens with one of 8 topics each: like attends to like.
    topics = torch.nn.functional.normalize(torch.randn(8, dim), dim=1)
    mine = topics[torch.randint(8, (n // 64,))].repeat_interleave(64, 0)
    theirs = topics[torch.randint(8, (n // 64,))].repeat_interleave(64, 0)
    return q + 6 * mine, k + 6 * theirs, v


def searched(trial: Trial) -> Found:
    """How many heads get their own kind, and the error beside the best single pattern's."""
    n, ctx = 1024, Context(mask=causal())
    kinds = list(KINDS) * (1 if trial.quick else 3)
    right, chosen, single = 0, [], dict.fromkeys(BUDGETS, 0.0)
    for number, kind in enumerate(kinds):
        trial.tell(number / len(kinds), f"head {number}")
        found = search_head(*bank(kind, n), ctx, BUDGETS, TARGET)
        if any(t.area > 1.02 * found.target for own in found.trials.values() for t in own):
            raise FoveateError("mminference: a candidate costs more than the budget; report this.")
        best = found.best
        right += best.pattern.startswith(KINDS[kind])
        chosen.append(best.error)
        for text in BUDGETS:
            tried = found.trials.get(text)
            single[text] += math.inf if tried is None else tried[0].error
    return {
        SEARCH: {"right of 12": right * 12 / len(kinds), "error": sum(chosen) / len(chosen)},
        SINGLE: {"error": min(single.values()) / len(kinds)},
    }


PAPER = Paper(
    key="mminference",
    claim="Grids found in the input keep more of attention's mass than vertical-slash at the same "
    "cost, boundaries between modalities at least twice as much, and a search gives each head its "
    "own pattern.",
    metric="recall: mean over rows of the attention mass that is kept",
    cells=("grid", "mixed", "search"),
    run=run,
    baseline=(SLASH, A_SHAPE, COLUMNS, NO_SLASH, NO_GRID, SINGLE),
    ours=(GRID, TWO_D, BY_QUERY, SEARCH),
    checks=(
        at_least(
            f"recall: {GRID} - {SLASH}", lambda at: at[GRID]["recall"] - at[SLASH]["recall"],
            0.05, refuted=0.0,
        ),
        at_least(
            f"recall: {GRID} - {A_SHAPE}", lambda at: at[GRID]["recall"] - at[A_SHAPE]["recall"],
            0.3,
        ),
        *(ratio(ours, other, 2.0, "recall")
          for ours in (TWO_D, BY_QUERY) for other in (NO_SLASH, NO_GRID)),
        at_least("grids found", lambda at: at[GRID]["found"], 0.75, refuted=-math.inf),
        at_least(
            "grids found: in vision tokens - in all tokens",
            lambda at: at[TWO_D]["found"] - at[NO_GRID]["found"], 0.5, refuted=0.0,
        ),
        at_least("heads with their own kind, of 12", lambda at: at[SEARCH]["right of 12"], 10),
        at_most(
            f"error: {SEARCH} - {SINGLE}", lambda at: at[SEARCH]["error"] - at[SINGLE]["error"], 0.0
        ),
    ),
    seeds=tuple(range(8)),
)  # fmt: skip
