"""Sparse query attention: the spec's oracles 1 to 6, by their numbers."""

from __future__ import annotations

import pytest
import torch
from projections import DIM, decoded, layer, rotated, softmax_attention, tokens
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from foveate import Context, causal, explain, window
from foveate.methods import make
from foveate.methods.full import Full
from foveate.ops.errors import InputError
from foveate.parts.projection import Sizes

H = 8
D = 6  # DIM / H, whatever the number of query heads
VARIANTS = {"sqa": (4, 2), "ssqa": (4, 4), "xsqa": (2, 2), "xsmqa": (2, 1), "lsqa": (6, 2)}
ALL = pytest.mark.parametrize("variant", [*VARIANTS, "rsqa"])


def sqa(text="", dtype=torch.float64, **options):
    return layer(f"sqa({text})" if text else "sqa", dtype, num_heads=H, **options)


def by_definition(p, x, heads, kv_heads):
    q, k, v = (
        f(x).unflatten(2, (n, D)).transpose(1, 2)
        for f, n in ((p.q, heads), (p.k, kv_heads), (p.v, kv_heads))
    )
    o = softmax_attention(rotated(q), rotated(k), v, (DIM / H) ** -0.5)
    return functional.linear(o.transpose(1, 2).flatten(2), p.out.weight, p.out.bias)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_sqa_oracle_1_all_query_heads_are_mha_gqa_and_mqa(kv_heads):
    made, x = sqa(f"query_heads={H}, kv_heads={kv_heads}", torch.float32), tokens()
    expected = by_definition(made.double().projection, x, H, kv_heads)
    difference = made.float()(x.float(), mask=causal()).y - expected
    assert difference.abs().max() < 1e-6
    same = {8: "mha", 2: "gqa(kv_heads=2)", 1: "mqa"}[kv_heads]
    other = layer(same, torch.float32, num_heads=H)
    other.projection.load_state_dict(made.projection.state_dict())
    assert torch.equal(other(x.float(), mask=causal()).y, made(x.float(), mask=causal()).y)


@pytest.mark.parametrize(("variant", "counts"), VARIANTS.items())
def test_variants_have_the_papers_heads(variant, counts):
    recipe = make(f"sqa(variant={variant!r})")
    assert recipe.counts(H) == counts
    p = sqa(f"variant={variant!r}").projection
    assert (p.heads, p.kv_heads, p.head_dim, p.scale) == (*counts, D, D**-0.5)


@pytest.mark.parametrize(
    ("variant", "counts"),
    [("sqa", (8, 4)), ("ssqa", (8, 8)), ("xsqa", (4, 4)), ("xsmqa", (4, 1))],
)
def test_heads_of_the_dense_study(variant, counts):
    assert make(f"sqa(variant={variant!r})").counts(16) == counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_sqa_oracle_2_is_a_llama_layer_with_an_explicit_head_dim(variant):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    heads, kv_heads = VARIANTS[variant]
    config = LlamaConfig(
        hidden_size=DIM, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=D,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = llama.LlamaAttention(config, 0)
    made, x = sqa(f"variant={variant!r}", torch.float32), tokens(dtype=torch.float32)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
    weights = theirs.state_dict()
    made.projection.load_state_dict(
        {f"{ours}.weight": weights[f"{name}.weight"] for name, ours in names.items()}
    )
    length = x.shape[1]
    tables = llama.LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = theirs(x, position_embeddings=tables, attention_mask=mask)[0]
        assert (made(x, mask=causal()).y - expected).abs().max() < 1e-6


def test_sqa_oracle_3_heads_without_output_may_be_left_out():
    made, x = sqa("variant='ssqa'", torch.float32), tokens(dtype=torch.float32)
    full = layer("mha", torch.float32, num_heads=H)
    kept = 4 * D
    with torch.no_grad():
        full.projection.out.weight[:, kept:] = 0
        for name in ("q", "k", "v"):
            weight = getattr(full.projection, name).weight
            getattr(made.projection, name).weight.copy_(weight[:kept])
        made.projection.out.weight.copy_(full.projection.out.weight[:, :kept])
    assert (made(x, mask=causal()).y - full(x, mask=causal()).y).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("text", "millions"),
    [
        ("mha", 2.097), ("gqa(kv_heads=4)", 1.311), ("mqa", 1.114), ("sqa", 0.786),
        ("sqa(variant='ssqa')", 1.049), ("sqa(variant='xsqa')", 0.524),
        ("sqa(variant='xsmqa')", 0.328),
    ],
)  # fmt: skip
def test_sqa_oracle_4_parameters_of_the_dense_study(text, millions):
    count = sum(p.numel() for p in make(text).build(Sizes(256, 16)).parameters())
    assert round(8 * count / 1e6, 3) == millions


def test_sqa_oracle_4_parameters_by_formula():
    for variant, (heads, kv_heads) in VARIANTS.items():
        p = sqa(f"variant={variant!r}").projection
        assert sum(x.numel() for x in p.parameters()) == DIM * D * (2 * heads + 2 * kv_heads)


@ALL
def test_sqa_oracle_4_flops_and_cache_bytes(variant):
    made, x = sqa(f"variant={variant!r}", torch.float32), tokens(dtype=torch.float32)

    def flops(layer):
        """Of the attention in it: all less the linear maps."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x, ctx=Context(mask=causal(), backend="reference"))
        maps = sum(p.numel() for p in layer.parameters())
        return counter.get_total_flops() - 2 * x.shape[0] * x.shape[1] * maps

    p, mha = made.projection, layer("mha", torch.float32, num_heads=H)
    assert flops(mha) == 4 * 2 * 37**2 * DIM
    assert flops(mha) * p.heads == flops(made) * H
    ours, theirs = (decoded(m, x, 9)[1].bytes() for m in (made, mha))
    assert ours * H == theirs * p.kv_heads


def test_sqa_oracle_5_reverse_is_gqa_with_tied_query_heads():
    made, x = sqa("variant='rsqa'"), tokens()
    p = made.projection
    assert (p.q.out_features, p.k.out_features, p.out.in_features) == (2 * D, 4 * D, 4 * D)
    tied = sqa("query_heads=4, kv_heads=4")
    with torch.no_grad():
        repeated = p.q.weight.unflatten(0, (2, D)).repeat_interleave(2, 0).flatten(0, 1)
        tied.projection.q.weight.copy_(repeated)
        for name in ("k", "v", "out"):
            getattr(tied.projection, name).weight.copy_(getattr(p, name).weight)
    torch.testing.assert_close(made(x, mask=causal()).y, tied(x, mask=causal()).y)


def test_sqa_oracle_5_a_window_as_long_as_the_sequence_changes_nothing():
    made, x = sqa(), tokens()
    for size, same in ((37, True), (36, False)):
        windowed = sqa(attention=f"sink-window(sinks=0, window={size})")
        y = windowed(x, mask=causal()).y
        assert torch.allclose(y, made(x, mask=causal()).y, atol=1e-12, rtol=0) is same


@ALL
def test_sqa_oracle_5_causality_and_decoding(variant):
    made, x = sqa(f"variant={variant!r}", torch.float32), tokens(dtype=torch.float32)
    whole = made(x, mask=causal()).y
    assert (decoded(made, x, 11)[0] - whole).abs().max() < 1e-5
    other = x.clone()
    other[:, 20:] += 1
    assert torch.equal(made(other, mask=causal()).y[:, :20], whole[:, :20])


def test_sqa_oracle_6_symmetric_form_repeats_nothing():
    seen = []

    class Spy(Full):
        def __call__(self, q, k, v, ctx=None):
            seen.append((q, k, explain(q, k, v, ctx.mask)))
            return super().__call__(q, k, v, ctx)

    made, x = sqa("variant='ssqa'", torch.float32, attention=Spy()), tokens(dtype=torch.float32)
    made(x, mask=causal())
    q, k, told = seen[0]
    assert q.shape[1] == k.shape[1] == 4
    assert told.backend in ("cpu", "sdpa")


def test_flex_sqa_merges_the_window_with_learned_tokens():
    made = sqa("global_tokens=3", attention="sink-window(sinks=0, window=8)")
    x, p = tokens(), made.projection
    q, k, v = (f(x).unflatten(2, (-1, D)).transpose(1, 2) for f in (p.q, p.k, p.v))
    gk, gv = (f(p.globals).unflatten(1, (-1, D)).transpose(0, 1)[None] for f in (p.k, p.v))
    k, v = (torch.cat((g.expand(2, -1, -1, -1), y), 2) for g, y in ((gk, rotated(k)), (gv, v)))
    near = (causal() & window(7, 0)).dense(37, 37)[0, 0]
    seen = torch.cat((torch.ones(37, 3, dtype=torch.bool), near), 1)
    o = softmax_attention(rotated(q), k, v, D**-0.5, causal=False, allowed=seen)
    expected = p.out(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(made(x, mask=causal()).y, expected)
    steps, cache = decoded(made, x, 9)
    torch.testing.assert_close(steps, expected)
    assert len(cache) == 37  # learned tokens need no place in it


def test_flex_sqa_drops_weights_of_learned_tokens_too():
    """Values of ones come out as 1 without dropout, and as many different numbers with it."""
    made = sqa("global_tokens=9", attention="sink-window(sinks=0, window=1)", dropout=0.5).train()
    p, x = made.projection, tokens()
    with torch.no_grad():
        p.v.weight.zero_()
        p.q.weight.zero_()
        p.v.weight[:, 0] = 1
        p.globals[:, 0] = 1
        p.out.weight.copy_(torch.eye(4 * D, DIM).T)
    x[..., 0] = 0  # only learned tokens have values, nine out of ten in each row
    assert len(made(x, mask=causal()).y[..., 0].unique()) > 3


@pytest.mark.parametrize(
    ("text", "heads", "said"),
    [
        ("sqa(variant='ysqa')", 8, "did you mean"),
        ("sqa", 6, "no whole number of key/value heads"),
        ("sqa(query_heads=9, kv_heads=1)", 8, "at most as many"),
        ("sqa(query_heads=4, kv_heads=3)", 8, "can't share 3"),
        ("sqa(query_heads=3, kv_heads=4)", 8, "can't be repeated"),
        ("sqa(query_heads=0)", 8, "at least 1"),
    ],
)
def test_refusals(text, heads, said):
    with pytest.raises(InputError, match=said):
        make(text).build(Sizes(DIM, heads))
