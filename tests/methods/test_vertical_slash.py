"""The oracles of the spec mminference that concern vertical-slash heads."""

from __future__ import annotations

import pytest
import torch

from foveate.methods.mminference import VerticalSlash
from foveate.methods.mminference.kernel_index import kernel_index
from foveate.ops import Layout, attention, blocks, causal, documents, padding, window
from foveate.ops.errors import InputError
from foveate.parts import Context


def qkv(batch=1, heads=4, kv_heads=2, q_len=300, kv_len=300, dtype=torch.float64):
    shapes = (batch, heads, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 8)
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def by_definition(q, k, v, table):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~table, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


SMALL = VerticalSlash(verticals=12, slashes=50, last=32, forced_verticals=5, forced_slashes=48)


# -- the spec's choice, step by step, one head at a time -----------------------------------------
def chosen_by_loops(q, k, method, nv, ns, allowed=None):
    """V and T of one head as sets; q (Lq, D), k (Lkv, D)."""
    q_len, kv_len = len(q), len(k)
    shift = kv_len - q_len
    hidden = torch.ones(q_len, kv_len).triu(shift + 1).bool()
    if allowed is not None:
        hidden |= ~allowed
    scores = q.double() @ k.double().T / q.shape[-1] ** 0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    column, offset = [0.0] * kv_len, [0.0] * kv_len
    for i in range(max(0, q_len - method.last), q_len):
        for j in range(i + shift + 1):
            column[j] += float(weights[i, j])
            offset[i + shift - j] += float(weights[i, j])
    for j in range(min(method.forced_verticals, kv_len)):
        column[j] = float("inf")
    for t in range(min(method.forced_slashes, kv_len)):
        offset[t] = float("inf")

    def best(scored, count):
        return set(sorted(range(len(scored)), key=lambda x: (-scored[x], x))[:count])

    return best(column, nv), best(offset, ns)


def index_sets(index, b, h):
    return set(index.columns[b, h].nonzero()[:, 0].tolist()), set(
        index.offsets[b, h].nonzero()[:, 0].tolist()
    )


@pytest.mark.parametrize("q_len", [130, 37])
def test_the_choice_is_the_sheets_per_sequence_and_query_head(q_len):
    q, k, _ = qkv(batch=2, q_len=q_len, kv_len=130)
    index = SMALL.index(q, k, Context(mask=causal()))
    for b in range(2):
        for h in range(4):
            expected = chosen_by_loops(q[b, h], k[b, h // 2], SMALL, 12, 50)
            assert index_sets(index, b, h) == expected


def test_forced_columns_and_offsets_come_after_scoring_and_count_in_the_budgets():
    q, k, _ = qkv()
    for method in (SMALL, VerticalSlash(30, 50), VerticalSlash(3, 3)):
        index = method.index(q, k, Context(mask=causal()))
        nv = max(method.verticals, method.forced_verticals)
        ns = max(method.slashes, 50)
        assert (index.columns.sum(-1) == nv).all()
        assert (index.offsets.sum(-1) == ns).all()
        assert index.columns[..., : method.forced_verticals].all()
        assert index.offsets[..., : min(ns, method.forced_slashes)].all()


def test_the_token_mask_is_its_definition():
    q, k, _ = qkv(batch=2, q_len=70, kv_len=130)
    index = SMALL.index(q, k, Context(mask=causal()))
    table = index.token_mask(70)
    for b, h in ((0, 0), (1, 3)):
        columns, offsets = index_sets(index, b, h)
        for i in range(70):
            for j in range(130):
                t = i + 60 - j
                assert bool(table[b, h, i, j]) == (t >= 0 and (j in columns or t in offsets))


# -- oracle 1 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("q_len", [300, 77])
@pytest.mark.parametrize(
    "method",
    [VerticalSlash(300, 50), VerticalSlash(0, 300), VerticalSlash(5000, 9000), VerticalSlash()],
    ids=repr,
)
def test_oracle_1_all_columns_or_all_offsets_is_dense(method, q_len):
    q, k, v = qkv(q_len=q_len)
    ctx = Context(mask=causal())
    dense = by_definition(q, k, v, causal().dense(q_len, 300))
    layout = method.layout(q, k, v, ctx)
    assert (layout.dense() == causal().dense(q_len, 300)).all()
    for out in (method(q, k, v, ctx).out, attention(q, k, v, layout=layout).out):
        torch.testing.assert_close(out, dense, atol=1e-12, rtol=1e-12)


# -- oracle 2 ------------------------------------------------------------------------------------
def walked_by_loops(columns, offsets, rows, tile):
    """Step 4 of the spec, word for word: for each row block its runs and its single columns."""
    found = []
    for m in range(-(-rows // tile)):
        end = tile * m + tile
        ranges = []
        for t in sorted(offsets, reverse=True):
            if t >= end:
                continue
            stop = max(end - t, tile)
            if ranges and stop - tile <= ranges[-1][1]:
                if stop > ranges[-1][1]:
                    ranges[-1][1] += tile
            else:
                ranges.append([stop - tile, stop])
        runs = [start for low, high in ranges for start in range(low, high, tile)]
        inside = {j for start in runs for j in range(start, start + tile)}
        found.append((runs, sorted(j for j in columns if j < end and j not in inside)))
    return found


def listed(runs, singles, group):
    """Per row tile what kernel_index found for one (batch, head)."""
    tiles = {}
    for g, r, start in zip(*(x.tolist() for x in runs)):
        if g == group:
            tiles.setdefault(r, ([], []))[0].append(start)
    for g, r, key in zip(*(x.tolist() for x in singles)):
        if g == group:
            tiles.setdefault(r, ([], []))[1].append(key)
    return tiles


def test_oracle_2_the_kernel_index_covers_the_mask_300_random_cases_of_block_4():
    generator = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    walked = covered = 0
    for _ in range(300):
        length, tile = draw(9, 61), 4
        columns = torch.rand(1, 2, length, generator=generator) < draw(0, 8) / 10
        offsets = torch.rand(1, 2, length, generator=generator) < draw(0, 8) / 10
        offsets[..., 0] = True
        zero = torch.zeros(1, dtype=torch.int64)
        runs, singles = kernel_index(columns, offsets, zero, zero, length, tile)
        for h in range(2):
            chosen = columns[0, h].nonzero()[:, 0].tolist(), offsets[0, h].nonzero()[:, 0].tolist()
            tiles = listed(runs, singles, h)
            expected = walked_by_loops(*chosen, length, tile)
            for m, (wanted_runs, wanted_singles) in enumerate(expected):
                mine = tiles.get(m, ([], []))
                assert sorted(mine[0]) == [s for s in wanted_runs if s < length]
                assert sorted(mine[1]) == wanted_singles
                walked += len(mine[0]) + len(mine[1])
                keys = [j for s in mine[0] for j in range(s, min(s + tile, length))] + mine[1]
                assert len(keys) == len(set(keys)), "a key is counted twice"
                assert all(s < tile * m + tile for s in mine[0]), "a run is acausal as a whole"
                assert all(j < tile * m + tile for j in mine[1]), "a single key is acausal"
                for i in range(tile * m, min(tile * m + tile, length)):
                    wanted = {j for j in chosen[0] if j <= i} | {i - t for t in chosen[1] if t <= i}
                    assert wanted <= set(keys), "an entry of the mask is missed"
                    covered += len(wanted)
    assert walked > 10_000
    assert covered > 100_000


@pytest.mark.parametrize(("tile", "cases"), [(4, 40), (8, 30), (64, 3)])
def test_the_kernel_index_of_chunks_and_padded_sequences_covers_their_mask(tile, cases):
    generator = torch.Generator().manual_seed(tile)
    for _ in range(cases):
        kv_len = int(torch.randint(2, 24, (), generator=generator)) * tile // 4 + 1
        q_len = int(torch.randint(1, kv_len + 1, (), generator=generator))
        pads = torch.randint(0, kv_len // 2 + 1, (2,), generator=generator)
        keys = torch.arange(kv_len)
        columns = (torch.rand(2, 2, kv_len, generator=generator) < 0.2) & (
            keys >= pads[:, None, None]
        )
        offsets = torch.rand(2, 2, kv_len, generator=generator) < 0.1
        offsets[..., 0] = True
        shift = torch.full((2,), kv_len - q_len)
        runs, singles = kernel_index(columns, offsets, shift, pads, q_len, tile)
        for group in range(4):
            b, h = divmod(group, 2)
            tiles = listed(runs, singles, group)
            for i in range(q_len):
                mine = tiles.get(i // tile, ([], []))
                flat = [j for s in mine[0] for j in range(s, s + tile)] + mine[1]
                assert len(flat) == len(set(flat))
                assert all(s >= int(pads[b]) for s in flat)
                own = i + kv_len - q_len
                wanted = [
                    j
                    for j in range(int(pads[b]), own + 1)
                    if columns[b, h, j] or offsets[b, h, own - j]
                ]
                assert set(wanted) <= set(flat)


@pytest.mark.parametrize("length", [64, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_oracle_2_running_the_index_is_dense_attention_under_the_mask_it_represents(length, dtype):
    q, k, v = qkv(batch=2, q_len=length, kv_len=length, dtype=dtype)
    ctx = Context(mask=causal())
    index = SMALL.index(q, k, ctx)
    layout = SMALL.layout_from(index, q, k, ctx)
    table = layout.dense()
    assert not (index.token_mask(length) & ~table).any()
    assert not (table & ~causal().dense(length, length)).any()
    assert int(layout.pairs_by_group().sum()) == int(table.sum())
    ours = SMALL(q, k, v, ctx)
    expected = by_definition(q.double(), k.double(), v.double(), table)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours.out.double(), expected, atol=limit, rtol=limit)
    assert ours.out.dtype == dtype
    if length == 300:
        assert table.sum() < 0.95 * 8 * length * (length + 1) / 2


# -- oracle 6 ------------------------------------------------------------------------------------
def test_oracle_6_planted_columns_are_recovered_exactly():
    q, k, _ = qkv(q_len=500, kv_len=500)
    generator = torch.Generator().manual_seed(0)
    planted = [torch.randperm(400, generator=generator)[:20] + 30 for _ in range(2)]
    direction = torch.nn.functional.normalize(torch.randn(16, dtype=q.dtype), dim=0)
    q += 6 * direction
    for g, columns in enumerate(planted):
        k[0, g, columns] += 6 * direction
    method = VerticalSlash(verticals=50, slashes=60)
    index = method.index(q, k, Context(mask=causal()))
    for h in range(4):
        expected = set(range(30)) | set(planted[h // 2].tolist())
        assert set(index.columns[0, h].nonzero()[:, 0].tolist()) == expected


def test_a_planted_slash_is_recovered():
    """Keys that match the query 211 tokens later, and noise."""
    codes = torch.randn(500 + 211, 16, dtype=torch.float64)
    k = codes[211:][None, None] * 4
    q = codes[:500][None, None] * 4
    method = VerticalSlash(verticals=30, slashes=101)
    index = method.index(q, k, Context(mask=causal()))
    expected = [*range(100), 211]
    assert index.offsets[0, 0].nonzero()[:, 0].tolist() == expected


# -- oracle 7 ------------------------------------------------------------------------------------
def test_oracle_7_causal_with_the_index_held_and_not_when_it_is_estimated_again():
    q, k, v = qkv()
    ctx = Context(mask=causal())
    index = SMALL.index(q, k, ctx)
    cut = 170
    other = [torch.cat((x[:, :, :cut], torch.randn_like(x[:, :, cut:])), 2) for x in (q, k, v)]

    def run(tensors, held):
        return attention(*tensors, layout=SMALL.layout_from(held, *tensors[:2], ctx)).out

    before, after = run((q, k, v), index), run(other, index)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])
    again = run(other, SMALL.index(*other[:2], ctx))
    assert (again[:, :, :cut] - before[:, :, :cut]).abs().max() > 1e-3


# -- prefill, chunks, decode, padding, masks -------------------------------------------------------
def test_decode_is_dense():
    q, k, v = qkv(q_len=1)
    for phase in ("prefill", "decode"):
        ours = SMALL(q, k, v, Context(mask=causal(), phase=phase))
        torch.testing.assert_close(ours.out, by_definition(q, k, v, torch.ones(1, 300).bool()))
    q, k, v = qkv(q_len=5)
    ours = SMALL(q, k, v, Context(mask=causal(), phase="decode"))
    torch.testing.assert_close(ours.out, by_definition(q, k, v, causal().dense(5, 300)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_choose_as_if_they_were_alone(side):
    q, k, v = qkv(batch=2)
    pads = torch.tensor([0, 75])
    places = torch.arange(300) - pads[:, None]
    mask = causal() & padding((300 - pads).tolist())
    ctx, real = Context(mask=mask), slice(0, 225)
    if side == "left":
        ctx, real = Context(mask=mask, q_positions=places, kv_positions=places), slice(75, 300)
    ours = SMALL.index(q, k, ctx)
    alone = SMALL.index(q[1:, :, real], k[1:, :, real], Context(mask=causal()))
    assert torch.equal(ours.columns[1, :, real], alone.columns[0])
    assert torch.equal(ours.offsets[1, :, :225], alone.offsets[0])
    assert ours.columns[1].sum() == alone.columns[0].sum()
    full = SMALL.index(q[:1], k[:1], Context(mask=causal()))
    assert torch.equal(ours.columns[0], full.columns[0])
    # And what runs is exact over its layout, within the mask, and covers the token mask.
    layout = SMALL.layout_from(ours, q, k, ctx)
    table = layout.dense()
    fields = {} if side == "right" else {"q_positions": places, "kv_positions": places}
    allowed = mask.dense(300, 300, **fields)
    assert not (table & ~allowed).any()
    assert not (ours.token_mask(300) & allowed & ~table).any()
    torch.testing.assert_close(SMALL(q, k, v, ctx).out, by_definition(q, k, v, table))


def test_pads_of_a_multiple_of_64_change_nothing_at_all():
    q, k, v = qkv(batch=2)
    places = torch.arange(300) - torch.tensor([[0], [128]])
    ctx = Context(mask=causal() & padding([300, 172]), q_positions=places, kv_positions=places)
    ours = SMALL(q, k, v, ctx).out[1:, :, 128:]
    alone = SMALL(*(x[1:, :, 128:] for x in (q, k, v)), Context(mask=causal())).out
    torch.testing.assert_close(ours, alone, atol=1e-12, rtol=1e-12)


def test_chunked_prefill_chooses_by_the_chunks_own_last_queries():
    q, k, v = qkv()
    chunk = q[:, :, 150:250]
    ctx = Context(mask=causal())
    ours = SMALL.index(chunk, k[:, :, :250], ctx)
    whole = SMALL.index(q[:, :, :250], k[:, :, :250], ctx)
    assert torch.equal(ours.columns, whole.columns)
    assert torch.equal(ours.offsets, whole.offsets)
    table = SMALL.layout_from(ours, chunk, k[:, :, :250], ctx).dense()
    assert not (ours.token_mask(100) & ~table).any()
    out = SMALL(chunk, k[:, :, :250], v[:, :, :250], ctx).out
    torch.testing.assert_close(out, by_definition(chunk, k[:, :, :250], v[:, :, :250], table))


def test_a_static_caches_empty_end_changes_nothing():
    q, k, v = qkv(q_len=200)
    ctx = Context(mask=causal(), q_positions=torch.arange(200))
    ours = SMALL(q, k, v, ctx).out
    alone = SMALL(q, k[:, :, :200], v[:, :, :200], Context(mask=causal())).out
    torch.testing.assert_close(ours, alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "mask",
    [
        causal() & window(90, 0),
        causal() & documents([0, 111, 300]),
        causal() & blocks(torch.ones(4, 300, 300).bool().tril() & (torch.arange(300) % 7 > 0), 1),
    ],
    ids=["window", "documents", "table per head"],
)
def test_it_stays_within_the_mask(mask):
    q, k, v = qkv()
    ctx = Context(mask=mask)
    table = SMALL.layout(q, k, v, ctx).dense()
    assert not (table & ~mask.dense(300, 300)).any()
    index = SMALL.index(q, k, ctx)
    assert not (index.token_mask(300) & mask.dense(300, 300) & ~table).any()
    torch.testing.assert_close(SMALL(q, k, v, ctx).out, by_definition(q, k, v, table))


def test_queries_that_see_nothing_get_nothing():
    q, k, v = qkv(batch=2)
    mask = causal() & blocks(
        torch.tensor([True, False])[:, None, None, None].expand(2, 1, 300, 300), 1
    )
    ours = SMALL(q, k, v, Context(mask=mask))
    assert not ours.out[1].any()
    assert (ours.lse[1] == -torch.inf).all()
    alone = SMALL(q[:1], k[:1], v[:1], Context(mask=causal()))
    torch.testing.assert_close(ours.out[:1], alone.out)


def test_backward_is_that_of_the_mask_it_represents():
    q, k, v = (x.requires_grad_() for x in qkv(q_len=150, kv_len=150))
    ctx = Context(mask=causal(), phase="train")
    table = SMALL.layout(q, k, v, ctx).dense()
    weight = torch.randn(1, 4, 150, 8, dtype=torch.float64)
    ours = torch.autograd.grad((SMALL(q, k, v, ctx).out * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((by_definition(q, k, v, table) * weight).sum(), (q, k, v))
    for one, two in zip(ours, expected):
        torch.testing.assert_close(one, two)


def test_fraction_is_a_share_of_each_sequence():
    q, k, _ = qkv(batch=2)
    method = VerticalSlash(fraction=0.25, forced_verticals=4, forced_slashes=10)
    ctx = Context(mask=causal() & padding([300, 240]))
    index = method.index(q, k, ctx)
    assert index.columns.sum(-1).tolist() == [[75] * 4, [60] * 4]
    assert index.offsets.sum(-1).tolist() == [[75] * 4, [60] * 4]


@pytest.mark.parametrize("mask", [None, window(9, 9), causal(block=8)], ids=repr)
def test_masks_that_look_ahead_are_refused(mask):
    with pytest.raises(InputError, match="causal"):
        SMALL(*qkv(), Context(mask=mask))


def test_permuted_positions_are_refused():
    places = torch.arange(300).flip(0)
    with pytest.raises(InputError, match="count up by one"):
        SMALL(*qkv(), Context(mask=causal(), q_positions=places, kv_positions=places))


def test_what_runs_is_one_layout_of_gathered_and_ordinary_tiles():
    q, k, v = qkv()
    layout = SMALL.layout(q, k, v, Context(mask=causal()))
    assert isinstance(layout, Layout)
    assert layout.groups == (1, 4)
    assert layout.gathered is not None
    assert bool((layout.cols < layout.kv_tiles).any())
    assert bool((layout.cols >= layout.kv_tiles).any())
