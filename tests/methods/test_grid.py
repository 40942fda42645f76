"""Grid, tri-shape and boundaries between modalities: oracles of the spec mminference."""

from __future__ import annotations

import pytest
import torch

from foveate import Context, Layout, attention, blocks, causal, merge
from foveate.methods import make, spec
from foveate.methods.mminference import Grid, QBoundary, TriShape, TwoDBoundary
from foveate.methods.mminference.distances import Distances
from foveate.methods.mminference.grid import search_stride, z_scores
from foveate.methods.mminference.problem import problems, problems_by_pair, problems_by_query
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError

CAUSAL = Context(mask=causal())


def qkv(batch=2, heads=4, kv_heads=2, q_len=203, kv_len=203, dtype=torch.float64):
    shapes = (batch, heads, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 8)
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def over(table, q, k, v):
    return attention(q, k, v, blocks(table, 1), backend="reference")


def close(one, two, tolerance=1e-12):
    torch.testing.assert_close(one.out, two.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(one.lse, two.lse, atol=tolerance, rtol=tolerance)


def planted(n, stride, phase, strength=6.0, dim=64, heads=1, dtype=torch.float32):
    """The spec's grid head: q = N(0, 1) + strength u, k[phase::stride] += strength u."""
    u = torch.nn.functional.normalize(torch.randn(dim, dtype=dtype), dim=0)
    q, k = torch.randn(2, 1, heads, n, dim, dtype=dtype)
    q = q + strength * u
    k[:, :, phase::stride] += strength * u
    return q, k, torch.randn(1, heads, n, dim, dtype=dtype)


# -- grid ---------------------------------------------------------------------------------------
def grid_mask(rows, n, stride, phase, method, diagonal=None):
    """The spec's mask, pair by pair."""

    def seen(i, j):
        lines = (method.vertical and j % stride == phase) or (
            method.horizontal and i % stride == phase
        )
        lines = lines or (method.slash and (i - j) % stride == diagonal)
        return j <= i and (lines or i // 64 == j // 64)

    return torch.tensor([[seen(i, j) for j in range(n)] for i in rows])


@pytest.mark.parametrize(
    "method",
    [
        Grid(7), Grid(7, horizontal=False), Grid(7, vertical=False), Grid(7, slash=True),
        Grid(7, vertical=False, horizontal=False, slash=True), Grid(max_stride=9), Grid(150),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("q_len", [203, 90])
def test_oracle_2_grid_is_the_sheets_mask(method, q_len):
    q, k, v = qkv(q_len=q_len)
    layout = method.layout(q, k, v, CAUSAL)
    rows = range(203 - q_len, 203)
    for b, problem in enumerate(problems(q, k, CAUSAL, 64, "grid")):
        found = method.find(problem)
        for h in range(4):
            stride, phase = int(found.stride[h]), int(found.phase[h])
            diagonal = method._diagonal(problem, h, stride) if method.slash else None
            want = grid_mask(rows, 203, stride, phase, method, diagonal)
            assert torch.equal(layout.dense()[b, h], want)
    close(method(q, k, v, CAUSAL), over(layout.dense(), q, k, v))


@pytest.mark.parametrize("method", [Grid(1), Grid(1, horizontal=False), Grid(1, slash=True)])
def test_oracle_1_stride_one_is_dense(method):
    q, k, v = qkv()
    assert (method.layout(q, k, v, CAUSAL).dense() == causal().dense(203, 203)).all()
    close(method(q, k, v, CAUSAL), attention(q, k, v, causal(), backend="reference"))


def test_oracle_3_scores_by_loops():
    """Columns and distances of the estimate, S = 40 and M = 8, pair by pair."""
    q, k, _ = qkv(1, 2, 1, 40, 40)
    (problem,) = problems(q, k, CAUSAL, 8, "grid")
    for h in range(2):
        scores = (q[0, h] @ k[0, 0].T / 4).masked_fill(
            ~torch.ones(40, 40).tril().bool(), -torch.inf
        )
        ahat = scores.softmax(-1)[-8:]
        columns, distances = torch.zeros(40).double(), torch.zeros(40).double()
        for r in range(8):
            for j in range(40):
                columns[j] += ahat[r, j]
                if 32 + r - j >= 0:
                    distances[32 + r - j] += ahat[r, j]
        torch.testing.assert_close(problem.column_sums[h], columns, atol=1e-14, rtol=0)
        torch.testing.assert_close(problem.distance_sums[h], distances, atol=1e-14, rtol=0)


def test_oracle_4_residue_permutation():
    """S = 48, sigma = 6, s = 4: the chosen phase last, all lines in the last blocks."""
    order = sorted(range(48), key=lambda i: ((i % 6 - 5) % 6, i))
    assert order[:9] == [5, 11, 17, 23, 29, 35, 41, 47, 0]
    assert order[-1] % 6 == 4
    at = torch.tensor(order)
    i, j = torch.arange(48)[:, None], torch.arange(48)
    lines = (j % 6 == 4) | (i % 6 == 4)
    inside = lines[at][:, at]
    assert not inside[:40, :40].any()
    assert inside[40:].all()
    assert inside[:, 40:].all()
    # Permute, run with original positions, put back.
    q, k, v = qkv(1, 1, 1, 48, 48)
    table = lines & (j <= i)
    there = at.argsort()
    on = torch.arange(4, 48, 6)
    (problem,) = problems(q, k, CAUSAL, 8, "grid")
    parts = Grid(6).parts_of(problem, 6, 4)
    assert torch.equal(parts[1].rows, on)
    assert torch.equal(parts[0].columns.nonzero()[:, 0], on)
    # The lines alone, permuted and put back, as the mask says.
    masked = attention(
        q[:, :, at], k[:, :, at], v[:, :, at], blocks(table[at][:, at], 1), backend="reference"
    )
    close(
        AttentionOutput(masked.out[:, :, there], masked.lse[:, :, there]),
        over(table[None, None], q, k, v),
    )


@pytest.mark.parametrize("seed", range(8))
def test_oracle_6_a_planted_grid_is_found(seed):
    torch.manual_seed(seed)
    stride = 8 + 2 * seed
    phase = int(torch.randint(stride, ()))
    q, k, _ = planted(2048, stride, phase)
    (problem,) = problems(q, k, CAUSAL, 64, "grid")
    found = Grid().find(problem)
    assert (int(found.stride[0]), int(found.phase[0])) == (stride, phase)


def test_z_is_its_formula():
    x = torch.rand(3, 50, dtype=torch.float64)
    found = z_scores(x, 7)
    for h in range(3):
        for s in range(7):
            own = x[h, s::7]
            z = (own.mean() - x[h].mean()) * len(own) ** 0.5 / x[h].std(correction=0)
            assert float(found[h, s]) == pytest.approx(float(z))
    best = search_stride(x, [3, 7])
    assert torch.equal(best.z, torch.maximum(z_scores(x, 3).amax(1), found.amax(1)))


def test_oracle_7_outputs_are_causal_and_choices_are_not():
    q, k, v = qkv(1, 2, 1)
    once = Grid(max_stride=9).layout(q, k, v, CAUSAL)
    out = attention(q, k, v, layout=once).out
    k[:, :, 150:], v[:, :, 150:], q[:, :, 150:] = 3.0, 5.0, -2.0
    assert torch.equal(attention(q, k, v, layout=once).out[:, :, :150], out[:, :, :150])
    again = Grid(max_stride=9).layout(q, k, v, CAUSAL)
    assert not torch.equal(again.dense()[:, :, :150], once.dense()[:, :, :150])


@pytest.mark.parametrize("q_len", [203, 60])
def test_tri_shape_is_the_sheets_mask(q_len):
    q, k, v = qkv(q_len=q_len)
    rows = torch.arange(203 - q_len, 203)[:, None]
    j = torch.arange(203)
    table = ((j < 9) | (rows - j < 33) | (rows >= 183)) & (j <= rows)
    layout = TriShape(9, 33, 20).layout(q, k, v, CAUSAL)
    assert (layout.dense() == table).all()
    close(TriShape(9, 33, 20)(q, k, v, CAUSAL), over(layout.dense(), q, k, v))
    close(TriShape()(q, k, v, CAUSAL), attention(q, k, v, causal(), backend="reference"))


def test_distances_answer_for_tiles_as_for_elements():
    chosen = torch.rand(90) < 0.8
    mask = Distances(chosen)
    for _ in range(200):
        q0, k0 = torch.randint(-5, 100, (2,)).tolist()
        q1, k1 = q0 + int(torch.randint(9, ())), k0 + int(torch.randint(9, ()))
        i, j = torch.arange(q0, q1 + 1)[:, None], torch.arange(k0, k1 + 1)
        seen = mask._element(i, j, 0, 0)
        want = torch.tensor(
            [[0 <= a - b < 90 and bool(chosen[a - b]) for b in range(k0, k1 + 1)]
             for a in range(q0, q1 + 1)]
        )  # fmt: skip
        assert torch.equal(seen, want)
        sure = mask._tiles(*(torch.tensor(x) for x in (q0, q1, k0, k1)), 0, 0)
        assert not (sure.none and seen.any())
        assert not (sure.full and not seen.all())


# -- boundaries ---------------------------------------------------------------------------------
def stream(n=203, batch=2):
    """Text, vision, text, vision, text; other lengths in each batch entry."""
    kinds = torch.zeros(batch, n, dtype=torch.int64)
    for b in range(batch):
        kinds[b, 20 + b : 80] = 1
        kinds[b, 95 : 150 - 3 * b] = 1
    return kinds


PATTERNS = (
    "full",
    "a-shape(sinks=3, local=20)",
    "tri-shape(sinks=3, local=20, bottom=5)",
    "vertical-slash(verticals=9, slashes=50, forced_verticals=3, forced_slashes=4)",
    "block-sparse(blocks=1, tile=16)",
    "grid(max_stride=6)",
)


@pytest.mark.parametrize("q_len", [203, 130])
def test_oracle_5_dense_patterns_are_dense(q_len):
    q, k, v = qkv(q_len=q_len)
    ctx = Context(mask=causal(), modality=stream())
    dense = attention(q, k, v, causal(), backend="reference")
    for method in (
        QBoundary(("full", "full")),
        TwoDBoundary((("full", "full"), ("full", "full"))),
        TwoDBoundary((("full", "grid(stride=1)"), ("a-shape(local=203)",))),
    ):
        assert (method.layout(q, k, v, ctx).dense() == causal().dense(q_len, 203)).all()
        close(method(q, k, v, ctx), dense)


def test_oracle_5_parts_merge_by_lse_in_any_order():
    q, k, v = qkv(1, 2, 1)
    kinds = stream(batch=1)
    method = TwoDBoundary((("a-shape(sinks=3, local=20)",), ("full", "grid(max_stride=6)")))
    ctx = Context(mask=causal(), modality=kinds)
    table = method.layout(q, k, v, ctx).dense()
    parts = [over(table & (kinds[0] == b), q, k, v) for b in (0, 1)]
    close(merge(parts), method(q, k, v, ctx))
    close(merge(parts[::-1]), method(q, k, v, ctx))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("vision", ["full", PATTERNS[3], PATTERNS[5]])
def test_boundaries_are_what_their_layouts_say_and_stay_causal(text, vision):
    q, k, v = qkv()
    ctx = Context(mask=causal(), modality=stream())
    for method in (QBoundary((text, vision)), TwoDBoundary(((text, vision), (vision, text)))):
        layout = method.layout(q, k, v, ctx).checked()
        table = layout.dense()
        assert not (table & ~causal().dense(203, 203)).any()
        assert table.any(-1).all()
        # Every pair once: the tiles hold as many as the table.
        assert int(layout.pairs_by_group().sum()) == int(table.sum())
        close(method(q, k, v, ctx), over(table, q, k, v))


@pytest.mark.parametrize("text", PATTERNS[1:])
def test_q_boundary_runs_each_pattern_on_its_own_queries(text):
    """Rows of a modality: what the pattern chooses for these rows alone, on all keys."""
    q, k, v = qkv(batch=1)
    kinds = stream(batch=1)
    ctx = Context(mask=causal(), modality=kinds)
    table = QBoundary((text, "full")).layout(q, k, v, ctx).dense()
    assert torch.equal(
        table[0][:, kinds[0] == 1], causal().dense(203, 203)[0].expand(4, -1, -1)[:, kinds[0] == 1]
    )
    rows = (kinds[0] == 0).nonzero()[:, 0]
    other = q.clone()
    other[:, :, kinds[0] == 1] = torch.randn_like(other[:, :, kinds[0] == 1])
    again = QBoundary((text, "full")).layout(other, k, v, ctx).dense()
    assert torch.equal(again[0][:, rows], table[0][:, rows])


@pytest.mark.parametrize("text", PATTERNS[1:])
def test_oracle_8_with_one_modality_all_boundaries_are_the_same(text):
    q, k, v = qkv()
    for kinds in (None, torch.zeros(203, dtype=torch.int64)):
        ctx = Context(mask=causal(), modality=kinds)
        by_query = QBoundary((text, "full")).layout(q, k, v, ctx).dense()
        by_pair = TwoDBoundary(((text, "full"), ("full",))).layout(q, k, v, ctx).dense()
        assert torch.equal(by_query, by_pair)
        plain = make(text).layout(q, k, v, ctx).dense()
        if "vertical-slash" in text:  # its kernel's runs of 64 keys hold more than the exact mask
            index = make(text).index(q, k, ctx)
            assert torch.equal(by_query, index.token_mask(203))
            assert not (by_query & ~plain).any()
        else:
            assert torch.equal(by_query, plain.expand_as(by_query))


def mixed(seed, n_vision=400):
    """The spec's mixed prompt: text between four vision segments, vision queries on a grid."""
    torch.manual_seed(seed)
    kinds = []
    for _ in range(4):
        kinds += [0] * int(torch.randint(40, 120, ())) + [1] * n_vision
    kinds = torch.tensor(kinds + [0] * 80)
    n, dim, stride = len(kinds), 64, 20
    phase = int(torch.randint(stride, ()))
    u, w = torch.nn.functional.normalize(torch.randn(2, dim), dim=1)
    q, k, v = torch.randn(3, 1, 1, n, dim)
    number = torch.where(kinds == 1, (kinds == 1).cumsum(0) - 1, -1)
    k[:, :, (number >= 0) & (number % stride == phase)] += 6 * u
    q[:, :, kinds == 1] += 6 * u
    few = torch.cat([(kinds == a).nonzero()[:, 0][torch.randperm(int((kinds == a).sum()))[:c]]
                     for a, c in ((0, 20), (1, 10))])  # fmt: skip
    k[:, :, few] += 6 * w
    q[:, :, kinds == 0] += 6 * w
    return q, k, v, kinds, (stride, phase)


@pytest.mark.parametrize("seed", range(4))
def test_a_grid_is_found_in_its_modalitys_own_numbers(seed):
    q, k, _, kinds, (stride, phase) = mixed(seed)
    ctx = Context(mask=causal(), modality=kinds)
    for found in (
        dict(problems_by_query(q, k, ctx, 64, "q")[0])[1],
        {(a, b): p for a, b, p in problems_by_pair(q, k, ctx, 64, "2d")[0]}[1, 1],
    ):
        grid = Grid(max_stride=64).find(found)
        assert (int(grid.stride[0]), int(grid.phase[0])) == (stride, phase)
    whole = Grid(max_stride=64).find(problems(q, k, ctx, 64, "grid")[0])
    assert (int(whole.stride[0]), int(whole.phase[0])) != (stride, phase)


@pytest.mark.parametrize("seed", range(4))
def test_a_slash_is_counted_in_its_modalitys_own_numbers(seed):
    """Text between two images moves their tokens apart; the diagonals go on as if it weren't there.

    Both ways of finding one: alone, by stride and phase; and beside columns, whose stride it has.
    """
    torch.manual_seed(seed)
    kinds = []
    for _ in range(4):
        kinds += [0] * int(torch.randint(40, 120, ())) + [1] * 400
    kinds = torch.tensor(kinds + [0] * 80)
    n, dim, stride = len(kinds), 64, 20
    diagonal = int(torch.randint(1, stride, ()))
    sight = kinds == 1
    number = (sight.cumsum(0) - 1)[sight]
    kind = torch.nn.functional.normalize(torch.randn(stride, dim), dim=1)
    q, k, _ = torch.randn(3, 1, 1, n, dim)
    k[0, 0, sight] += 6 * kind[number % stride]
    q[0, 0, sight] += 6 * kind[(number - diagonal) % stride]
    ctx = Context(mask=causal(), modality=kinds)
    for problem in (
        dict(problems_by_query(q, k, ctx, 64, "q")[0])[1],
        {(a, b): p for a, b, p in problems_by_pair(q, k, ctx, 64, "2d")[0]}[1, 1],
    ):
        alone = Grid(max_stride=64, vertical=False, horizontal=False, slash=True).find(problem)
        assert (int(alone.stride[0]), int(alone.phase[0])) == (stride, diagonal)
        assert Grid(stride=stride, slash=True)._diagonal(problem, 0, stride) == diagonal


def test_names_go_both_ways():
    for method in (QBoundary(PATTERNS[1:3]), TwoDBoundary((PATTERNS[:2], PATTERNS[5:])), Grid(3)):
        assert make(spec(method)) == method


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda: Grid(0), "stride"),
        (lambda: Grid(vertical=False, horizontal=False), "at least one"),
        (lambda: TriShape(bottom=-1), "bottom"),
        (lambda: QBoundary(()), "one per modality"),
        (lambda: QBoundary("grid"), "one per modality"),
        (lambda: QBoundary(("sink-window",)), "can't run on one kind"),
        (lambda: TwoDBoundary((("mqa",),)), "can't run on one kind"),
        (lambda: TwoDBoundary(()), "row of patterns"),
    ],
)
def test_bad_fields_are_refused(made, text):
    with pytest.raises(InputError, match=text):
        made()


def test_a_modality_of_another_length_is_refused():
    with pytest.raises(InputError, match="one integer for each key"):
        QBoundary()(*qkv(), Context(mask=causal(), modality=torch.zeros(100)))


def test_layouts_go_with_the_engine():
    q, k, v = qkv(dtype=torch.float32)
    ctx = Context(mask=causal(), modality=stream())
    for method in (Grid(max_stride=9), QBoundary(PATTERNS[1:]), TwoDBoundary((PATTERNS[3:],))):
        layout: Layout = method.layout(q, k, v, ctx)
        close(method(q, k, v, ctx), over(layout.dense(), q, k, v), 1e-5)


def test_all_strides_at_once_are_the_z_scores_of_each():
    x = torch.randn(5, 777).exp()
    strides = list(range(2, 200))
    best = search_stride(x, strides)
    for h in range(5):
        z = {s: z_scores(x[h : h + 1], s)[0] for s in strides}
        top = max(strides, key=lambda s: float(z[s].max()))
        assert int(best.stride[h]) == top
        assert int(best.phase[h]) == int(z[top].argmax())
        torch.testing.assert_close(best.z[h], z[top].max())


@pytest.mark.parametrize("steady", [True, False])
def test_tiles_alike_by_distance_are_those_made_one_by_one(steady):
    from foveate.methods.mminference.distances import Distances
    from foveate.methods.mminference.lines import _each, seen_of

    at = torch.arange(640)
    # Two kinds of tokens side by side: some tiles stand in a row, some don't.
    order = at if steady else torch.cat((at[:250], at[400:], at[250:400:3]))
    tiles = order[: len(order) // 64 * 64].view(-1, 64)
    r, c = torch.ones(len(tiles), len(tiles)).nonzero(as_tuple=True)
    for mask in (None, Distances(torch.rand(640) < 0.3)):
        given = (tiles, tiles, tiles, tiles, mask, r, c)
        assert torch.equal(seen_of(*given), _each(*given))
