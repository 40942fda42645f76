"""Flow-Attention against its quadratic form, its conservation laws and worked examples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate import Context, causal, documents, padding
from foveate.methods import make
from foveate.methods.flowformer import Flowformer
from foveate.ops.errors import InputError
from foveate.parts import StateCache

ABLATIONS = [(True, True), (False, True), (True, False), (False, False)]


def tensors(n=37, m=None, heads=4, kv=2, batch=2, dtype=torch.float64):
    m = n if m is None else m
    shapes = (batch, heads, n, 8), (batch, kv, m, 8), (batch, kv, m, 5)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def quadratic(
    q, k, v, *, causal, eps=1e-6, clamp=None, phi=torch.sigmoid, competition=True, allocation=True
) -> Tensor:
    """The definition, one head and one row at a time, with W = fq fk^T written out."""
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            fq, fk, vv = phi(q[b, h]), phi(k[b, h // group]), v[b, h // group]
            n, m = len(fq), len(fk)
            if causal:
                I, O, Ihat, Ohat, c, a = ([None] * n for _ in range(6))
                for t in range(n):
                    past, count = slice(0, t + 1), t + 1
                    I[t] = (fq[t] + eps) @ (fk[past].sum(0) + eps)
                    O[t] = (fk[t] + eps) @ (fq[past].sum(0) + eps)
                    rO = torch.stack([(s + 1) / O[s] for s in range(count)])
                    rI = torch.stack([(s + 1) / I[s] for s in range(count)])
                    Ihat[t] = (fq[t] + eps) @ ((fk[past] * rO[:, None]).sum(0) + eps) / count
                    Ohat[t] = (fk[t] + eps) @ ((fq[past] * rI[:, None]).sum(0) + eps) / count
                    if clamp is not None:
                        Ohat[t] = Ohat[t].clamp(-clamp, clamp)
                    c[t] = count * torch.exp(Ohat[t]) / torch.exp(torch.stack(Ohat[: t + 1])).sum()
                    a[t] = torch.sigmoid(Ihat[t])
                I, c, a = torch.stack(I), torch.stack(c), torch.stack(a)
                W = (fq @ fk.T).tril()
            else:
                I = (fq + eps) @ (fk.sum(0) + eps)
                O = (fk + eps) @ (fq.sum(0) + eps)
                Ihat = (fq + eps) @ ((fk / O[:, None]).sum(0) + eps)
                Ohat = (fk + eps) @ ((fq / I[:, None]).sum(0) + eps)
                if clamp is not None:
                    Ohat = Ohat.clamp(-clamp, clamp)
                c = m * Ohat.softmax(0)
                a = torch.sigmoid(Ihat * n / m)
                W = fq @ fk.T
            c = c if competition else torch.ones_like(c)
            a = a if allocation else torch.ones_like(a)
            out[b, h] = (a / I)[:, None] * W * c @ vv
    return out


def mask_of(is_causal):
    return Context(mask=causal() if is_causal else None)


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_oracle_1_linear_form_is_the_quadratic_form(is_causal, eps):
    q, k, v = tensors()
    ours = Flowformer(eps=eps, chunk=8)(q, k, v, mask_of(is_causal)).out
    clamp = 10 if is_causal else None
    expected = quadratic(q, k, v, causal=is_causal, eps=eps, clamp=clamp)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def test_oracle_2_flows_are_conserved():
    q, k, _ = tensors(31, 19, kv=4)
    method = Flowformer(eps=0.0, clamp=None)
    flows = method.flows(q, k)
    full = torch.full((2, 4), 1.0, dtype=torch.float64)
    torch.testing.assert_close(flows.conserved_in.sum(-1), 19 * full, atol=1e-10, rtol=0)
    torch.testing.assert_close(flows.conserved_out.sum(-1), 31 * full, atol=1e-10, rtol=0)
    capacities = method.features(q) @ method.features(k).mT
    leaving = (capacities / flows.outgoing[:, :, None]).sum(2)
    coming = (capacities / flows.incoming[..., None]).sum(3)
    torch.testing.assert_close(leaving, torch.ones_like(leaving), atol=1e-12, rtol=0)
    torch.testing.assert_close(coming, torch.ones_like(coming), atol=1e-12, rtol=0)
    torch.testing.assert_close(flows.competition.mean(-1), full, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("eps", "band"), [(0.0, 1e-12), (1e-6, 2e-6)])
def test_oracle_3_constant_queries_and_keys(eps, band):
    q, k, _ = tensors(kv=4)
    q, k, v = torch.full_like(q, 2.5), torch.full_like(k, 3.0), torch.rand(2, 4, 37, 5).double()
    half = torch.sigmoid(torch.ones((), dtype=torch.float64))
    out = Flowformer(eps=eps)(q, k, v).out
    expected = (half * v.mean(2, keepdim=True)).expand_as(v)
    torch.testing.assert_close(out, expected, atol=band, rtol=0)
    running = half * v.cumsum(2) / torch.arange(1, 38)[:, None]
    out = Flowformer(eps=eps)(q, k, v, Context(mask=causal())).out
    torch.testing.assert_close(out, running, atol=band, rtol=0)


@pytest.mark.parametrize("competition", [True, False])
@pytest.mark.parametrize("clamp", ["default", None, 1.0])
@pytest.mark.parametrize("cuts", [[1] * 37, [20, 1, 1, 15], [37], [5] * 7 + [2]])
def test_oracle_4_steps_are_the_causal_form(cuts, clamp, competition):
    q, k, v = tensors()
    method = Flowformer(clamp=clamp, competition=competition, chunk=6)
    whole = method(q, k, v, Context(mask=causal())).out
    state = method.new_state()
    ctx = Context(mask=causal(), cache=StateCache(state))
    parts = zip(*(x.split(cuts, 2) for x in (q, k, v)))
    steps = torch.cat([method(*part, ctx).out for part in parts], 2)
    torch.testing.assert_close(steps, whole, atol=1e-12, rtol=1e-12)
    assert len(state) == 37


def test_oracle_4_later_tokens_change_nothing_earlier():
    q, k, v = tensors()
    ctx = Context(mask=causal())
    before = Flowformer(chunk=8)(q, k, v, ctx).out
    for x in (q, k, v):
        x[:, :, 21:] = torch.randn_like(x[:, :, 21:])
    after = Flowformer(chunk=8)(q, k, v, ctx).out
    assert torch.equal(before[:, :, :21], after[:, :, :21])
    assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


def test_oracle_5_permutations_and_the_ablation_to_linear_attention():
    q, k, v = tensors()
    order, other = torch.randperm(37), torch.randperm(37)
    out = Flowformer()(q, k, v).out
    permuted = Flowformer()(q[:, :, order], k[:, :, other], v[:, :, other]).out
    torch.testing.assert_close(permuted, out[:, :, order], atol=1e-12, rtol=1e-12)
    linear = Flowformer(eps=0.0, competition=False, allocation=False)
    for is_causal in (False, True):
        W = q.sigmoid() @ k.sigmoid().repeat_interleave(2, 1).mT
        W = W.tril() if is_causal else W
        expected = W / W.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
        ours = linear(q, k, v, mask_of(is_causal)).out
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def test_oracle_6_the_first_position():
    q, k, v = tensors(kv=4)
    ctx = Context(mask=causal())
    exactly = Flowformer(eps=0.0)(q, k, v, ctx).out[:, :, 0]
    torch.testing.assert_close(exactly, 0.731059 * v[:, :, 0], atol=0, rtol=1e-6)
    flows = Flowformer().flows(q, k, ctx)
    first = flows.conserved_in[..., :1]
    torch.testing.assert_close(first, torch.ones_like(first), atol=1e-5, rtol=0)
    W = (q.sigmoid()[:, :, :1] * k.sigmoid()[:, :, :1]).sum(-1)
    expected = first.sigmoid() * W / flows.incoming[..., :1] * v[:, :, 0]
    torch.testing.assert_close(
        Flowformer()(q, k, v, ctx).out[:, :, 0], expected, rtol=1e-12, atol=0
    )


def test_oracle_7_worked_example():
    def heads(rows):
        return torch.tensor(rows, dtype=torch.float64)[None, None]

    q, k, v = heads([[0, 1], [1, -1]]), heads([[1, 0], [-1, 2]]), heads([[1], [2]])

    def close(found, expected):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found.flatten(), expected, atol=1e-6, rtol=0)

    flows = Flowformer().flows(q, k)
    close(flows.incoming, [1.509447, 1.102415])
    close(flows.outgoing, [1.399979, 1.211883])
    close(flows.conserved_in, [1.164489, 0.835511])
    close(Flowformer()(q, k, v).out, [1.117290, 0.960412])
    close(Flowformer(clamp=1.0).flows(q, k).competition, [1.045518, 0.954482])
    close(Flowformer(clamp=1.0)(q, k, v).out, [1.136189, 0.966093])
    close(Flowformer(clamp=1.0)(q, k, v, Context(mask=causal())).out, [0.731056, 0.945530])


# -- variants --------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("competition", "allocation"), ABLATIONS)
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_ablations_and_clamps(is_causal, competition, allocation, clamp):
    q, k, v = tensors(21)
    options = {"competition": competition, "allocation": allocation, "clamp": clamp}
    ours = Flowformer(chunk=8, **options)(q, k, v, mask_of(is_causal)).out
    expected = quadratic(q, k, v, causal=is_causal, **options)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_relu_features(is_causal):
    q, k, v = tensors(21)
    ours = Flowformer(phi="relu", clamp=None)(q, k, v, mask_of(is_causal)).out
    expected = quadratic(q, k, v, causal=is_causal, phi=lambda x: x.relu() + 1e-6)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(1, 23), (40, 7), (3, 1)])
def test_cross_attention(n, m):
    q, k, v = tensors(n, m)
    expected = quadratic(q, k, v, causal=False)
    torch.testing.assert_close(Flowformer()(q, k, v).out, expected, atol=1e-12, rtol=1e-12)


def test_huge_features_without_a_clamp_do_not_overflow():
    q, k, v = tensors(dtype=torch.float32)
    k[:, :, 3] = 1e4
    out = Flowformer(phi="relu", clamp=None)(q * 1e3, k, v, Context(mask=causal())).out
    assert out.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(is_causal, side):
    """A padded sequence is the sequence alone, whatever stands on the padding."""
    n, pads = 23, torch.tensor([0, 9])
    real = torch.arange(n) >= pads[:, None]
    positions = torch.arange(n) - pads[:, None]
    if side == "right":
        real, positions = real.flip(1), torch.arange(n).expand(2, -1)
    mask = padding(n - pads)
    ctx = Context(
        mask=causal() & mask if is_causal else mask, q_positions=positions, kv_positions=positions
    )
    q, k, v = (x.requires_grad_() for x in tensors(n))
    out = Flowformer(chunk=4)(q, k, v, ctx).out
    weight = torch.randn_like(out) * real[:, None, :, None]
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    alone = tuple(x[1:, :, real[1]].detach().requires_grad_() for x in (q, k, v))
    expected = quadratic(*alone, causal=is_causal, clamp=10 if is_causal else None)
    torch.testing.assert_close(out[1:, :, real[1]], expected, atol=1e-11, rtol=1e-11)
    wanted = torch.autograd.grad((expected * weight[1:, :, real[1]]).sum(), alone)
    for grad, want in zip(grads, wanted):
        torch.testing.assert_close(grad[1:, :, real[1]], want, atol=1e-10, rtol=1e-10)
        assert grad.isfinite().all()
    noise = [x + (~real[:, None, :, None] * 100.0) for x in (q, k, v)]
    noise[2] = noise[2].masked_fill(~real[:, None, :, None], torch.nan)
    again = Flowformer(chunk=4)(*noise, ctx).out
    assert torch.equal(again[1:, :, real[1]], out[1:, :, real[1]])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.95])
def test_backward(is_causal, clamp):
    q, k, v = (x.requires_grad_() for x in tensors(11))
    method = Flowformer(chunk=4, clamp=clamp)
    ours = method(q, k, v, mask_of(is_causal)).out
    expected = quadratic(q, k, v, causal=is_causal, clamp=clamp)
    weight = torch.randn_like(ours)
    one = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    two = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision(is_causal, dtype, band):
    q, k, v = tensors(301, dtype=dtype)
    result = Flowformer()(q, k, v, mask_of(is_causal))
    assert (result.out.dtype, result.lse.dtype) == (dtype, torch.float32)
    assert result.lse.isnan().all()
    expected = Flowformer()(q.double(), k.double(), v.double(), mask_of(is_causal)).out
    torch.testing.assert_close(result.out.double(), expected, atol=band, rtol=band)


@pytest.mark.parametrize("is_causal", [False, True])
def test_autocast_does_not_narrow_the_sums(is_causal):
    """Flows are sums over all tokens, of which bf16 keeps the first two or three digits."""
    q, k, v = tensors(600, dtype=torch.float32)
    ctx, method = mask_of(is_causal), Flowformer()
    given = tuple(x.requires_grad_() for x in (q, k, v))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, flows = method(q, k, v, ctx).out, method.flows(q, k, ctx)
        found.append((out, *flows, *torch.autograd.grad(out.square().sum(), given)))
    for plain, cast in zip(*found):
        torch.testing.assert_close(cast, plain, atol=1e-5, rtol=1e-5)
    if not is_causal:
        return
    state = method.new_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        parts = zip(*(x.split([500, 1, 99], 2) for x in given))
        cache = StateCache(state)
        steps = [method(*part, Context(mask=causal(), cache=cache)).out for part in parts]
    torch.testing.assert_close(torch.cat(steps, 2), found[0][0], atol=1e-5, rtol=1e-5)
    assert {x.dtype for x in state.held.values()} == {torch.float32}


class Largest(TorchDispatchMode):
    """The most numbers that any operation returned in one tensor."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_tensor_grows_with_n_d_dv_or_n_n(is_causal):
    n, d = 1024, 64
    q, k, v = (torch.randn(1, 2, n, d, requires_grad=True) for _ in range(3))
    ctx = mask_of(is_causal)
    with Largest() as seen:
        Flowformer()(q, k, v, ctx).out.sum().backward()
    assert seen.numel <= 2 * n * (d + 1) + 2 * d * d  # of n d d_v it would be 2 * n * 4096


# -- in a layer and a model ------------------------------------------------------------------------
def test_state_is_as_large_as_declared():
    layer = foveate.Attention(32, 4, "mha", "flowformer").eval()
    cache = layer.new_cache()
    assert cache.elements_per_token == 0
    sizes = set()
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(2, 50, 32), mask=causal(), cache=cache)
            sizes.add(cache.bytes())
    heads, d = 4, 8
    assert sizes == {2 * 4 * (heads * (4 * d + 1 + d * d) + 1)}
    assert sum(torch.tensor(f.shape).prod().item() for f in cache.fields) * 8 == cache.bytes()
    held = cache.state.held.values()
    assert sum(x.untyped_storage().nbytes() for x in held) == cache.bytes()


@pytest.mark.parametrize("projection", ["mha", "gqa(kv_heads=2)", "mqa"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_layer_decodes_from_its_state(projection, side):
    layer = foveate.Attention(32, 4, projection, "flowformer(chunk=4)").eval().double()
    x, pads = torch.randn(2, 19, 32, dtype=torch.float64), torch.tensor([0, 6])

    def call(part, start, cache):
        end = start + part.shape[1]
        if side == "none":
            return layer(part, mask=causal(), cache=cache).y
        at = torch.arange(end) - pads[:, None]
        mask = causal() & padding(end - pads)
        ctx = Context(mask=mask, q_positions=at[:, start:], kv_positions=at)
        return layer(part, cache=cache, ctx=ctx).y

    with torch.no_grad():
        whole = call(x, 0, None)
        cache = layer.new_cache()
        parts = [(0, 9), (9, 10), (10, 14), (14, 19)]
        steps = torch.cat([call(x[:, a:b], a, cache) for a, b in parts], 1)
    real = torch.arange(19) >= (pads if side == "left" else 0 * pads)[:, None]
    torch.testing.assert_close(steps[real], whole[real], atol=1e-12, rtol=1e-12)
    cache.reorder(torch.tensor([1, 1]))
    with pytest.raises(InputError, match="none can be taken back"):
        cache.truncate(3)


@pytest.mark.parametrize("attention", ["flowformer(chunk=4)", "deconstructed-approximate"])
def test_a_first_chunk_of_padding_alone_adds_nothing(attention):
    layer = foveate.Attention(32, 4, "mha", attention).eval().double()
    x, pads = torch.randn(2, 13, 32, dtype=torch.float64), torch.tensor([0, 6])

    def call(start, end, cache):
        at = torch.arange(end) - pads[:, None]
        mask = causal() & padding((end - pads).clamp(min=0))
        ctx = Context(mask=mask, q_positions=at[:, start:], kv_positions=at)
        return layer(x[:, start:end], cache=cache, ctx=ctx).y

    with torch.no_grad():
        whole, cache = call(0, 13, None), layer.new_cache()
        steps = torch.cat([call(a, b, cache) for a, b in ((0, 1), (1, 4), (4, 9), (9, 13))], 1)
    real = torch.arange(13) >= pads[:, None]
    torch.testing.assert_close(steps[real], whole[real], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(whole[1, 6:], layer(x[1:, 6:], mask=causal()).y[0])


@pytest.mark.parametrize("n", [1, 10, 30])
def test_cross_attention_to_padded_keys(n):
    q, k, v = tensors(n, 23)
    out = Flowformer()(q, k, v, Context(mask=padding([23, 14]))).out
    expected = quadratic(q[1:], k[1:, :, :14], v[1:, :, :14], causal=False)
    torch.testing.assert_close(out[1:], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("n", [10, 23])
def test_a_layer_that_crosses_takes_all_queries_for_real(n):
    """As many queries as keys, too: they aren't the keys' tokens, whose padding isn't theirs."""
    layer = foveate.Attention(32, 4, "gqa(kv_heads=2)", "flowformer", position="none").double()
    x, other = (torch.randn(2, length, 32).double() for length in (n, 23))
    y = layer(x, other, mask=padding([23, 14])).y
    torch.testing.assert_close(y[1:], layer(x[1:], other[1:, :14]).y, atol=1e-12, rtol=1e-12)
    real = torch.arange(n) < torch.tensor([n, 6])[:, None]
    y = layer(x, other, ctx=Context(mask=padding([23, 14]), real=real)).y
    alone = layer(x[1:, :6], other[1:, :14]).y
    torch.testing.assert_close(y[1:, :6], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [7, 11])
def test_rows_without_any_real_key_are_zero(n, is_causal, eps):
    if is_causal and n != 11:
        pytest.skip("the causal form is of as many queries as keys")
    q, k, v = (x.requires_grad_() for x in tensors(n, 11))
    mask = causal() & padding([11, 0]) if is_causal else padding([11, 0])
    out = Flowformer(eps=eps)(q, k, v, Context(mask=mask)).out
    assert not out[1].any()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(grad.isfinite().all() and not grad[1].any() for grad in grads)


def test_generate_and_beams():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    model = FoveateForCausalLM(
        FoveateConfig(
            vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            attention="flowformer", initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(1, 31, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for beams in (1, 3):
        given = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        fast = model.generate(ids, attention_mask=mask, **given)
        slow = model.generate(ids, attention_mask=mask, use_cache=False, **given)
        assert torch.equal(fast, slow)


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("flowformer(phi='sigmiod')", "did you mean 'sigmoid'"),
        ("flowformer(eps=-1)", "eps=-1"),
        ("flowformer(clamp=0)", "clamp=0.*above 0"),
        ("flowformer(clamp='none')", "clamp='none'"),
        ("flowformer(chunk=0)", "chunk"),
    ],
)
def test_fields_that_do_not_fit(spec, said):
    with pytest.raises(InputError, match=said):
        make(spec)


@pytest.mark.parametrize(
    ("ctx", "said"),
    [
        (Context(mask=foveate.window(3, 3)), "the mask is neither"),
        (Context(mask=causal() & foveate.documents([0, 5, 37])), "the mask is neither"),
        (Context(softcap=3.0), "softcap has no meaning"),
        (Context(bias=torch.zeros(1)), "bias has no meaning"),
        (Context(dropout=0.1), "none can be dropped"),
    ],
)
def test_calls_that_have_no_meaning(ctx, said):
    with pytest.raises(InputError, match=said):
        Flowformer()(*tensors(), ctx)


def test_causal_calls_need_all_queries():
    with pytest.raises(InputError, match="queries of all tokens.*new_cache"):
        Flowformer()(*tensors(1, 9), Context(mask=causal()))
    state = StateCache(Flowformer().new_state())
    for mask in (None, padding([37, 20])):
        with pytest.raises(InputError, match=r"mask=causal\(\)"):
            Flowformer()(*tensors(), Context(mask=mask, cache=state))


@pytest.mark.parametrize("mask", [padding([9, 12]), causal() & documents([0, 4, 12])], ids=repr)
def test_a_mask_for_other_lengths_is_refused(mask):
    q = torch.randn(2, 1, 8, 4)
    with pytest.raises(InputError, match="8 keys"):
        Flowformer()(q, q, q, Context(mask=mask))
