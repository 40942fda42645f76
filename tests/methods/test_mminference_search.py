"""The offline search of MInference and MMInference, on planted heads."""

from __future__ import annotations

import pytest
import torch

from foveate import Context, causal
from foveate.methods import make
from foveate.methods.mminference import AShape
from foveate.methods.mminference.search import (
    MINFERENCE,
    MMINFERENCE,
    HeadSearch,
    Searcher,
    Trial,
    fitted,
    search_head,
    space,
    stretched,
)
from foveate.ops.errors import InputError

CAUSAL = Context(mask=causal())
TARGET = (32, 128)
SMALL = (
    "a-shape(sinks=64, local=256)",
    "vertical-slash(verticals=200, slashes=60, forced_slashes=50)",
    "vertical-slash(verticals=30, slashes=300, forced_slashes=50)",
    "block-sparse(blocks=4)",
    "grid(horizontal=False, max_stride=40)",
)
N, D = 1024, 64


def head(kind, seed=0, n=N):
    """q, k, v (1, 1, n, 64) of a head that attends to one kind of place."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, 1, n, D)
    u = torch.nn.functional.normalize(torch.randn(D), dim=0)
    if kind == "columns":
        k[:, :, torch.randperm(n)[:60]] += 6 * u
        q += 6 * u
    elif kind == "grid":
        k[:, :, 3::16] += 6 * u
        q += 6 * u
    elif kind == "local":
        # Neighbours alike: slow rotations of many planes, so that scores fall off with distance.
        angle = torch.arange(n)[:, None] * torch.linspace(0.005, 0.1, D // 2)
        wave = torch.cat((angle.cos(), angle.sin()), 1) * 3
        q, k = q * 0.3 + wave, k * 0.3 + wave
    return q, k, v


def area(pattern, q, k, v):
    return pattern.layout(q, k, v, CAUSAL).tile_area


@pytest.mark.parametrize("candidate", SMALL[:4])
def test_oracle_6_matched_budgets_lie_within_a_step_of_the_target(candidate):
    q, k, v = head("columns")
    target = area(AShape(*TARGET), q, k, v)
    own = fitted(candidate, lambda p: area(p, q, k, v), target, N)
    assert area(own, q, k, v) <= target
    # One step more is too much.
    fields = {"a-shape": ("sinks", "local"), "block-sparse": ("blocks",)}
    fields = fields.get(candidate.partition("(")[0], ("verticals", "slashes"))
    step = 1 if fields == ("blocks",) else 50
    path = [stretched(make(candidate), s, fields, step, N) for s in range(-60, 61)]
    more = path[len(path) - path[::-1].index(own)]
    assert area(more, q, k, v) > target
    assert sum(abs(getattr(more, name) - getattr(own, name)) for name in fields) <= step


@pytest.mark.parametrize(
    ("kind", "wins"),
    [("local", "a-shape"), ("columns", "vertical-slash"), ("grid", "grid")],
)
def test_oracle_6_planted_heads_get_their_pattern(kind, wins):
    found = search_head(*head(kind), CAUSAL, SMALL, TARGET)
    assert found.best.pattern.startswith(wins)
    assert all(t.area <= 1.02 * found.target for trials in found.trials.values() for t in trials)


def test_a_candidate_that_is_too_large_is_left_out():
    q, k, v = head("columns")
    assert fitted("grid(stride=2)", lambda p: area(p, q, k, v), 10_000.0, N) is None
    with pytest.raises(InputError, match="larger target"):
        search_head(q, k, v, CAUSAL, ("grid(stride=2)",), (1, 1))


def test_several_prompts_are_averaged():
    found = HeadSearch(100.0)
    found.add("a", Trial("a", 1.0, 10.0))
    found.add("b", Trial("b", 2.0, 10.0))
    assert found.best.pattern == "a"
    found.add("a", Trial("a", 5.0, 10.0))
    found.add("b", Trial("b", 2.0, 10.0))
    assert found.best == Trial("b", 2.0, 10.0)
    again = search_head(*head("local"), CAUSAL, SMALL, TARGET)
    again = search_head(*head("local", seed=1), CAUSAL, SMALL, TARGET, again)
    assert {len(trials) for trials in again.trials.values()} == {2}
    assert len({t.pattern for t in next(iter(again.trials.values()))}) == 1


def test_boundaries_are_tried_where_there_are_modalities():
    q, k, v = head("columns")
    kinds = torch.zeros(N, dtype=torch.int64)
    kinds[100:420], kinds[520:840] = 1, 1
    u = torch.nn.functional.normalize(torch.randn(D), dim=0)
    number = kinds.cumsum(0) - 1
    q[:, :, kinds == 1] = torch.randn(640, D) + 6 * u
    k[:, :, (kinds == 1) & (number % 16 == 3)] += 6 * u
    ctx = Context(mask=causal(), modality=kinds)
    candidates = (SMALL[0], SMALL[1], SMALL[4])
    found = search_head(q, k, v, ctx, candidates, TARGET)
    assert any("boundary" in name for name in found.trials)
    assert "boundary" in found.best.pattern
    plain = min(t[0].error for name, t in found.trials.items() if "boundary" not in name)
    assert found.best.error < plain
    make(found.best.pattern)  # can be named


def test_the_papers_spaces():
    assert len(MINFERENCE) == 6
    assert len(MMINFERENCE) == 3 + 9 + 6
    assert len(space(576, vision=True)) == 3 + 9 + 12
    for text in (*MINFERENCE, *space(576, vision=True)):
        make(text)


def test_searcher_gives_dense_outputs_and_finds_every_head():
    q, k, v = (torch.cat([head(x)[i] for x in ("local", "grid")], 1) for i in range(3))
    told = []
    searcher = Searcher(SMALL, TARGET, lambda *at: told.append(at))
    out = searcher(q, k, v, Context(mask=causal(), layer=3))
    assert torch.equal(out.out, make("full")(q, k, v, CAUSAL).out)
    assert told == [(3, 0), (3, 1)]
    assert searcher.found[3, 0].best.pattern.startswith("a-shape")
    assert searcher.found[3, 1].best.pattern.startswith("grid")
    with pytest.raises(InputError, match="one prompt at a time"):
        searcher(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), CAUSAL)
