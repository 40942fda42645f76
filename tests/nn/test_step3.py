"""MFA and MFA-KR: the spec's oracles 1 to 5 and 9, by their numbers."""

from __future__ import annotations

import pytest
import torch
from projections import DIM, HEADS, decoded, layer, rotated, softmax_attention, tokens
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from foveate import Context, causal
from foveate.methods import make
from foveate.methods.full import Full
from foveate.ops.errors import InputError
from foveate.parts.projection import Sizes

WIDE = "mfa(head_dim=32, query_rank=20)"
REUSE = "mfa-kr(head_dim=32, query_rank=20)"


def by_definition(p, x, value=None):
    """Steps A.1 to A.5 with k and v repeated for every head, and torch's own attention."""
    z = p.q_down(x)
    if hasattr(p.q_norm, "weight"):
        z = functional.rms_norm(z, z.shape[-1:], p.q_norm.weight, 1e-5)
    q = rotated(p.q_up(z).unflatten(2, (p.heads, -1)).transpose(1, 2))
    k = rotated(p.k(x)[:, None]).repeat(1, p.heads, 1, 1)
    v = (p.v(x) if value is None else value)[:, None].repeat(1, p.heads, 1, 1)
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return functional.linear(o.transpose(1, 2).flatten(2), p.out.weight)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_step3_oracle_1_is_multi_query_attention_with_a_factorised_query(dtype, most):
    made, x = layer(WIDE, dtype), tokens(dtype=dtype)
    with torch.no_grad():
        made.projection.q_norm.weight.uniform_(0.5, 1.5)
        difference = made(x, mask=causal()).y - by_definition(made.projection, x)
    assert difference.abs().max() < most


def test_step3_oracle_2_degenerates_to_multi_query():
    mfa, mqa = layer(f"mfa(query_rank={DIM}, norm=False)"), layer("mqa")
    with torch.no_grad():
        mfa.projection.q_down.weight.copy_(torch.eye(DIM))
        for ours, theirs in (("q_up", "q"), ("k", "k"), ("v", "v"), ("out", "out")):
            getattr(mfa.projection, ours).weight.copy_(getattr(mqa.projection, theirs).weight)
    x = tokens()
    difference = mfa(x, mask=causal()).y - mqa(x, mask=causal()).y
    assert difference.abs().max() < 1e-6


def test_step3_oracle_2_one_head_is_single_head_attention():
    made, x = layer("mfa(head_dim=32, norm=False)", num_heads=1), tokens()
    p = made.projection
    q = rotated(x @ (p.q_up.weight @ p.q_down.weight).T)
    o = softmax_attention(
        q[:, None], rotated(x @ p.k.weight.T)[:, None], (x @ p.v.weight.T)[:, None], 32**-0.5
    )
    torch.testing.assert_close(made(x, mask=causal()).y, o[:, 0] @ p.out.weight.T)


@pytest.mark.parametrize(("rank", "width"), [(20, 32), (32, 20)])
def test_step3_oracle_3_rank_of_a_heads_bilinear_form(rank, width):
    p = layer(f"mfa(head_dim={width}, query_rank={rank}, norm=False)").projection
    for head in range(HEADS):
        q_c = p.q_up.weight[head * width : (head + 1) * width].T
        form = p.q_down.weight.T @ q_c @ p.k.weight
        assert torch.linalg.matrix_rank(form) == min(rank, width)


def test_step3_oracle_3_rank_of_mla():
    p = layer("mla(latent=24, rope_dim=4)").projection
    for head in range(HEADS):
        q = p.q_up.weight.unflatten(0, (HEADS, -1))[head, :12]
        k = p.key_up()[head] @ p.kv_down.weight[:24]
        assert torch.linalg.matrix_rank(q.T @ k) == 12


def reused(alpha=None, n=None):
    made = layer(REUSE)
    with torch.no_grad():
        if alpha is not None:
            made.projection.alpha.copy_(alpha)
        if n is not None:
            made.projection.reuse.copy_(n)
    return made


def test_step3_oracle_4_alpha_zero_is_value_equal_to_key():
    made, x = reused(alpha=torch.zeros(32)), tokens()
    expected = by_definition(made.projection, x, made.projection.k(x))
    torch.testing.assert_close(made(x, mask=causal()).y, expected)


def test_step3_oracle_4_identity_doubles_the_key():
    made, x = reused(alpha=torch.ones(32), n=torch.eye(32)), tokens()
    expected = by_definition(made.projection, x, 2 * made.projection.k(x))
    torch.testing.assert_close(made(x, mask=causal()).y, expected)


def test_step3_oracle_4_any_factor():
    made, x = reused(alpha=torch.randn(32)), tokens()
    p = made.projection
    factor = torch.eye(32, dtype=x.dtype) + p.reuse @ torch.diag(p.alpha)
    expected = by_definition(p, x, p.k(x) @ factor)
    torch.testing.assert_close(made(x, mask=causal()).y, expected)


def test_step3_oracle_4_folding_into_the_output():
    made, x = reused(alpha=torch.randn(32)).float(), tokens(dtype=torch.float32)
    before = made(x, mask=causal()).y
    made.projection.fold_()
    assert not made.projection.alpha.any()
    assert (made(x, mask=causal()).y - before).abs().max() < 1e-5
    assert (decoded(made, x, 9)[0] - before).abs().max() < 1e-5


def test_step3_oracle_4_gradients_at_the_start():
    made, x = layer(REUSE), tokens()
    made.projection.alpha.data.zero_()
    made(x, mask=causal()).y.square().sum().backward()
    assert made.projection.alpha.grad.abs().min() > 0
    assert torch.equal(made.projection.reuse.grad, torch.zeros(32, 32, dtype=x.dtype))


def test_key_reuse_starts_from_alpha_zero():
    p = make("mfa-kr").build(Sizes(DIM, HEADS))
    assert not p.alpha.any()
    assert p.reuse.any()


@pytest.mark.parametrize("key", [WIDE, REUSE])
def test_step3_oracle_5_decoding_and_causality(key):
    made, x = layer(key, torch.float32), tokens(dtype=torch.float32)
    if "kr" in key:
        made.projection.alpha.data.normal_()
    whole = made(x, mask=causal()).y
    assert (decoded(made, x, 20)[0] - whole).abs().max() < 1e-5
    other = x.clone()
    other[:, 30] += 1
    assert torch.equal(made(other, mask=causal()).y[:, :30], whole[:, :30])


@pytest.mark.parametrize(("key", "elements"), [(WIDE, 64), (REUSE, 32)])
def test_the_cache_keeps_2c_or_c(key, elements):
    _, cache = decoded(layer(key).float(), tokens(dtype=torch.float32), 9)
    assert cache.elements_per_token == elements
    assert cache.bytes() == 2 * 37 * elements * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step3_oracle_9_arithmetic_intensity_of_decoding(dtype):
    """Of a whole decoding step, less its linear maps: 2 m over the bytes of a number."""
    heads, width, n = 16, 32, 512
    seen = []

    class Spy(Full):
        def __call__(self, q, k, v, ctx=None):
            seen.append((q, k, v))
            return super().__call__(q, k, v, ctx)

    made = layer(f"mfa(head_dim={width})", dtype, num_heads=heads, attention=Spy())
    x = tokens(n, 1, dtype)
    _, cache = decoded(made, x[:, :-1], n - 1)
    ctx = Context(mask=causal(), phase="decode", backend="reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x[:, -1:], cache=cache, ctx=ctx)
    linear = 2 * sum(p.numel() for p in made.parameters() if p.dim() == 2)
    flops = counter.get_total_flops() - linear
    assert flops == 4 * heads * width * n
    q, k, v = seen[-1]
    size = q.element_size()
    for x, name in ((k, "k"), (v, "v")):  # one head, read where it lies
        assert x.shape == (1, 1, n, width)
        assert x.data_ptr() == cache.entries[name].data_ptr()
    assert flops / cache.bytes() == 2 * heads / size
    traffic = cache.bytes() + 2 * q.numel() * size  # q and what comes out
    assert 0.95 * 2 * heads / size < flops / traffic < 2 * heads / size


def test_parameters_of_step3():
    """D r_q + r_q m C + 2 D C + m C D, 169.3 million at Step-3's sizes (and the norm's r_q)."""
    with torch.device("meta"):
        p = make("mfa(head_dim=256, query_rank=2048)").build(Sizes(7168, 64))
    count = sum(x.numel() for name, x in p.named_parameters() if "norm" not in name)
    assert count == 7168 * 2048 + 2048 * 64 * 256 + 2 * 7168 * 256 + 64 * 256 * 7168
    assert round(count / 1e6, 1) == 169.3


@pytest.mark.parametrize("text", ["mfa(head_dim=0)", "mfa-kr(query_rank=0)"])
def test_refusals(text):
    with pytest.raises(InputError, match="at least 1"):
        make(text)
