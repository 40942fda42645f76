"""RCMHA: relative attention behind a convolution, against the paper's own formulas by hand."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.nn import functional

import foveate
from foveate import Context, attention, causal, documents, padding
from foveate.methods import make
from foveate.methods.rcmha import HeadConvolution
from foveate.ops.bias import alibi_slopes, spread_bias
from foveate.ops.errors import InputError
from foveate.parts import Heads

DIM, HEADS = 32, 4


def layer(spec="rcmha(reach=64)", seed=1, projection="mha", **more) -> foveate.Attention:
    """A layer with weights that are all away from where they start."""
    torch.manual_seed(seed)
    made = foveate.Attention(DIM, HEADS, projection, spec, out_bias=True, **more).double().eval()
    with torch.no_grad():
        for parameter in made.attention.parameters():
            parameter.normal_(std=0.7)
    return made


def tokens(length=11, batch=2, seed=2):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=random, dtype=torch.float64)


def convolved(x, conv):
    """x (B, L, h, d) by torch's own depthwise convolution, padded on both sides and cut."""
    batch, length, heads, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch * heads, width, length)
    y = functional.conv1d(rows, conv.weight[0][:, None], conv.bias[0], padding=2, groups=width)
    return y[..., :-2].reshape(batch, heads, width, length).permute(0, 3, 1, 2)


def shifted(x):
    """Transformer-XL's shift of x (i, j, b, h): a column of zeros, another shape, a row less."""
    pad = x.new_zeros(len(x), 1, *x.shape[2:])
    flat = torch.cat((x, pad), 1).view(x.shape[1] + 1, len(x), *x.shape[2:])
    return flat[:-1].view_as(x)


def as_published(made, x, memory=None, conv=True, relative=True):
    """The published module on x (B, T, dim) behind memory (B, M, dim): einsums and the shift."""
    p, own = made.projection, made.attention
    whole = x if memory is None else torch.cat((memory, x), 1)
    q = p.q(x).unflatten(-1, (HEADS, -1))
    k, v = (f(whole).unflatten(-1, (HEADS, -1)) for f in (p.k, p.v))
    if own.value_bias is not None:
        v = v + own.value_bias
    if conv:
        q, k, v = (convolved(a, c) for a, c in ((q, own.conv_q), (k, own.conv_k), (v, own.conv_v)))
    q, k, v = (a.transpose(0, 1) for a in (q, k, v))
    i, j = len(q), len(k)
    scores = torch.einsum("ibhd,jbhd->ijbh", q + (own.key_bias if relative else 0), k)
    if relative:
        reach = len(own.distances) // 2
        rows = slice(reach - j, reach + i)
        by_row = torch.einsum("ibhd,jhd->ijbh", q, own.distances[rows])
        by_row = by_row + own.distance_bias[rows][None, :, None]
        scores = scores + shifted(by_row)[:, -j:]
    later = torch.arange(j) - (j - i) > torch.arange(i)[:, None]
    scores = scores * q.shape[-1] ** -0.5
    probs = scores.masked_fill(later[..., None, None], -torch.inf).softmax(1)
    out = torch.einsum("ijbh,jbhd->ibhd", probs, v).transpose(0, 1).flatten(2)
    return p.out(out)


@torch.no_grad()
def identity_filters(made):
    for conv in (made.attention.conv_q, made.attention.conv_k, made.attention.conv_v):
        conv.weight.copy_(torch.tensor([0.0, 0, 1]).expand_as(conv.weight))
        conv.bias.zero_()


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [0, 5])
def test_oracle_1_identity_filters_are_transformer_xl_with_learnt_keys(memory):
    made, x = layer(), tokens(11)
    identity_filters(made)
    held = tokens(memory, seed=3) if memory else None
    want = as_published(made, x, held, conv=False)
    got = made(x, x if held is None else torch.cat((held, x), 1), mask=causal()).y
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    plain = layer("rcmha(kernel=1, reach=64)")
    plain.load_state_dict(made.state_dict(), strict=False)
    torch.testing.assert_close(plain(x, mask=causal()).y, as_published(made, x, conv=False))


@pytest.mark.parametrize("memory", [0, 5])
def test_the_whole_is_as_published(memory):
    made, x = layer(), tokens(11)
    held = tokens(memory, seed=3) if memory else None
    got = made(x, x if held is None else torch.cat((held, x), 1), mask=causal()).y
    torch.testing.assert_close(got, as_published(made, x, held), atol=1e-10, rtol=0)


def test_oracle_2_at_the_start_it_is_causal_softmax_with_memory():
    made, x, held = layer(), tokens(), tokens(5, seed=3)
    identity_filters(made)
    made.attention.reset_parameters()  # E, beta, u and b_v
    whole = torch.cat((held, x), 1)
    p = made.projection
    k, v = p.expand(p.entries(whole))
    o = attention(p.query(x), k, v, causal(), backend="reference").out
    torch.testing.assert_close(made(x, whole, mask=causal()).y, p.output(o, x), atol=1e-6, rtol=0)


def test_oracle_3_a_linear_distance_bias_is_alibi():
    made, x = layer("rcmha(reach=16)"), tokens()
    identity_filters(made)
    own = made.attention
    own.reset_parameters()
    slopes, width = alibi_slopes(HEADS).double(), DIM // HEADS
    with torch.no_grad():
        away = torch.arange(-16, 16).abs().double()
        own.distance_bias.copy_(-slopes * away[:, None] * width**0.5)
    p = made.projection
    q, (k, v) = p.query(x), p.expand(p.entries(x))
    o = attention(q, k, v, causal(), bias=foveate.alibi(slopes, 10), backend="reference").out
    torch.testing.assert_close(made(x, mask=causal()).y, p.output(o, x))


@pytest.mark.parametrize("changed", [0, 4, 10])
def test_oracle_4_a_token_changes_nothing_before_it_and_three_of_its_successors(changed):
    made, x = layer(), tokens()
    other = x.clone()
    other[:, changed] += 1
    before, after = made(x, mask=causal()).y, made(other, mask=causal()).y
    assert torch.equal(before[:, :changed], after[:, :changed])
    own, p = made.attention, made.projection
    for conv, maps in ((own.conv_q, p.q), (own.conv_k, p.k), (own.conv_v, p.v)):
        one, two = (conv(maps(a).unflatten(-1, (HEADS, -1)).transpose(1, 2)) for a in (x, other))
        differs = (one != two).any(-1).any(1).any(0).nonzero()[:, 0].tolist()
        assert differs == list(range(changed, min(changed + 3, 11)))


@pytest.mark.parametrize(("q_len", "kv_len"), [(3, 3), (3, 5), (1, 4), (4, 4)])
def test_oracle_5_the_shift_is_a_look_up_by_distance(q_len, kv_len):
    own = make("rcmha(reach=8)").build(Heads(8, 2, 2, 4, 4)).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in (own.distances, own.distance_bias):
            x.copy_(torch.randint(-9, 10, x.shape, generator=random))
    q = torch.randint(-9, 10, (1, 2, q_len, 4), generator=random).double()
    naive = torch.zeros(q_len, kv_len, 2, dtype=torch.float64)
    for i in range(q_len):
        for j in range(kv_len):
            row = 8 + j - (kv_len - q_len) - i
            for h in range(2):
                naive[i, j, h] = q[0, h, i] @ own.distances[row, h] + own.distance_bias[row, h]
    rows = slice(8 - kv_len, 8 + q_len)
    table = torch.einsum("ihd,jhd->ijh", q[0].transpose(0, 1), own.distances[rows])
    table = table + own.distance_bias[rows]
    assert torch.equal(shifted(table[:, :, None])[:, -kv_len:, 0], naive)
    bias = own.by_distance(q, kv_len, scale=1.0, causal=False)
    assert torch.equal(
        spread_bias(bias.four(), bias.first, q_len, kv_len)[0].permute(1, 2, 0), naive
    )
    bias = own.by_distance(q, kv_len, scale=1.0)
    later = torch.arange(kv_len) - (kv_len - q_len) > torch.arange(q_len)[:, None]
    full = spread_bias(bias.four(), bias.first, q_len, kv_len)[0].permute(1, 2, 0)
    assert torch.equal(
        full.masked_fill(later[..., None], 0), naive.masked_fill(later[..., None], 0)
    )


@pytest.mark.parametrize("projection", ["mha", "gqa(kv_heads=2)"])
@pytest.mark.parametrize("cuts", [(1,) * 11, (5, 6), (2, 1, 1, 7), (9, 2)])
def test_oracle_6_steps_and_segments_equal_the_whole(cuts, projection):
    made, x = layer(projection=projection), tokens()
    cache = made.new_cache()
    with torch.no_grad():
        parts = [made(part, mask=causal(), cache=cache).y for part in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), made(x, mask=causal()).y, atol=1e-10, rtol=0)
    assert len(cache) == 11
    heads = made.attention.heads.kv
    rings = 2 * (HEADS + 2 * heads) * 8
    assert cache.elements_per_token == 2 * heads * 8
    assert cache.bytes() == 2 * (11 * cache.elements_per_token + rings) * 8
    assert sum(prod(f.shape) * f.limit for f in cache.fields if f.unit == "ring") == rings


def test_oracle_7_the_convolution_against_torchs_own_and_three_taps():
    conv, x = HeadConvolution(3, 5).double(), torch.randn(2, 3, 9, 5, dtype=torch.float64)
    padded = functional.pad(x, (0, 0, 2, 0))
    rows = padded.transpose(2, 3).reshape(6, 5, 11)
    want = functional.conv1d(rows, conv.weight[0][:, None], conv.bias[0], groups=5)
    torch.testing.assert_close(conv(x), want.reshape(2, 3, 5, 9).transpose(2, 3))
    w = conv.weight[0]
    for t in range(9):
        taps = sum(w[:, a] * x[:, :, t - 2 + a] for a in range(3) if t - 2 + a >= 0)
        torch.testing.assert_close(conv(x)[:, :, t], taps + conv.bias[0])
    torch.testing.assert_close(conv(x[:, :, 4:], before=x[:, :, 2:4]), conv(x)[:, :, 4:])
    own = HeadConvolution(3, 5, shared_heads=False).double()
    apart = functional.conv1d(
        padded.transpose(2, 3).reshape(2, 15, 11), own.weight.reshape(15, 1, 3),
        own.bias.reshape(15), groups=15,
    )  # fmt: skip
    torch.testing.assert_close(own(x), apart.reshape(2, 3, 5, 9).transpose(2, 3))


def test_oracle_8_scores_depend_on_distances_alone():
    """Without the first token the scores of pairs stay, but for two steps of the convolution."""
    made, x = layer(), tokens(10, 1)
    own = made.attention

    def scores(x):
        p = made.projection
        q, k = own.conv_q(p.query(x)), own.conv_k(p.entries(x)["k"])
        bias = own.by_distance(q, x.shape[1])
        full = (q + own.key_bias[:, None]) @ k.mT * q.shape[-1] ** -0.5
        full = full + spread_bias(bias.four(), bias.first, x.shape[1], x.shape[1])
        return full.tril()

    torch.testing.assert_close(scores(x)[..., 3:, 3:], scores(x[:, 1:])[..., 2:, 2:])
    assert not torch.allclose(scores(x)[..., 2:, 2:], scores(x[:, 1:])[..., 1:, 1:])


# -- memory ----------------------------------------------------------------------------------------
def test_reset_segments_are_the_published_ones():
    """The memory's keys are made anew, and the convolution starts from zeros on both sides."""
    made, x = layer("rcmha(reach=64, segment_conv='reset', memory=5)"), tokens(12)
    cache, parts = made.new_cache(), []
    for part in x.split(3, 1):
        parts.append(made(part, mask=causal(), cache=cache).y)
    for i, got in enumerate(parts):
        held = x[:, max(0, 3 * i - 5) : 3 * i]
        torch.testing.assert_close(got, as_published(made, x[:, 3 * i : 3 * i + 3], held))
    assert cache.bytes() == 2 * 5 * DIM * 8
    assert cache.elements_per_token == 0


def test_a_memory_with_a_limit_sees_so_many_tokens_before_a_segment():
    made, x = layer("rcmha(reach=64, memory=4)"), tokens(12)
    cache = made.new_cache()
    got = torch.cat([made(part, mask=causal(), cache=cache).y for part in x.split(3, 1)], 1)
    p, own = made.projection, made.attention
    q, k = own.conv_q(p.query(x)), own.conv_k(p.entries(x)["k"])
    v = own.conv_v(p.entries(x)["v"] + own.value_bias[:, None])
    i, j = torch.arange(12)[:, None], torch.arange(12)
    seen = (j <= i) & (j >= i // 3 * 3 - 4)
    bias = own.by_distance(q, 12)
    o = attention(
        q + own.key_bias[:, None], k, v, seen,
        bias=spread_bias(bias.four(), bias.first, 12, 12), backend="reference",
    ).out  # fmt: skip
    torch.testing.assert_close(got, p.output(o, x))
    assert cache.bytes() == 2 * (4 * 2 + 2 * 3) * DIM * 8


@pytest.mark.parametrize("how", ["carry", "reset"])
def test_a_limited_memory_under_padding(how):
    made, x = layer(f"rcmha(reach=64, memory=4, segment_conv='{how}')"), tokens(12)
    pads = torch.tensor([0, 2])
    at = torch.arange(12) - pads[:, None]
    cache, alone, parts, wanted = made.new_cache(), made.new_cache(), [], []
    for start in range(0, 12, 3):
        stop = start + 3
        ctx = Context(
            mask=causal() & padding((stop - pads).clamp(min=0)),
            q_positions=at[:, start:stop], kv_positions=at[:, :stop],
        )  # fmt: skip
        parts.append(made(x[:, start:stop], cache=cache, ctx=ctx).y)
        wanted.append(made(x[1:, max(2, start) : stop], mask=causal(), cache=alone).y)
    torch.testing.assert_close(torch.cat(parts, 1)[1:, 2:], torch.cat(wanted, 1))


@pytest.mark.parametrize(("how", "learns"), [("carry", False), ("reset", True)])
def test_gradients_stay_in_the_segment(how, learns):
    """Not into the memory's tokens; into W_k through them only where they are projected anew."""
    made = layer(f"rcmha(reach=64, segment_conv='{how}')").train()
    first, second = tokens(4).requires_grad_(), tokens(1, seed=5)
    cache = made.new_cache()
    made(first, mask=causal(), cache=cache)
    y = made(second, mask=causal(), cache=cache).y
    y.square().sum().backward()
    assert first.grad is None
    made.zero_grad()
    # What the memory's tokens, projected in this call, let W_k learn.
    whole = torch.cat((first.detach(), second), 1)
    made(second, whole, mask=causal()).y.square().sum().backward()
    through = made.projection.k.weight.grad.clone()
    made.zero_grad()
    cache = made.new_cache()
    made(first, mask=causal(), cache=cache)
    made(second, mask=causal(), cache=cache).y.square().sum().backward()
    assert torch.allclose(made.projection.k.weight.grad, through) is learns


# -- what else it owes -----------------------------------------------------------------------------
def test_grouped_heads_are_repeated_heads():
    made, wide = layer(projection="gqa(kv_heads=2)"), layer()
    state = made.state_dict()
    for name in ("k", "v"):
        rows = state[f"projection.{name}.weight"].unflatten(0, (2, -1))
        state[f"projection.{name}.weight"] = rows.repeat_interleave(2, 0).flatten(0, 1)
    state["attention.value_bias"] = state["attention.value_bias"].repeat_interleave(2, 0)
    wide.load_state_dict(state)
    x = tokens()
    torch.testing.assert_close(made(x, mask=causal()).y, wide(x, mask=causal()).y)


@pytest.mark.parametrize("how", ["carry", "reset"])
def test_another_batch_is_refused(how):
    made, x = layer(f"rcmha(reach=64, segment_conv='{how}')"), tokens()
    cache = made.new_cache()
    made(x, mask=causal(), cache=cache)
    with pytest.raises(InputError, match="holds 2 sequences, but 1 go on"):
        made(x[:1], mask=causal(), cache=cache)
    assert len(cache) == 11


def test_parts_left_out_are_the_other_three():
    x = tokens()
    for spec, conv, relative in (
        ("rcmha(reach=64, kernel=1)", False, True),
        ("rcmha(relative=False)", True, False),
        ("rcmha(kernel=1, relative=False, value_bias=False)", False, False),
    ):
        made = layer(spec)
        want = as_published(made, x, conv=conv, relative=relative)
        torch.testing.assert_close(made(x, mask=causal()).y, want)


def test_parameters_are_counted_as_on_the_sheet():
    own = make("rcmha(value_bias=False)").build(Heads(128, 8, 8, 16, 16))
    tables = 2 * 4096 * 8 * 17
    assert tables == 1_114_112
    assert sum(p.numel() for p in own.parameters()) == 3 * (3 * 16 + 16) + tables + 128
    primer = make("rcmha(relative=False, value_bias=False, shared_heads=False)")
    assert (
        sum(p.numel() for p in primer.build(Heads(128, 8, 8, 16, 16)).parameters()) == 3 * 4 * 128
    )


def test_distances_beyond_the_reach_count_as_the_farthest():
    near, far = layer("rcmha(reach=4)"), layer("rcmha(reach=64)")
    far.load_state_dict(near.state_dict() | {
        f"attention.{name}": torch.cat((
            getattr(near.attention, name)[:1].expand(60, *tail), getattr(near.attention, name),
            torch.zeros(60, *tail),
        ))
        for name, tail in (("distances", (HEADS, 8)), ("distance_bias", (HEADS,)))
    })  # fmt: skip
    x = tokens()
    torch.testing.assert_close(near(x, mask=causal()).y, far(x, mask=causal()).y)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_padding_changes_nothing_whatever_it_holds(side, both_ways):
    made, x = layer(), tokens()
    counts = torch.tensor([11, 7])
    at = torch.arange(11).expand(2, -1)
    real = slice(0, 7)
    if side == "left":
        at, real = at - (11 - counts)[:, None], slice(4, 11)
        x[1, :4] = 1e9
    else:
        x[1, 7:] = 1e9
    mask = padding(counts) if both_ways else causal() & padding(counts)
    y = made(x, ctx=Context(mask=mask, q_positions=at, kv_positions=at)).y
    alone = None if both_ways else causal()
    torch.testing.assert_close(y[1:, real], made(x[1:, real], mask=alone).y)
    torch.testing.assert_close(y[:1], made(x[:1], mask=alone).y)


def test_packed_documents_dont_mix():
    made, x = layer(), tokens(11, 1)
    y = made(x, mask=causal() & documents([0, 4, 11])).y
    parts = [made(x[:, :4], mask=causal()).y, made(x[:, 4:], mask=causal()).y]
    torch.testing.assert_close(y, torch.cat(parts, 1))


def test_both_ways_scores_by_distance_on_both_sides():
    made, x = layer("rcmha(reach=6)"), tokens()
    p, own = made.projection, made.attention
    q, k = own.conv_q(p.query(x)), own.conv_k(p.entries(x)["k"])
    v = own.conv_v(p.entries(x)["v"] + own.value_bias[:, None])
    away = (torch.arange(11) - torch.arange(11)[:, None]).clamp(-6, 5) + 6
    table = torch.einsum("bhid,ijhd->bhij", q, own.distances[away])
    table = table + own.distance_bias[away].permute(2, 0, 1)
    scores = (q + own.key_bias[:, None]) @ k.mT + table
    want = p.output((scores * 8**-0.5).softmax(-1) @ v, x)
    torch.testing.assert_close(made(x).y, want)


@pytest.mark.parametrize("spec", ["rcmha(reach=64)", "rcmha(relative=False, shared_heads=False)"])
def test_gradients_against_the_published_form_and_into_everything(spec):
    made, x = layer(spec), tokens(9).requires_grad_()
    relative = made.attention.key_bias is not None
    weight = torch.randn(2, 9, DIM, dtype=torch.float64)
    (made(x, mask=causal()).y * weight).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), name
    if not relative:
        return
    ours = {name: parameter.grad.clone() for name, parameter in made.named_parameters()}
    grad = x.grad.clone()
    made.zero_grad()
    x.grad = None
    (as_published(made, x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, grad)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_low_precision(dtype, band):
    made, x = layer(projection="gqa(kv_heads=2)"), tokens(33)
    exact = made(x, mask=causal()).y
    low = made.to(dtype)(x.to(dtype), mask=causal()).y
    assert low.dtype == dtype
    assert (low.double() - exact).abs().max() < band * exact.abs().max()


def test_what_is_refused():
    with pytest.raises(InputError, match="segment_conv='carri'.*carry"):
        make("rcmha(segment_conv='carri')")
    for bad in ("kernel=0", "reach=0", "memory=0"):
        with pytest.raises(InputError, match=bad.partition("=")[0]):
            make(f"rcmha({bad})")
    made, x = layer(), tokens()
    with pytest.raises(InputError, match="softcap has no place"):
        made(x, ctx=Context(mask=causal(), softcap=3.0))
    cache = made.new_cache()
    made(x, mask=causal(), cache=cache)
    with pytest.raises(InputError, match="none can be taken back"):
        cache.truncate(3)
    plain = layer("rcmha(kernel=1, reach=64)")
    cache = plain.new_cache()
    with torch.no_grad():
        plain(x, mask=causal(), cache=cache)
        cache.truncate(6)
        again = plain(x[:, 6:], mask=causal(), cache=cache).y
    torch.testing.assert_close(again, plain(x, mask=causal()).y[:, 6:])
    kept = layer("rcmha(reach=64, segment_conv='reset')")
    with pytest.raises(InputError, match="its memory"):
        kept(x, tokens(seed=9), mask=causal(), cache=kept.new_cache())


@pytest.mark.parametrize(
    ("queries", "q_at", "k_at"),
    [
        (5, [0, 1, 2, 3, 4], range(11)),  # the first ones
        (11, None, [0, 1, 2, 3, 4, 5, 6, 17, 18, 19, 20]),  # tokens are left out in between
        (11, [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6], range(11)),
    ],
)
def test_queries_elsewhere_than_at_the_end_are_refused(queries, q_at, k_at):
    """Distances are counted from the end, so that they would be wrong."""
    made, x = layer(), tokens(11)
    k_at = torch.tensor(list(k_at))
    ctx = Context(mask=causal(), q_positions=k_at if q_at is None else torch.tensor(q_at),
                  kv_positions=k_at)  # fmt: skip
    with pytest.raises(InputError, match="the last of the 11 keys"):
        made(x[:, :queries], x, ctx=ctx)


def test_more_queries_than_keys_are_refused():
    made, x = layer(), tokens(11)
    with pytest.raises(InputError, match="11 queries to be the last of the 5 keys"):
        made(x, x[:, :5])


@pytest.mark.parametrize("how", ["carry", "reset"])
@pytest.mark.parametrize("length", ["3", 2.5])
def test_a_length_that_is_no_whole_number_is_refused(how, length):
    made = layer(f"rcmha(reach=64, segment_conv='{how}')")
    cache = made.new_cache()
    made(tokens(), mask=causal(), cache=cache)
    with pytest.raises(InputError, match="truncate.*length"):
        cache.truncate(length)
    assert len(cache) == 11


def test_a_model_trains_on_segments_and_generates():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(0)
    config = FoveateConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        attention="rcmha(reach=32)", initializer_range=0.2, attention_out_bias=True,
    )  # fmt: skip
    model = FoveateForCausalLM(config)
    for name, parameter in model.named_parameters():
        if ".conv_" in name and name.endswith("weight"):  # torch's own start, not 0.02
            assert 0.2 < parameter.abs().max() <= 3**-0.5
        if "distance" in name or name.endswith("_bias"):
            assert not parameter.any()
    ids = torch.randint(31, (2, 12))
    cache = model.new_cache()
    for part in ids.split(6, 1):
        loss = model.train()(part, labels=part, past_key_values=cache).loss
        loss.backward()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wanted = ids
    for _ in range(4):
        logits = model(wanted, use_cache=False).logits[:, -1]
        wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), 1)
    got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(got, wanted)
    model.generate(ids, max_new_tokens=3, num_beams=3, pad_token_id=0)
