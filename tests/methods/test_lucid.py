"""LUCID: the oracles of its spec, and what only it does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate import Context, attention, causal, documents, padding, window
from foveate.methods import make
from foveate.methods.lucid import Lucid, normalised, solve, triangle
from foveate.ops.errors import InputError
from foveate.parts import Heads, StateCache

TIGHT = {"atol": 1e-12, "rtol": 1e-12}
CAUSAL = Context(mask=causal())
TINY = 1e-30  # the identities that need ||kbar||^2 = d exactly have no eps


def drawn(n=37, d=16, dv=5, heads=4, kv=2, batch=2, **more) -> tuple[Tensor, Tensor, Tensor]:
    more = {"dtype": torch.float64} | more
    shapes = (batch, heads, n, d), (batch, kv, n, d), (batch, kv, n, dv)
    q, k, v = (torch.randn(shape, **more) for shape in shapes)
    return q, k, v


def matrix(k: Tensor, seen: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """M by its definition, whole; seen (B or 1, 1, n, n)."""
    d = k.shape[-1]
    kbar = k / (k.square().mean(-1, keepdim=True) + eps).sqrt()
    m = (kbar @ kbar.mT / math.sqrt(d) - math.sqrt(d)).exp().tril(-1)
    if seen is not None:
        m = m * (seen & seen.diagonal(dim1=-2, dim2=-1)[..., None])
    return m + torch.eye(k.shape[2], dtype=k.dtype)


def plain(q: Tensor, k: Tensor, y: Tensor, mask=None) -> Tensor:
    return attention(q, k, y, causal() if mask is None else mask, backend="reference").out


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("block", [1, 5, 16, 256])
def test_oracle_1_explicit_inverse(block):
    q, k, v = drawn()
    expected = plain(q, k, torch.linalg.inv(matrix(k)) @ v)
    torch.testing.assert_close(Lucid(block=block)(q, k, v, CAUSAL).out, expected, **TIGHT)


def test_oracle_2_residual():
    _, k, v = drawn(n=129)
    torch.testing.assert_close(matrix(k) @ Lucid(block=32).prepared(k, v, CAUSAL), v, **TIGHT)


def test_oracle_2_residual_in_fp32_at_1024():
    _, k, v = drawn(n=1024, d=64, dv=64, heads=1, kv=1, batch=1, dtype=torch.float32)
    y = Lucid().prepared(k, v, CAUSAL)
    residual = matrix(k.double()) @ y.double() - v
    assert residual.norm() <= 1e-4 * v.norm()


def test_oracle_3_identical_keys():
    q, k, v = drawn()
    k = k[:, :, :1].expand_as(k)
    method = Lucid(block=8, eps=TINY)
    y = torch.cat((v[:, :, :1], v.diff(dim=2)), 2)
    torch.testing.assert_close(method.prepared(k, v, CAUSAL), y, **TIGHT)
    counts = torch.arange(1, 38, dtype=v.dtype)[:, None]
    out = v.repeat_interleave(2, 1) / counts
    torch.testing.assert_close(method(q, k, v, CAUSAL).out, out, **TIGHT)


def test_oracle_4_self_retrieval_is_exact_in_direction():
    _, k, v = drawn(d=4, heads=2)
    k = 2 * k / k.norm(dim=-1, keepdim=True)  # sqrt(d) = 2
    out = Lucid(block=8, eps=TINY)(k, k, v, CAUSAL).out
    torch.testing.assert_close(out, v / matrix(k, eps=TINY).sum(-1, keepdim=True), **TIGHT)


def test_oracle_5_scaling_a_key_changes_nothing_but_negating_does():
    _, k, v = drawn()
    method = Lucid(block=8, eps=TINY)
    y = method.prepared(k, v, CAUSAL)
    scaled = k * torch.rand(*k.shape[:3], 1, dtype=k.dtype).add(0.1)
    torch.testing.assert_close(method.prepared(scaled, v, CAUSAL), y, **TIGHT)
    assert (method.prepared(k * torch.tensor([1.0, -1.0] * 18 + [1.0], dtype=k.dtype)[:, None], v,
                            CAUSAL) - y).abs().max() > 1e-3  # fmt: skip


@pytest.mark.parametrize("d", [16, 64, 128])
def test_oracle_6_one_token_and_orthogonal_keys(d):
    q, k, v = drawn(n=1, d=d)
    torch.testing.assert_close(Lucid()(q, k, v, CAUSAL).out, v.repeat_interleave(2, 1), **TIGHT)
    n = 12
    q, _, v = drawn(n=n, d=d)
    k = torch.eye(d, dtype=v.dtype)[:n].expand(2, 2, n, d)
    y = Lucid(eps=TINY, block=4).prepared(k, v, CAUSAL)
    m = torch.full((n, n), math.exp(-math.sqrt(d)), dtype=v.dtype).tril(-1) + torch.eye(n)
    torch.testing.assert_close(m @ y, v, **TIGHT)
    first_order = (n - 1) * math.exp(-math.sqrt(d)) * v.abs().max()
    assert 0 < (y - v).abs().max() <= first_order * (1 + n * math.exp(-math.sqrt(d)))


def steps(method, q, k, v, cuts, ctx=CAUSAL):
    """Outputs of a layer's own form, chunk by chunk, and its cache."""
    layer = method.placed(Heads(32, q.shape[1], k.shape[1], k.shape[3], v.shape[3]))
    cache, outs = StateCache(layer.new_state()), []
    for parts in zip(*(x.split(cuts, 2) for x in (q, k, v))):
        outs.append(layer(*parts, replace(ctx, cache=cache)).out)
    return torch.cat(outs, 2), cache, layer


@pytest.mark.parametrize("cuts", [[1] * 37, [20, 1, 1, 5, 10], [37]])
@pytest.mark.parametrize("grad", [False, True])
def test_oracle_7_decoding_equals_the_parallel_form(cuts, grad):
    q, k, v = drawn()
    method = Lucid(block=8)
    with torch.set_grad_enabled(grad):
        out, _, _ = steps(method, q, k, v, cuts)
    torch.testing.assert_close(out, method(q, k, v, CAUSAL).out, **TIGHT)


def test_oracle_7_blockwise_equals_full():
    _, k, v = drawn(n=101)
    whole = Lucid(block=101).prepared(k, v, CAUSAL)
    for block in (1, 2, 7, 50, 100, 1000):
        torch.testing.assert_close(Lucid(block=block).prepared(k, v, CAUSAL), whole, **TIGHT)


def test_oracle_8_causality():
    q, k, v = drawn()
    before = Lucid(block=8)(q, k, v, CAUSAL).out
    for x in (q, k, v):
        x[:, :, 20:] = torch.randn_like(x[:, :, 20:])
    torch.testing.assert_close(
        Lucid(block=8)(q, k, v, CAUSAL).out[:, :, :20], before[:, :, :20], **TIGHT
    )


def test_oracle_8_gradcheck():
    _, k, v = drawn(n=7, d=3, dv=2, batch=1)
    method = Lucid(block=3)
    assert torch.autograd.gradcheck(
        lambda k, v: method.prepared(k, v, CAUSAL), (k.requires_grad_(), v.requires_grad_())
    )


@pytest.mark.parametrize("mask", [causal(), causal() & documents([0, 9, 9, 37])])
def test_oracle_8_closed_backward_equals_autograd(mask):
    q, k, v = (x.requires_grad_() for x in drawn())
    ctx = Context(mask=mask)
    out = Lucid(block=8)(q, k, v, ctx).out
    expected = plain(q, k, torch.linalg.inv(matrix(k, mask.dense(37, 37))) @ v, mask)
    g = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), g) for x in (out, expected))
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, **TIGHT)


@pytest.mark.parametrize("mask", [causal(), causal() & documents([0, 3, 9])])
def test_oracle_8_gradcheck_with_tokens_solved_before(mask):
    _, k, v = drawn(n=9, d=3, dv=2, batch=1)
    where = triangle(k, 4, 2, Context(mask=mask))
    given = [x.requires_grad_() for x in (normalised(k, 1e-6), v[:, :, 4:], v[:, :, :4])]
    assert torch.autograd.gradcheck(lambda k, v, past: solve(k, v, past, where), given)


def test_oracle_9_worked_example():
    k, q = torch.tensor([[1.0, 0], [1, 1], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    v = torch.tensor([[1.0], [2], [3]])
    q, k, v = (x.double()[None, None] for x in (q, k, v))
    method = Lucid(eps=TINY)
    y = method.prepared(k, v, CAUSAL).flatten()
    assert y.tolist() == pytest.approx([1, 1.339140, 1.871899], abs=1e-6)
    out = method(q, k, v, CAUSAL).out.flatten()
    assert out.tolist() == pytest.approx([1, 1.227143, 1.387207], abs=1e-6)


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


@pytest.mark.parametrize(
    "mask", [causal(), causal() & padding([1017]), causal() & documents([0, 300, 1024])]
)
def test_m_is_never_held(mask):
    """Forward and backward hold a block of its rows at most, and of that no more than a chunk."""
    n, block = 1024, 8
    k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(2))
    with Largest() as seen:
        Lucid(block=block).prepared(k, v, Context(mask=mask)).sum().backward()
    assert seen.numel <= max(n * block, (n // block) ** 2)


# -- masks -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mask",
    [
        causal() & documents([0, 9, 9, 10, 37]),
        causal() & window(6, 0),
        causal() & padding([37, 21]),
        causal(block=1) & window(-1, -1),
    ],
)
@pytest.mark.parametrize("block", [4, 256])
def test_the_matrix_is_masked_as_attention_is(mask, block):
    q, k, v = drawn()
    ctx = Context(mask=mask)
    y = torch.linalg.solve(matrix(k, mask.dense(37, 37)), v)
    torch.testing.assert_close(Lucid(block=block).prepared(k, v, ctx), y, **TIGHT)
    torch.testing.assert_close(Lucid(block=block)(q, k, v, ctx).out, plain(q, k, y, mask), **TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_its_values_and_changes_nobody(side):
    q, k, v = drawn()
    pads = torch.tensor([0, 11])
    at = torch.arange(37) - pads[:, None] if side == "left" else None
    ctx = Context(mask=causal() & padding(37 - pads), q_positions=at, kv_positions=at)
    real = slice(11, None) if side == "left" else slice(0, 26)
    method = Lucid(block=8)
    y = method.prepared(k, v, ctx)
    alone = method.prepared(k[1:, :, real], v[1:, :, real], CAUSAL)
    torch.testing.assert_close(y[1:, :, real], alone, **TIGHT)
    pad = slice(0, 11) if side == "left" else slice(26, None)
    assert torch.equal(y[1:, :, pad], v[1:, :, pad])
    out = method(q[1:, :, real], k[1:, :, real], v[1:, :, real], CAUSAL).out
    torch.testing.assert_close(method(q, k, v, ctx).out[1:, :, real], out, **TIGHT)


def test_decoding_behind_left_padding():
    q, k, v = drawn()
    pads = torch.tensor([0, 11])
    at = torch.arange(37) - pads[:, None]
    full = Context(mask=causal() & padding(37 - pads), q_positions=at, kv_positions=at)
    method = Lucid(block=8)
    layer = method.placed(Heads(32, 4, 2, 16, 5))
    state, outs = layer.new_state(), []
    for first, stop in ((0, 15), (15, 16), (16, 20), (20, 37)):
        new = slice(first, stop)
        seen = causal() & padding(stop - pads)
        ctx = Context(mask=seen, q_positions=at[:, new], kv_positions=at[:, :stop])
        outs.append(layer.step(q[:, :, new], k[:, :, new], v[:, :, new], ctx, state).out)
    torch.testing.assert_close(torch.cat(outs, 2), method(q, k, v, full).out, **TIGHT)


def test_packed_documents_skip_the_blocks_between_them():
    k = torch.zeros(1, 1, 512, 8)
    ctx = Context(mask=causal() & documents(range(0, 513, 64)))
    packed = triangle(k, 0, 32, ctx)
    assert [(run.first, run.stop, run.partial) for run in packed.blocks[5].runs] == [
        (128, 160, False)
    ]
    assert sum(len(block.runs) for block in packed.blocks) == 8
    whole = triangle(k, 0, 32, CAUSAL)
    assert sum(run.stop - run.first for block in whole.blocks for run in block.runs) == 32 * 120


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)])
def test_nothing_is_decorrelated(batch, n):
    given = [x.requires_grad_() for x in drawn(n=n, batch=batch)]
    for mask in (causal(), causal() & window(3, 0)):
        out = Lucid(block=4)(*given, Context(mask=mask)).out
        assert out.shape == (batch, 4, n, 5)
        out.sum().backward()


def test_bidirectional_masks_and_unsorted_positions_are_refused():
    q, k, v = drawn()
    for mask in (None, window(3, 3), padding([37, 30])):
        with pytest.raises(InputError, match="causal"):
            Lucid()(q, k, v, Context(mask=mask))
    at = torch.arange(37).flip(0)
    with pytest.raises(InputError, match="rise"):
        Lucid()(q, k, v, Context(mask=causal(), q_positions=at, kv_positions=at))


# -- composition -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "inner",
    ["sink-window(sinks=2, window=8)", "block-sparse(blocks=1)", "hyperattention(min_seq_len=16, "
     "block_size=8, sample_size=4)", "vertical-slash(verticals=8, slashes=8, forced_slashes=4)"],
)  # fmt: skip
def test_any_attention_runs_over_y(inner):
    q, k, v = drawn(n=150)
    method = Lucid(inner=inner, block=32)
    y = torch.linalg.solve(matrix(k), v)
    expected = make(inner)(q, k, y, CAUSAL)
    found = method(q, k, v, CAUSAL)
    torch.testing.assert_close(found.out, expected.out, **TIGHT)
    torch.testing.assert_close(found.lse, expected.lse, **TIGHT)


def test_lucid_within_lucid_decodes_with_both_states():
    q, k, v = drawn()
    method = Lucid(inner=Lucid(block=4), block=8)
    out, cache, _ = steps(method, q, k, v, [20, 1, 16])
    torch.testing.assert_close(out, method(q, k, v, CAUSAL).out, **TIGHT)
    assert [field.name for field in cache.fields] == ["k", "y", "inner.k", "inner.y"]
    assert cache.bytes() == 2 * 2 * 2 * 37 * (16 + 5) * 8
    assert len(cache.state.inner) == 37


def test_an_inner_attention_that_remakes_its_past_is_refused():
    """Its memory would be left out in silence."""
    inner = "rcmha(segment_conv='reset', memory=4)"
    layer, x = foveate.Attention(32, 4, "mha", Lucid(inner=inner)), torch.randn(1, 8, 32)
    cache = layer.new_cache()
    layer(x, mask=causal(), cache=cache)
    with pytest.raises(InputError, match="of its memory anew"):
        layer(x, mask=causal(), cache=cache)


def test_grouped_heads_are_repeated_heads():
    q, k, v = drawn()
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    torch.testing.assert_close(
        Lucid(block=8)(q, k, v, CAUSAL).out, Lucid(block=8)(q, *repeated, CAUSAL).out, **TIGHT
    )


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_solves_in_fp32(dtype, band):
    q, k, v = drawn(n=200, dtype=dtype)
    out = Lucid(block=64)(q, k, v, CAUSAL).out
    assert out.dtype == dtype
    q, k, v = (x.double() for x in (q, k, v))
    expected = plain(q, k, torch.linalg.solve(matrix(k), v))
    torch.testing.assert_close(out.double(), expected, atol=band, rtol=band)


def test_the_state_may_keep_y_in_fp32():
    q, k, v = drawn(dtype=torch.bfloat16)
    for master, width in ((False, 2), (True, 4)):
        method = Lucid(block=8, fp32_state=master)
        out, cache, _ = steps(method, q, k, v, [1] * 37)
        assert cache.bytes() == 2 * 2 * 37 * (16 * 2 + 5 * width)
        assert out.dtype == torch.bfloat16
    kept = cache.state.entries["y"]
    torch.testing.assert_close(
        kept, Lucid().prepared(k.float(), v.float(), CAUSAL), atol=1e-5, rtol=1e-5
    )


# -- the state -------------------------------------------------------------------------------------
def test_truncation_takes_tokens_back_exactly():
    q, k, v = drawn()
    out, cache, layer = steps(Lucid(block=8), q, k, v, [37])
    cache.truncate(20)
    assert len(cache) == 20
    tail = [x[:, :, 20:] for x in (q, k, v)]
    again = layer(*tail, replace(CAUSAL, cache=cache)).out
    torch.testing.assert_close(again, out[:, :, 20:], **TIGHT)


def test_beams_are_reordered():
    q, k, v = drawn()
    rows = torch.tensor([1, 1, 0])
    _, cache, layer = steps(Lucid(block=8), *(x[:, :, :30] for x in (q, k, v)), [30])
    cache.reorder(rows)
    tail = [x[rows, :, 30:] for x in (q, k, v)]
    found = layer(*tail, replace(CAUSAL, cache=cache)).out
    whole = Lucid(block=8)(q, k, v, CAUSAL).out
    torch.testing.assert_close(found, whole[rows, :, 30:], **TIGHT)


def test_it_keeps_as_many_bytes_as_keys_and_values():
    ours = foveate.Attention(32, 4, "gqa(kv_heads=2)", "lucid").new_cache()
    theirs = foveate.Attention(32, 4, "gqa(kv_heads=2)").new_cache()
    assert ours.elements_per_token == theirs.elements_per_token


def test_latent_projections_are_refused():
    with pytest.raises(InputError, match="plain heads"):
        foveate.Attention(32, 4, "mla(latent=8, rope_dim=4)", "lucid")


@pytest.mark.parametrize("inner", ["mha", 3])
def test_what_is_no_attention_cannot_be_inner(inner):
    with pytest.raises(InputError, match="no attention on q, k and v"):
        Lucid(inner=inner)


def test_a_layer_decodes_as_it_trains():
    layer = foveate.Attention(
        32, 4, "gqa(kv_heads=2)", "lucid(inner='sink-window(sinks=1, window=5)', block=4)"
    ).double()
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    want = layer(x, mask=causal()).y
    cache = layer.new_cache()
    with torch.no_grad():
        found = [layer(part, mask=causal(), cache=cache).y for part in x.split([7, 1, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(found, 1), want, **TIGHT)
    want.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_model_generates_with_it():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(0)
    model = FoveateForCausalLM(
        FoveateConfig(
            vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.3, attention="lucid(block=4)",
        )
    ).eval()  # fmt: skip
    ids = torch.randint(1, 67, (2, 9))
    found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for _ in range(6):
        logits = model(ids, use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)
    beams = model.generate(ids[:, :9], max_new_tokens=4, num_beams=3, pad_token_id=0)
    assert beams.shape == (2, 13)


def test_autocast_does_not_narrow_the_solve():
    """Products of bf16 would lose Y where keys are alike, as they are here."""
    _, k, v = drawn(n=256, d=64, dv=16, heads=1, kv=1, batch=1, dtype=torch.float32)
    k = k + 2 * torch.randn(64)
    given, g = [x.requires_grad_() for x in (k, v)], torch.randn_like(v)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = Lucid(block=64).prepared(*given, CAUSAL)
            found.append((y, *torch.autograd.grad(y, given, g)))
    for plain_one, cast in zip(*found):
        torch.testing.assert_close(cast, plain_one, atol=1e-6, rtol=1e-6)
