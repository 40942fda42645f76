"""Dynamic mask attention: the oracles of its spec, its variants, and its bounded cache."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention, softplus

from foveate import Context, attention, causal, padding
from foveate.methods.dma import DMA, KeptKeys
from foveate.methods.dma.keep import ends
from foveate.methods.dma.layout import active_tiles, kept, layouts
from foveate.ops.errors import InputError
from foveate.parts import Heads, StateCache

CAUSAL = Context(mask=causal())


def layer(window, form="exp", dtype=torch.float64, kv=2, width=8, value_width=8, **more):
    """A built layer with random A, as if it were trained."""
    made = DMA(window=window, form=form, **more).build(Heads(32, 2 * kv, kv, width, value_width))
    made = made.to(dtype)
    with torch.no_grad():
        made.importance.A.normal_()
    return made


def tensors(length, batch=2, kv=2, width=8, value_width=8, q_len=None, dtype=torch.float64):
    shapes = (4, q_len or length, width), (kv, length, width), (kv, length, value_width)
    return tuple(torch.randn(batch, *shape, dtype=dtype) for shape in shapes)


def delta_of(made, v):
    """The spec's formula, head by head."""
    together = torch.cat(v.unbind(1), -1)  # (B, L, G d)
    weight = made.importance
    log = weight.A * softplus(linear(together, weight.dt_proj.weight, weight.dt_proj.bias))
    return (log.exp() if weight.form == "exp" else log).transpose(1, 2)


def by_sorting(delta, window, real=None):
    """Keep sets (B, G, L, L), each row sorted on its own; of equal keys the later one is kept."""
    batch, groups, length = delta.shape
    sets = torch.zeros(batch, groups, length, length, dtype=torch.bool)
    for b in range(batch):
        for g in range(groups):
            row = delta[b, g].tolist()
            for t in range(length):
                seen = [j for j in range(t + 1) if real is None or real[b, j]]
                best = sorted(seen, key=lambda j: (row[j], j), reverse=True)
                sets[b, g, t, best[:window]] = True
    return sets


def by_definition(made, q, k, v, sets):
    """Masked softmax over matrices: z = s q . k + delta for kept keys, else -inf."""
    group = q.shape[1] // k.shape[1]
    k, v, sets = (x.repeat_interleave(group, 1) for x in (k, v, sets))
    bias = delta_of(made, v[:, ::group]).repeat_interleave(group, 1)
    z = q @ k.mT * q.shape[-1] ** -0.5 + bias[:, :, None]
    return z.masked_fill(~sets, -torch.inf).softmax(-1).nan_to_num() @ v


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("window", [12, 64])
def test_oracle_1_transformers_doge_attention_is_reproduced(window):
    transformers = pytest.importorskip("transformers")
    from transformers.models.doge.modeling_doge import DogeAttention, apply_rotary_pos_emb

    config = transformers.DogeConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, keep_window_size=window,
        num_hidden_layers=1, vocab_size=16, intermediate_size=32,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = DogeAttention(config, 0).eval()
    with torch.no_grad():
        theirs.A.normal_()
    x = torch.randn(2, 40, 32)
    angle = torch.arange(40.0)[:, None] * 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    cos, sin = (f(torch.cat((angle, angle), -1))[None] for f in (torch.cos, torch.sin))
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    expected = theirs(x, (cos, sin), attention_mask=allowed)[0]

    q, k, v = (f(x).unflatten(-1, (-1, 8)) for f in (theirs.q_proj, theirs.k_proj, theirs.v_proj))
    q, k = theirs.q_norm(q).transpose(1, 2), theirs.k_norm(k).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    ours = DMA(window=window).build(Heads(32, 4, 2, 8, 8))
    ours.importance.load_state_dict(
        {name: x for name, x in theirs.state_dict().items() if name in ("A", "dt_proj.weight")}
    )
    out = ours(q, k, v.transpose(1, 2), CAUSAL).out
    got = theirs.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["exp", "log"])
def test_oracle_2_without_importance_and_room_for_all_it_is_dense(form):
    made = DMA(window=50, form=form).build(Heads(32, 4, 2, 8, 8))
    q, k, v = tensors(50, dtype=torch.float32)
    dense = attention(q, k, v, causal(), backend="reference").out
    torch.testing.assert_close(made(q, k, v, CAUSAL).out, dense, atol=1e-6, rtol=0)
    made = made.double()
    q, k, v = (x.double() for x in (q, k, v))
    dense = attention(q, k, v, causal(), backend="reference").out
    torch.testing.assert_close(made(q, k, v, CAUSAL).out, dense, atol=1e-7, rtol=0)


@pytest.mark.parametrize("form", ["exp", "log"])
@pytest.mark.parametrize("window", [50, 2048])
def test_oracle_3_with_room_for_all_it_is_dense_attention_with_a_bias_for_each_key(form, window):
    made = layer(window, form)
    q, k, v = tensors(50)
    bias = delta_of(made, v).repeat_interleave(2, 1)[:, :, None]
    bias = bias + torch.full((50, 50), -torch.inf, dtype=bias.dtype).triu(1)
    wide = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = scaled_dot_product_attention(q, *wide, attn_mask=bias)
    torch.testing.assert_close(made(q, k, v, CAUSAL).out, expected)


def test_oracle_4_a_row_keeps_as_many_as_it_sees_up_to_w():
    found = kept(torch.randn(2, 2, 40), 12, None, 0, 0)
    counts = layouts(found, 40)[0].dense().sum(-1)
    assert torch.equal(counts, torch.arange(1, 41).clamp_max(12).expand(2, 2, 40))
    assert counts[0, 0, [0, 5, 11, 12, 39]].tolist() == [1, 6, 12, 12, 12]


def test_oracle_5_keep_sets_are_nested():
    sets = by_sorting(torch.randn(1, 2, 60), 12)
    later = sets[:, :, 1:].clone()
    later.diagonal(1, -2, -1).zero_()
    assert not (later & ~sets[:, :, :-1]).any()


@pytest.mark.parametrize("form", ["exp", "log"])
@pytest.mark.parametrize("cuts", [(1,) * 60, (25, *(1,) * 35), (7, 20, 1, 1, 31), (60,)])
def test_oracle_5_a_cache_of_w_entries_streams_exactly(form, cuts):
    made = layer(12, form, torch.float32)
    q, k, v = tensors(60, dtype=torch.float32)
    expected = by_definition(made, q, k, v, by_sorting(delta_of(made, v), 12))
    cache = StateCache(made.new_state())
    parts = []
    with torch.no_grad():
        for parts_of in zip(*(x.split(cuts, 2) for x in (q, k, v))):
            ctx = Context(mask=causal(), cache=cache)
            parts.append(made(*parts_of, ctx).out)
            assert cache.state.size <= 12
    torch.testing.assert_close(torch.cat(parts, 2), expected, atol=1e-6, rtol=1e-5)
    assert cache.bytes() == 2 * 2 * 12 * (8 + 8 + 1 + 1) * 4


@pytest.mark.parametrize("form", ["exp", "log"])
def test_oracle_6_later_tokens_change_nothing(form):
    made = layer(10, form)
    q, k, v = tensors(50)

    def run():
        sets = layouts(made.kept(made.importance(v), 0), 50)[0].dense()
        return made(q, k, v, CAUSAL).out, sets

    before, sets = run()
    for x in (q, k, v):
        x[:, :, 30:] = 100 * torch.randn_like(x[:, :, 30:])
    after, others = run()
    assert torch.equal(others[:, :, :30], sets[:, :, :30])
    assert not torch.equal(others, sets)
    torch.testing.assert_close(after[:, :, :30], before[:, :, :30], atol=1e-12, rtol=0)
    assert not torch.allclose(after[:, :, 30:], before[:, :, 30:])


@pytest.mark.parametrize(("form", "smooth"), [("exp", 0), ("log", 0), ("log", 4)])
def test_oracle_6_gradients_are_those_of_the_outputs(form, smooth):
    made = layer(4, form, kv=1, width=2, value_width=2, smooth=smooth)
    weights = (made.importance.A, made.importance.dt_proj.weight)
    shapes = ((1, 2, 9, 2), (1, 1, 9, 2), (1, 1, 9, 2))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def run(q, k, v, A, W):
        given = {"importance.A": A, "importance.dt_proj.weight": W}
        return torch.func.functional_call(made, given, (q, k, v, CAUSAL)).out

    assert torch.autograd.gradcheck(run, (*inputs, *weights))


def test_oracle_7_importance_of_what_nobody_keeps_has_no_gradient(monkeypatch):
    made = layer(5)
    q, k, v = tensors(40)
    scored = made.importance(v)
    scored.bias.retain_grad()
    monkeypatch.setattr(type(made.importance), "forward", lambda self, v: scored)
    made(q, k, v, CAUSAL).out.square().sum().backward()
    unseen = ~by_sorting(scored.bias.detach(), 5).any(2)
    assert unseen.any()
    assert (scored.bias.grad[unseen] == 0).all()
    assert (scored.bias.grad[~unseen] != 0).all()


@pytest.mark.parametrize("smooth", [0, 8])
def test_oracle_8_skipping_changes_nothing(smooth):
    q, k, v = (x.requires_grad_() for x in tensors(200, dtype=torch.float32))
    rank = torch.randn(2, 2, 200)
    bias = rank.repeat_interleave(2, 1)[:, :, None].clone().requires_grad_()
    weight = torch.randn(2, 4, 200, 8)

    def run(parts):
        from foveate import merge

        out = merge([attention(q, k, v, layout=p, bias=bias) for p in parts]).out
        return out, *torch.autograd.grad((out * weight).sum(), (q, k, v, bias))

    found = kept(rank, 20, None, smooth, 0)
    gathered, tiles = layouts(found, 200), layouts(found, 200, gather=False)
    allowed = sum(p.dense().int() for p in gathered)
    assert int(allowed.max()) == 1
    everything = attention(q, k, v, allowed.bool().repeat_interleave(2, 1), bias=bias)
    whole = (everything.out, *torch.autograd.grad((everything.out * weight).sum(), (q, k, v, bias)))
    for one, two, three in zip(run(gathered), run(tiles), whole):
        torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(two, three, atol=1e-5, rtol=1e-5)


def test_oracle_8_what_nobody_keeps_is_never_read():
    rank = torch.randn(1, 2, 300)
    found = kept(rank, 8, None, 0, 0)
    part = layouts(found, 300)[0]
    q, k, v = tensors(300, batch=1, dtype=torch.float32)
    expected = attention(q, k, v, layout=part).out
    unseen = found.last <= found.first
    assert unseen.float().mean() > 0.5
    k[unseen], v[unseen] = torch.nan, torch.nan
    q.requires_grad_()
    got = attention(q, k, v, layout=part).out
    torch.testing.assert_close(got, expected)
    assert torch.autograd.grad(got.sum(), q)[0].isfinite().all()


def test_oracle_9_queries_and_keys_choose_nothing():
    made = layer(7)
    q, k, v = tensors(40)
    sets = [layouts(made.kept(made.importance(v), 0), 40)[0].dense() for _ in range(2)]
    assert torch.equal(*sets)
    expected = by_definition(made, 3 * q, k, v, by_sorting(delta_of(made, v), 7))
    torch.testing.assert_close(made(3 * q, k, v, CAUSAL).out, expected)


# -- the keep sets -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("length", "window", "start"),
    [(150, 12, 0), (150, 12, 80), (70, 69, 0), (140, 1, 3), (200, 100, 0), (200, 64, 199),
     (190, 80, 128), (5, 9, 0)],
)  # fmt: skip
def test_keep_sets_are_those_of_sorting_each_row(length, window, start):
    rank = torch.randn(2, 2, length)
    rank[1] = (rank[1] * 2).round()  # many equal ones
    rank[0, 1] = 0
    rank[1, 1, ::3] = -torch.inf
    sets = by_sorting(rank, window, rank[:, 0] > -torch.inf)
    sets[1, 1] = by_sorting(rank[1:, 1:], window, rank[1:, 1] > -torch.inf)[0, 0]
    index = torch.arange(length)
    until = ends(rank, window, start)[:, :, None]
    got = (index[:, None] >= index) & (index[:, None] < until)
    assert torch.equal(got[:, :, start:], sets[:, :, start:])
    for gather in (True, False):
        part = layouts(kept(rank, window, None, 0, start), length - start, gather=gather)[0]
        assert torch.equal(part.checked().dense(), sets[:, :, start:])


def test_a_layer_that_learnt_nothing_yet_is_a_sliding_window():
    from foveate import window

    made = DMA(window=16).build(Heads(32, 4, 2, 8, 8))
    q, k, v = tensors(100, dtype=torch.float32)
    expected = attention(q, k, v, window(15, 0), backend="reference").out
    torch.testing.assert_close(made(q, k, v, CAUSAL).out, expected)


def test_a_query_tile_lists_little_more_than_a_query_keeps():
    part = layouts(kept(torch.randn(1, 1, 4096), 256, None, 0, 0), 4096)[0]
    assert part.pairs < 256 * 4096
    assert part.tile_area < 1.6 * 256 * 4096  # of 16.8 million


def test_active_tiles_are_those_that_hold_a_pair():
    found = kept(torch.randn(1, 2, 500), 20, None, 0, 0)
    seen = sum(p.dense().int() for p in layouts(found, 500)).bool()
    seen = torch.nn.functional.pad(seen, (0, 12, 0, 12)).unflatten(3, (8, 64)).unflatten(2, (8, 64))
    assert active_tiles(found, 500) == (int(seen.any(5).any(3).sum()), 2 * 36)
    smooth = active_tiles(kept(torch.randn(1, 2, 500), 20, None, 64, 0), 500)
    assert smooth[0] < active_tiles(found, 500)[0]


# -- variants --------------------------------------------------------------------------------------
def block_smooth(mask, size):
    """Of the kernels' repository: one row of keys, its last block taken as it is."""
    out = mask.clone()
    for at in range(0, len(mask), size):
        block = mask[at : at + size]
        out[at : at + size] = int(block.sum()) * 2 > len(block)
    return out


@pytest.mark.parametrize("size", [1, 4, 7, 16])
@pytest.mark.parametrize("q_len", [90, 37])
def test_block_smoothing_is_the_majority_of_each_block_up_to_the_query(size, q_len):
    rank = torch.randn(2, 2, 90)
    sets = by_sorting(rank, 30)
    parts = layouts(kept(rank, 30, None, size, 90 - q_len), q_len)
    got = sum(p.dense().int() for p in parts)
    assert int(got.max()) <= 1
    for b in range(2):
        for g in range(2):
            for t in range(90 - q_len, 90):
                want = block_smooth(sets[b, g, t, : t + 1], size)
                row = got[b, g, t - 90 + q_len].bool()
                assert torch.equal(row[: t + 1], want)
                assert not row[t + 1 :].any()


def test_relu_keeps_what_is_above_zero():
    made = layer(5, "log", select="relu")
    q, k, v = tensors(60)
    with torch.no_grad():
        made.importance.A[:] = torch.tensor([1.0, -1.0])
    delta = delta_of(made, v)
    sets = (delta > 0)[:, :, None] & torch.ones(60, 60, dtype=torch.bool).tril()
    assert sets[:, 0].any(-1).all()
    assert not sets[:, 1].any()
    result = made(q, k, v, CAUSAL)
    torch.testing.assert_close(result.out, by_definition(made, q, k, v, sets))
    assert (result.out[:, 2:] == 0).all()
    assert (result.lse[:, 2:] == -torch.inf).all()


@pytest.mark.parametrize(
    "more", [{"smooth": 8}, {"select": "relu"}, {"smooth": 5, "select": "relu"}]
)
@pytest.mark.parametrize("cuts", [(1,) * 50, (20, 1, 1, 28)])
def test_variants_decode_as_they_run_whole(more, cuts):
    made = layer(12, "log", **more)
    with torch.no_grad():
        made.importance.dt_proj.weight.mul_(3)
        made.importance.A.abs_()
    q, k, v = tensors(50)
    expected = made(q, k, v, CAUSAL).out
    cache = StateCache(made.new_state())
    with torch.no_grad():
        parts = [
            made(*some, Context(mask=causal(), cache=cache)).out
            for some in zip(*(x.split(cuts, 2) for x in (q, k, v)))
        ]
    torch.testing.assert_close(torch.cat(parts, 2), expected)


def test_the_two_forms_choose_the_same_keys_and_add_different_numbers():
    exp, log = layer(8, "exp"), layer(8, "log")
    log.load_state_dict(exp.state_dict())
    q, k, v = tensors(60)
    sets = [layouts(m.kept(m.importance(v), 0), 60)[0].dense() for m in (exp, log)]
    assert torch.equal(*sets)
    assert not torch.allclose(exp(q, k, v, CAUSAL).out, log(q, k, v, CAUSAL).out)


# -- padding, shapes, refusals ---------------------------------------------------------------------
@pytest.mark.parametrize("smooth", [0, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(side, smooth):
    made = layer(10, smooth=smooth)
    q, k, v = tensors(60)
    index = torch.arange(60)
    at = index - torch.tensor([[0], [17]])
    ctx = Context(mask=causal() & padding([60, 43]))
    real = slice(0, 43)
    if side == "left":
        ctx.q_positions = ctx.kv_positions = at
        real = slice(17, 60)
    got = made(q, k, v, ctx).out
    torch.testing.assert_close(got[:1], made(q[:1], k[:1], v[:1], CAUSAL).out)
    alone = made(*(x[1:, :, real] for x in (q, k, v)), CAUSAL).out
    torch.testing.assert_close(got[1:, :, real], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    made = layer(40, "log", dtype, value_width=12)
    q, k, v = tensors(150, value_width=12, dtype=dtype)
    result = made(q, k, v, CAUSAL)
    assert (result.out.dtype, result.lse.dtype) == (dtype, torch.float32)
    sets = layouts(made.kept(made.importance(v), 0), 150)[0].dense()
    bias = made.importance(v).bias.double().repeat_interleave(2, 1)[:, :, None]
    wide = (x.double() for x in (q, k, v))
    allowed = sets.repeat_interleave(2, 1)
    expected = attention(*wide, allowed, bias=bias, backend="reference")
    band = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(result.out.double(), expected.out, atol=band, rtol=band)
    result.out.float().sum().backward()
    assert made.importance.A.grad.isfinite().all()


def test_masks_that_are_more_than_causal_are_refused():
    from foveate import window

    made = layer(10)
    with pytest.raises(InputError, match="must be causal"):
        made(*tensors(30), Context())
    with pytest.raises(InputError, match="must be causal"):
        made(*tensors(30), Context(mask=window(5, 0)))
    with pytest.raises(InputError, match="2 key/value heads of width 8"):
        made(*tensors(30, value_width=6), CAUSAL)
    for bad in ({"window": 0}, {"form": "linear"}, {"select": "most"}, {"smooth": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            DMA(**bad)


# -- the state -------------------------------------------------------------------------------------
def test_equal_keys_leave_the_state_in_the_order_in_which_they_came():
    state = KeptKeys(1, 1, 1, 3)
    keys = torch.arange(9.0).view(1, 1, 9, 1)
    ranks = torch.tensor([0.0, 2, 0, 0, 1, 1, 0, 1, 1]).view(1, 1, 9)
    with torch.no_grad():
        state.append(keys[:, :, :3], keys[:, :, :3], ranks[..., :3])
        held = []
        for j in range(3, 9):
            state.replace(keys[:, :, j : j + 1], keys[:, :, j : j + 1], ranks[..., j : j + 1])
            held.append(sorted(state.held["place"].flatten().tolist()))
    assert held == [[1, 2, 3], [1, 3, 4], [1, 4, 5], [1, 4, 5], [1, 5, 7], [1, 7, 8]]


def test_a_state_is_cut_only_while_nothing_was_dropped():
    made = layer(12)
    q, k, v = tensors(30)
    cache = StateCache(made.new_state())
    with torch.no_grad():
        made(*(x[:, :, :9] for x in (q, k, v)), Context(mask=causal(), cache=cache))
        cache.truncate(6)
        rest = made(*(x[:, :, 6:] for x in (q, k, v)), Context(mask=causal(), cache=cache))
    torch.testing.assert_close(rest.out, made(q, k, v, CAUSAL).out[:, :, 6:])
    with pytest.raises(InputError, match="can't be brought back"):
        cache.truncate(20)
    cache.truncate(0)
    assert (len(cache), cache.bytes()) == (0, 0)


def test_a_step_may_be_differentiated():
    made = layer(6)
    q, k, v = (x.requires_grad_() for x in tensors(20))
    cache = StateCache(made.new_state())
    parts = [
        made(*some, Context(mask=causal(), cache=cache)).out
        for some in zip(*(x.split((9, 1, 1, 9), 2) for x in (q, k, v)))
    ]
    inputs = (q, k, v, made.importance.A, made.importance.dt_proj.weight)
    weight = torch.randn(2, 4, 20, 8, dtype=torch.float64)
    ours = torch.autograd.grad((torch.cat(parts, 2) * weight).sum(), inputs)
    whole = torch.autograd.grad((made(q, k, v, CAUSAL).out * weight).sum(), inputs)
    for one, two in zip(ours, whole):
        torch.testing.assert_close(one, two)


def test_the_state_declares_what_it_holds():
    state = layer(12).new_state()
    assert {f.name: (f.unit, f.shape, f.limit) for f in state.fields} == {
        "k": ("token", (2, 8), 12), "v": ("token", (2, 8), 12),
        "rank": ("token", (2,), 12), "place": ("token", (2,), 12),
    }  # fmt: skip
    assert StateCache(state).elements_per_token == 0
    every = StateCache(layer(12, select="relu").new_state())
    assert every.elements_per_token == 2 * (8 + 8 + 1 + 1)
    assert state.size == 0


@pytest.mark.parametrize(("window", "cuts"), [(12, (12, 1, 1, 1)), (1, (1,) * 6)])
def test_a_prompt_of_exactly_w_tokens_is_gone_on_from(window, cuts):
    made = layer(window)
    q, k, v = tensors(sum(cuts))
    expected = made(q, k, v, CAUSAL).out
    before = k.clone()
    cache = StateCache(made.new_state())
    with torch.no_grad():
        parts = [
            made(*some, Context(mask=causal(), cache=cache)).out
            for some in zip(*(x.split(cuts, 2) for x in (q, k, v)))
        ]
    torch.testing.assert_close(torch.cat(parts, 2), expected)
    assert torch.equal(k, before)  # the state writes to memory of its own


@pytest.mark.parametrize("smooth", [0, 3])
def test_queries_before_the_first_key_see_nothing(smooth):
    made = layer(4, smooth=smooth)
    q, k, v = tensors(7, q_len=9)
    got = made(q, k, v, CAUSAL).out
    assert (got[:, :, :2] == 0).all()
    torch.testing.assert_close(got[:, :, 2:], made(q[:, :, 2:], k, v, CAUSAL).out)
