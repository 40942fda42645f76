"""foveate.Attention without sinks: sink logits, key/value biases and gates, in every phase."""

from __future__ import annotations

import pytest
import torch
from projections import DIM, HEADS, decoded, tokens

import foveate
from foveate import Context, causal, padding
from foveate.ops import attention, blocks, with_sinks
from foveate.ops.errors import InputError
from foveate.parts.again import Again
from foveate.parts.projection import split_heads

OPTIONS = (
    {"sink_logits": "one"},
    {"sink_logits": "learned"},
    *({"kv_bias": kind} for kind in ("key", "value", "key-value", "key-value-shared")),
    {"gate": "head"},
    {"gate": "element"},
    {"sink_logits": "learned", "kv_bias": "key-value", "gate": "element"},
)
EACH = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o.values()))


def layer(options, projection="gqa(kv_heads=2)", pattern="full", dtype=torch.float64, **more):
    torch.manual_seed(3)
    made = foveate.Attention(DIM, HEADS, projection, pattern, **options, **more).to(dtype)
    if made.sinks is not None:
        for p in made.sinks.parameters():
            torch.nn.init.normal_(p, 0.0, 0.7)
    return made


def by_definition(made, x, mask=None):
    """The layer by whole score matrices: one more column, one more row of values, the gate."""
    p, s = made.projection, made.sinks
    q, entries = p.query(x), p.entries(x)
    at = torch.arange(x.shape[1])
    q, k = made.rope.rotate(q, at), made.rope.rotate(entries["k"], at)
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, entries["v"]))
    scores = q @ k.mT * made.projection.scale
    table = causal() if mask is None else mask
    scores = scores.masked_fill(~table.dense(*scores.shape[2:]), -torch.inf)
    batch, heads, length, _ = q.shape
    columns, values = [scores], [v]
    if s.key is not None:
        key = s.key.expand(heads, -1)
        columns.append(torch.einsum("bhld,hd->bhl", q, key)[..., None] * made.projection.scale)
        extra = torch.zeros_like(v[:, :, :1])
        if s.value is not None:
            extra = extra + s.value[:, None]
        values.append(extra)
    if s.logits is not None:
        columns.append(s.logits[:, None, None].expand(batch, -1, length, 1))
        values.append(torch.zeros_like(v[:, :, :1]))
    out = torch.cat(columns, -1).softmax(-1) @ torch.cat(values, 2)
    if s.key is None and s.value is not None:
        out = out + s.value[:, None]
    if s.gate is not None:
        out = out * torch.sigmoid(split_heads(s.gate(x), heads))
    return p.output(out, x)


@EACH
def test_the_options_are_their_definitions_with_gradients(options):
    made, x = layer(options), tokens().requires_grad_()
    ours, theirs = made(x, mask=causal()).y, by_definition(made, x)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(ours)
    given = (x, *made.sinks.parameters(), *made.projection.parameters())
    for one, two in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
    ):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-11)


@EACH
@pytest.mark.parametrize(
    ("projection", "pattern"),
    [("gqa(kv_heads=2)", "full"), ("mfa", "sink-window(sinks=2, window=6)"), ("moh", "full")],
)
def test_decoding_equals_the_full_forward(options, projection, pattern):
    made = layer(options, projection, pattern).eval()
    x = tokens()
    whole = made(x, mask=causal()).y
    steps, cache = decoded(made, x, 9, 5)
    torch.testing.assert_close(steps, whole, atol=1e-11, rtol=1e-11)
    assert cache.bytes() == cache.elements_per_token * 8 * x.shape[0] * x.shape[1]  # nothing more


@EACH
def test_left_padding_and_low_precision(options):
    made, x = layer(options), tokens()
    pads = torch.tensor([0, 5])
    at = torch.arange(x.shape[1])[None] - pads[:, None]
    ctx = Context(mask=causal() & padding(x.shape[1] - pads), q_positions=at, kv_positions=at)
    y = made(x, ctx=ctx).y
    torch.testing.assert_close(y[1:, 5:], made(x[1:, 5:], mask=causal()).y)
    assert y.isfinite().all()
    half = made.to(torch.bfloat16)(x.to(torch.bfloat16), mask=causal()).y
    assert half.dtype == torch.bfloat16
    exact = layer(options)(x, mask=causal()).y
    torch.testing.assert_close(half.double(), exact, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("options", [{"sink_logits": "learned"}, {"gate": "head"}])
def test_absorbed_latents_decode_as_they_prefill(options):
    made = layer(options, "mla").eval()
    whole = made(x := tokens(), mask=causal()).y
    torch.testing.assert_close(decoded(made, x, 9, 1)[0], whole, atol=1e-10, rtol=1e-10)


def test_oracle_6_a_gate_of_nothing_halves():
    for gate in ("head", "element"):
        made = layer({"gate": gate}, dtype=torch.float32)
        plain = layer({}, dtype=torch.float32)
        made.sinks.gate.weight.data.zero_()
        made.load_state_dict(plain.state_dict(), strict=False)
        x = tokens(dtype=torch.float32)
        assert torch.equal(made(x, mask=causal()).y, plain(x, mask=causal()).y / 2)


def test_oracle_6_a_gate_is_qwen3_nexts():
    """Its queries' map has two chunks per head, [q | gate], each as wide as the head."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = qwen.Qwen3NextConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=1, attention_bias=False, layer_types=["full_attention"],
        attn_implementation="eager",
    )  # fmt: skip
    theirs = qwen.Qwen3NextAttention(config, 0).double()
    theirs.q_norm = theirs.k_norm = torch.nn.Identity()
    made = layer({"gate": "element"}, position="none", head_dim=8)
    both = theirs.q_proj.weight.data.unflatten(0, (HEADS, 2, 8))
    p = made.projection
    for ours, weight in (
        (p.q, both[:, 0].flatten(0, 1)), (made.sinks.gate, both[:, 1].flatten(0, 1)),
        (p.k, theirs.k_proj.weight), (p.v, theirs.v_proj.weight), (p.out, theirs.o_proj.weight),
    ):  # fmt: skip
        ours.weight.data.copy_(weight)
    x = tokens()
    still = torch.ones(2, x.shape[1], 8), torch.zeros(2, x.shape[1], 8)
    hidden = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    hidden = hidden.masked_fill(~causal().dense(*hidden.shape)[0, 0], -torch.inf)
    expected, _ = theirs(x, tuple(s.double() for s in still), hidden[None, None])
    # Their softmax is in fp32, whatever the weights are in.
    torch.testing.assert_close(made(x, mask=causal()).y, expected, atol=1e-6, rtol=0)


def test_oracle_2_a_key_bias_is_a_sink_logit_per_query():
    made, plain = layer({"kv_bias": "key"}), layer({})
    made.load_state_dict(plain.state_dict(), strict=False)
    x = tokens()
    p, at = made.projection, torch.arange(x.shape[1])
    q, entries = made.rope.rotate(p.query(x), at), p.entries(x)
    dense = attention(q, made.rope.rotate(entries["k"], at), entries["v"], causal())
    b = torch.einsum("bhld,hd->bhl", q, made.sinks.key) / q.shape[3] ** 0.5
    share = torch.sigmoid(dense.lse - b)[..., None]
    expected = p.output(dense.out * share, x)
    torch.testing.assert_close(made(x, mask=causal()).y, expected, atol=1e-14, rtol=1e-13)


def test_a_row_that_sees_nothing_gives_the_extra_key_alone():
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64, requires_grad=True).unbind(0)
    table = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    table[..., 2, :] = False
    score, value = torch.randn(1, 2, 4).double(), torch.randn(2, 1, 8).double()
    result = foveate.ops.with_key(attention(q, k, v, blocks(table, 1)), score, value)
    torch.testing.assert_close(result.out[:, :, 2], value[None, :, 0])
    torch.testing.assert_close(result.lse[:, :, 2], score[..., 2])
    sunk = with_sinks(attention(q, k, v, blocks(table, 1)), torch.zeros(2))
    assert (sunk.out[:, :, 2] == 0).all()
    assert (sunk.lse[:, :, 2] == 0).all()
    grads = torch.autograd.grad(result.out.sum() + result.lse.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


@EACH
def test_a_router_reads_weights_and_heads_with_the_options(options):
    """`Again` tells the weights that the layer used, and parts that sum to the layer's y."""
    made, x = layer(options), tokens()
    again = Again()
    y = made(x, ctx=Context(mask=causal(), again=again)).y
    torch.testing.assert_close(sum(again.projected()), y, atol=1e-12, rtol=1e-12)
    v = made.projection.entries(x)["v"].repeat_interleave(HEADS // 2, 1)
    for head in range(HEADS):
        # Other values for the text alone: those of this head, so that its output must come out.
        got = again(v[:, head])[:, head]
        s = made.sinks
        if s.value is not None:
            lost = 1.0 if s.key is None else 1.0 - again(torch.ones_like(v[:, 0, :, :1]))[:, head]
            if s.logits is not None:  # the mass that is lost is of two, k' and the logit
                continue
            got = got + lost * s.value.expand(HEADS, -1)[head]
        torch.testing.assert_close(got, again._call.heads[:, head], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layer({"sink_logits": "none"}), "sink_logits='none'"),
        (lambda: layer({"kv_bias": "keys"}), "did you mean 'key'"),
        (lambda: layer({"gate": "heads"}), "did you mean 'head'"),
        (lambda: layer({"kv_bias": "key"}, pattern="softpick"), "Softpick"),
        (lambda: layer({"sink_logits": "one"}, pattern="flowformer"), "Flowformer"),
        (lambda: layer({"kv_bias": "key"}, "mla"), "absorbed"),
        (lambda: layer({"gate": "element"}, "mla"), "absorbed"),
        (
            lambda: layer({"sink_logits": "one"})(
                tokens(), ctx=Context(mask=causal(), sink_logits=torch.zeros(HEADS))
            ),
            "has sink logits",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
