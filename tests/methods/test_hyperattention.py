"""HyperAttention against its definition, written out dense and recursive for one head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from foveate import Context, attention, causal, merge, padding, window
from foveate.methods import make
from foveate.methods.hyperattention import HyperAttention, alpha, kappa
from foveate.methods.hyperattention.samples import Draw
from foveate.methods.hyperattention.sort_lsh import bucket_ranks, gray_code, order_of
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError

MASKS = pytest.mark.parametrize("mask", [causal(), None], ids=["causal", "full"])


def qkv(batch=2, heads=4, kv_heads=2, q_len=301, kv_len=301, dim=16, dtype=torch.float64):
    shapes = (
        (batch, heads, q_len, dim),
        (batch, kv_heads, kv_len, dim),
        (batch, kv_heads, kv_len, 8),
    )
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def dense(q, k, v, mask=None, **more):
    return attention(q, k, v, mask, backend="reference", **more)


def close(one, two, tolerance=1e-12):
    torch.testing.assert_close(one.out, two.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(one.lse, two.lse, atol=tolerance, rtol=tolerance)


# -- the definition -----------------------------------------------------------------------------
def bucket(x, w):
    return sum(int(x.float() @ w[:, p] > 0) << p for p in range(w.shape[1]))


def gray(bits):
    if bits == 1:
        return [0, 1]
    before = gray(bits - 1)
    return before + [g + (1 << (bits - 1)) for g in reversed(before)]


def sort_by_hash(x, w):
    rank = {b: place for place, b in enumerate(gray(w.shape[1]))}
    return sorted(range(len(x)), key=lambda i: rank[bucket(x[i], w)])


def softmax_part(scores, v):
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[:, None])
    return weights @ v, lse


def merged(one, two):
    lse = torch.logaddexp(one[1], two[1])
    return (
        torch.exp(one[1] - lse)[:, None] * one[0] + torch.exp(two[1] - lse)[:, None] * two[0],
        lse,
    )


def practical_form(q, k, v, w, draw, method):
    """D of the spec, for one head: (out, lse)."""
    scale, b, n, n_k = q.shape[1] ** -0.5, method.block_size, len(q), len(k)
    scores = scale * q @ k.T
    blocks = -(-n_k // b)
    if n < method.min_seq_len or blocks == 1:
        return softmax_part(scores, v)
    bq = -(-n // blocks)
    pi_q, pi_k = sort_by_hash(q, w), sort_by_hash(k, w)
    block_q, block_k = torch.empty(n).long(), torch.empty(n_k).long()
    block_q[pi_q] = torch.arange(n) // bq
    block_k[pi_k] = torch.arange(n_k) // b
    same = block_q[:, None] == block_k
    part = softmax_part(scores.masked_fill(~same, -torch.inf), v)
    if not method.sample_size:
        return part
    places, log_weights = draw(n_k)
    at = torch.tensor(pi_k)[places]
    z = (scores[:, at] + log_weights).masked_fill(same[:, at], -torch.inf)
    return merged(part, softmax_part(z, v[at]))


def recursive(q, k, v, w, draw, method):
    """E of the spec, for one head."""
    n = len(q)
    if n <= method.min_seq_len:
        scores = q.shape[1] ** -0.5 * q @ k.T
        return softmax_part(scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf), v)
    half = (n + 1) // 2
    first = recursive(q[:half], k[:half], v[:half], w, draw, method)
    second = recursive(q[half:], k[half:], v[half:], w, draw, method)
    across = practical_form(q[half:], k[:half], v[:half], w, draw, method)
    second = merged(second, across)
    return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]))


def by_definition(method, q, k, v, mask):
    """All heads, with the draws that the method makes from its seed."""
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    out, lse = torch.empty(*q.shape[:3], v.shape[3]).double(), torch.empty(q.shape[:3]).double()
    for b in range(batch):
        for h in range(heads):
            generator = torch.Generator().manual_seed(method.seed << 16)
            w = torch.randn(q.shape[3], method.lsh_num_projs, generator=generator)

            def draw(n_k, b=b, h=h, generator=generator):
                shape = (batch, heads // group, method.sample_size)
                places = torch.randint(n_k, shape, generator=generator)[b, h // group]
                return places, math.log(n_k / method.sample_size)

            one = (q[b, h], k[b, h // group], v[b, h // group], w, draw, method)
            found = practical_form(*one) if mask is None else recursive(*one)
            out[b, h], lse[b, h] = found
    return AttentionOutput(out, lse)


@MASKS
@pytest.mark.parametrize(
    "method",
    [
        HyperAttention(16, 16, 40),
        HyperAttention(16, 16, 32, seed=3),
        HyperAttention(20, 13, 50, lsh_num_projs=4),
        HyperAttention(150, 70, 20, lsh_num_projs=2),
        HyperAttention(8, 0, 30),
    ],
    ids=str,
)
def test_it_is_the_sheets_algorithm(method, mask):
    q, k, v = qkv()
    close(method(q, k, v, Context(mask=mask)), by_definition(method, q, k, v, mask))


def test_fewer_queries_than_keys():
    q, k, v = qkv(q_len=130, kv_len=333)
    method = HyperAttention(16, 16, 40)
    ours = method(q, k, v, Context())
    close(ours, by_definition(method, q, k, v, None))
    # A chunk of a causal prompt: a rectangle on what came before, and the recursion on its own.
    whole = HyperAttention(333, 0, 40)(q, k, v, Context(mask=causal()))
    close(whole, dense(q, k, v, causal()))
    rough = HyperAttention(16, 256, 40)(q, k, v, Context(mask=causal()))
    torch.testing.assert_close(rough.lse, dense(q, k, v, causal()).lse, atol=1.0, rtol=0)


# -- the spec's oracles ------------------------------------------------------------------------
@pytest.mark.parametrize("length", [300, 301])
def test_oracle_1_one_block_without_samples_is_exact(length):
    q, k, v = qkv(q_len=length, kv_len=length)
    close(HyperAttention(length, 0, 16)(q, k, v, Context()), dense(q, k, v))


@pytest.mark.parametrize("length", [256, 257, 301, 403])
@pytest.mark.parametrize("least", [8, 33, 64])
def test_oracle_2_recursion_with_exact_rectangles_is_dense_causal(length, least):
    q, k, v = qkv(q_len=length, kv_len=length)
    method = HyperAttention(length, 16, least)
    assert len(method.pieces(length, length, causal=True)) > 2
    close(method(q, k, v, Context(mask=causal())), dense(q, k, v, causal()))


def test_oracle_2_also_piece_by_piece():
    """The recursion's pieces hold every causal pair once, whatever their blocks are."""
    q, k, v = qkv(batch=1, heads=1, kv_heads=1, q_len=203, kv_len=203)
    counted = torch.zeros(203, 203, dtype=torch.int64)
    for piece in HyperAttention(16, 0, 20, sinks=3).pieces(203, 203, causal=True):
        part = torch.ones(piece.queries, piece.keys + piece.sinks, dtype=torch.int64)
        part = part.tril() if piece.causal else part
        counted[piece.q0 : piece.q1, piece.k0 - piece.sinks : piece.k1] += part
    assert torch.equal(counted, torch.ones(203, 203, dtype=torch.int64).tril())


@MASKS
def test_oracle_3_denominators_are_unbiased(mask):
    q, k, v = qkv(1, 1, 1, 512, 512, dim=32, dtype=torch.float32)
    true = dense(q, k, v, mask).lse
    many = [x.expand(40, -1, -1, -1) for x in (q, k, v)]  # samples of its own for each
    ratios = []
    for seed in range(12):
        method = HyperAttention(64, 64, 64, seed=seed)
        ratios.append(torch.exp(method(*many, Context(mask=mask)).lse - true))
    deviation = torch.cat(ratios).double().mean(0) - 1
    assert deviation.mean().abs() < 0.01
    assert deviation.abs().max() < 0.1


@dataclass(frozen=True)
class EveryKeyOnce(HyperAttention):
    """Draws each key once, with the weight of one."""

    def draw(self, norms, generator):
        places = torch.arange(norms.shape[2]).flip(0).expand(norms.shape)
        return Draw(places, torch.zeros(1, 1, norms.shape[2]))


@MASKS
@pytest.mark.parametrize("block", [1, 7, 16, 64, 100])
@pytest.mark.parametrize("sinks", [0, 5])
def test_oracle_4_every_key_drawn_once_is_exact(mask, block, sinks):
    q, k, v = qkv()
    method = EveryKeyOnce(block, 1, 40, sinks=sinks)
    close(method(q, k, v, Context(mask=mask)), dense(q, k, v, mask))


@pytest.mark.parametrize("bits", range(1, 11))
def test_oracle_5_neighbouring_buckets_differ_in_one_bit(bits):
    code = gray_code(bits).tolist()
    assert code == gray(bits)
    assert all((a ^ b).bit_count() == 1 for a, b in zip(code, code[1:]))
    assert [code[rank] for rank in bucket_ranks(bits).tolist()] == list(range(1 << bits))


def test_oracle_5_the_sheets_example():
    assert gray_code(3).tolist() == [0, 1, 3, 2, 6, 7, 5, 4]
    assert [int(bucket_ranks(3)[b]) for b in (6, 7, 5, 4)] == [4, 5, 6, 7]


def test_oracle_6_error_falls_like_the_root_of_the_samples():
    q, k, v = qkv(1, 1, 1, 512, 512, dim=32)
    true = dense(q, k, v).out
    sizes, errors = (16, 64, 256, 1024), []
    for m in sizes:
        found = [HyperAttention(64, m, 64, seed=s)(q, k, v, Context()).out for s in range(12)]
        errors.append(sum(float((f - true).norm() / true.norm()) for f in found) / 12)
    xs = torch.tensor(sizes, dtype=torch.float64).log()
    ys = torch.tensor(errors, dtype=torch.float64).log()
    slope = float(((xs - xs.mean()) * (ys - ys.mean())).sum() / (xs - xs.mean()).square().sum())
    assert -0.56 < slope < -0.40
    # The spec's own figures, on other data of the same kind.
    for error, figure in zip(errors, (4.42, 2.38, 1.27, 0.65)):
        assert error == pytest.approx(figure, rel=0.25)


@pytest.mark.parametrize("samples", [0, 20])
def test_oracle_7_the_order_of_keys_does_not_matter(samples):
    # Sixteen bits and few keys: no two share a bucket, so that there are no ties.
    q, k, v = qkv(1, 1, 1, 64, 64)
    w = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    assert len({bucket(x, w) for x in k[0, 0]}) == 64
    method = HyperAttention(8, samples, 8, lsh_num_projs=16)
    mixed = torch.randperm(64)
    once, again = (
        method(q, k[:, :, at], v[:, :, at], Context()) for at in (torch.arange(64), mixed)
    )
    close(again, once)


@pytest.mark.parametrize("sampling", ["uniform", "value-norm"])
def test_oracle_8_later_keys_and_values_change_nothing_before_them(sampling):
    q, k, v = qkv(dtype=torch.float32)
    method, ctx = HyperAttention(16, 16, 32, sampling=sampling, sinks=2), Context(mask=causal())
    once = method(q, k, v, ctx)
    for t in (10, 75, 150, 151, 260):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, t + 1 :] = torch.randn_like(k[:, :, t + 1 :])
        other_v[:, :, t + 1 :] = torch.randn_like(v[:, :, t + 1 :])
        again = method(q, other_k, other_v, ctx)
        assert torch.equal(again.out[:, :, : t + 1], once.out[:, :, : t + 1])
        assert torch.equal(again.lse[:, :, : t + 1], once.lse[:, :, : t + 1])
        assert not torch.equal(again.out[:, :, t + 1 :], once.out[:, :, t + 1 :])


def test_oracle_9_merging():
    q, k, v = qkv()
    one, two, three = (
        dense(q, k[:, :, at], v[:, :, at]) for at in (slice(0, 90), slice(90, 95), slice(95, 301))
    )
    close(merge([one, two]), merge([two, one]))
    close(merge([merge([one, two]), three]), merge([one, merge([two, three])]))
    nothing = AttentionOutput(torch.zeros_like(one.out), torch.full_like(one.lse, -torch.inf))
    close(merge([one, nothing]), one)


def test_oracle_10_spectral_ratio():
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, 1, 512, 32, dtype=torch.float64) for _ in range(3))
        error = HyperAttention(64, 256, 64, seed=seed)(q, k, v, Context()).out - dense(q, k, v).out
        p = torch.softmax(q[0, 0] @ k[0, 0].T / 32**0.5, -1)
        norms = [torch.linalg.matrix_norm(x, 2) for x in (error[0, 0], p, v[0, 0])]
        ratios.append(float(norms[0] / (norms[1] * norms[2])))
    assert sum(ratios) / 6 == pytest.approx(0.22, abs=0.04)


# -- what else it promises ----------------------------------------------------------------------
def test_value_norm_sampling_is_unbiased_in_what_it_sums():
    """exp(lse) has the true denominator as its mean, and exp(lse) out the true numerator."""
    q, k, v = qkv(1, 1, 1, 256, 256, dtype=torch.float32)
    v = v * torch.rand(256, 1).mul(3).exp()
    true = dense(q, k, v)
    total, summed = torch.zeros(256), torch.zeros(256, 8)
    many = [x.expand(40, -1, -1, -1) for x in (q, k, v)]
    for seed in range(15):
        found = HyperAttention(32, 64, 32, sampling="value-norm", seed=seed)(*many, Context())
        share = torch.exp(found.lse - true.lse)
        total += share.mean(0)[0] / 15
        summed += (share[..., None] * found.out).mean(0)[0] / 15
    assert (total.mean() - 1).abs() < 0.02
    assert (summed - true.out[0, 0]).norm() / true.out.norm() < 0.1


@MASKS
def test_sinks_are_seen_exactly(mask):
    q, k, v = qkv(heads=2, kv_heads=2)
    k[:, :, :4] = 6 * q.mean(2, keepdim=True) + 3 * torch.randn_like(k[:, :, :4])
    true = dense(q, k, v, mask)
    without, with_them = (
        HyperAttention(16, 16, 40, sinks=s)(q, k, v, Context(mask=mask)).out for s in (0, 4)
    )
    assert (with_them - true.out).norm() < (without - true.out).norm()
    heavy = HyperAttention(16, 0, 40, sinks=4)(q, k, v, Context(mask=mask))
    only = dense(q, k[:, :, :4], v[:, :, :4]).lse
    assert bool((heavy.lse[:, :, 40:] >= only[:, :, 40:] - 1e-12).all())


@MASKS
@pytest.mark.parametrize("backend", ["auto", "blocks"])
def test_backward_is_that_of_the_definition(mask, backend):
    method = HyperAttention(16, 16, 40)
    found = []
    for run in (method, by_definition):
        torch.manual_seed(1)
        q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 150, 150))
        torch.manual_seed(2)
        ctx = Context(mask=mask, backend=backend)
        made = run(q, k, v, ctx) if run is method else run(method, q, k, v, mask)
        loss = (made.out * torch.randn_like(made.out)).sum() + made.lse.square().sum()
        found.append(torch.autograd.grad(loss, (q, k, v)))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@MASKS
def test_low_precision(dtype, mask):
    q, k, v = (x.to(dtype) for x in qkv())
    method, ctx = HyperAttention(16, 32, 40), Context(mask=mask)
    ours, wide = method(q, k, v, ctx), method(q.double(), k.double(), v.double(), ctx)
    assert (ours.out.dtype, ours.lse.dtype) == (dtype, torch.float32)
    band = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours.out.double(), wide.out, atol=band, rtol=band)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_are_as_alone(side):
    q, k, v = qkv(batch=2, q_len=203, kv_len=203)
    pads = torch.tensor([0, 37])
    places = torch.arange(203)[None] - (pads[:, None] if side == "left" else 0)
    mask = causal() & padding(203 - pads)
    method = HyperAttention(16, 16, 40)
    together = method(q, k, v, Context(mask=mask, q_positions=places, kv_positions=places))
    for b, pad in enumerate(pads.tolist()):
        real = slice(pad, None) if side == "left" else slice(0, 203 - pad)
        alone = method(*(x[b : b + 1, :, real] for x in (q, k, v)), Context(mask=causal()))
        torch.testing.assert_close(together.out[b : b + 1, :, real], alone.out)
        torch.testing.assert_close(together.lse[b : b + 1, :, real], alone.lse)


def test_a_causal_table_is_taken_for_what_it_is():
    q, k, v = qkv()
    method = HyperAttention(16, 16, 40)
    from foveate import blocks

    table = Context(mask=blocks(causal().dense(301, 301), 1))
    close(method(q, k, v, table), method(q, k, v, Context(mask=causal())))


@pytest.mark.parametrize("mask", [causal() & window(40, 0), window(40, 40)], ids=str)
def test_other_masks_are_refused(mask):
    with pytest.raises(InputError, match="causal attention and for attention to everything"):
        HyperAttention(16, 16, 40)(*qkv(), Context(mask=mask))


def test_softcap_bias_and_sinks_of_the_model():
    q, k, v = qkv()
    bias = torch.randn(1, 4, 301, 301, dtype=torch.float64)
    options = {"softcap": 3.0, "bias": bias, "scale": 0.3}
    sink = torch.randn(4, dtype=torch.float64)
    ctx = Context(mask=causal(), sink_logits=sink, **options)
    close(
        EveryKeyOnce(16, 1, 40)(q, k, v, ctx), dense(q, k, v, causal(), sink_logits=sink, **options)
    )
    per_key = Context(bias=bias[:, :, :1])
    close(EveryKeyOnce(16, 1, 40)(q, k, v, per_key), dense(q, k, v, bias=bias[:, :, :1]))


def test_short_sequences_and_decoding_are_exact():
    q, k, v = qkv(q_len=39)
    close(HyperAttention(16, 16, 40)(q, k, v, Context(mask=causal())), dense(q, k, v, causal()))
    q, k, v = qkv(q_len=1)
    close(HyperAttention(16, 16, 1)(q, k, v, Context(mask=causal())), dense(q, k, v, causal()))


def test_memory_and_work_follow_the_pieces():
    """At 131,072 tokens: no layout of more tiles than the cost formula's, per head."""
    n, b, least = 131_072, 256, 4096
    pieces = HyperAttention().pieces(n, n, causal=True)
    pairs = sum(
        p.queries * (p.queries + 1) // 2 if p.causal else p.queries * p.keys // p.blocks
        for p in pieces
    )
    levels = int(math.log2(n / least))
    assert pairs == n // least * (least * (least + 1) // 2) + levels * (n // 2) * b


def test_its_layouts_hold_what_the_cost_formula_says():
    q, k, v = qkv(1, 1, 1, 1024, 1024)
    heavy, light = HyperAttention(64, 64, 128).layouts(q, k, v, Context(mask=causal()))
    sizes = (128, 256, 512)  # of the rectangles of each level, 512 queries together
    assert heavy.pairs == 8 * 128 * 129 / 2 + len(sizes) * 512 * 64
    # Each sample is hidden from the queries of one block.
    assert light.pairs == sum(512 * 64 * (1 - 64 / size) for size in sizes)


def test_hashing_brings_like_to_like():
    ranks = torch.tensor([[[3, 1, 2, 1, 0, 3]]])
    assert order_of(ranks).tolist() == [[[4, 1, 3, 2, 0, 5]]]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"block_size": 0}, "block_size"),
        ({"sample_size": -1}, "sample_size"),
        ({"min_seq_len": 2.5}, "min_seq_len"),
        ({"lsh_num_projs": 40}, "at most 16"),
        ({"sampling": "best"}, "uniform or value-norm"),
    ],
)
def test_bad_fields_are_refused(fields, text):
    with pytest.raises(InputError, match=text):
        HyperAttention(**fields)


def test_by_name():
    assert make("hyperattention(block_size=64)") == HyperAttention(block_size=64)


# -- measures -----------------------------------------------------------------------------------
def test_alpha_is_its_formula():
    q, k, v = qkv(q_len=70, kv_len=70)
    for mask in (None, causal()):
        lse = dense(q, k, v, mask).lse
        scores = q @ k.repeat_interleave(2, 1).mT / 4
        if mask is not None:
            scores = scores.masked_fill(~mask.dense(70, 70), -torch.inf)
        squares = scores.softmax(-1).square().sum(2)
        torch.testing.assert_close(alpha(q, k, lse, mask), 70 * squares.amax(-1))
        torch.testing.assert_close(alpha(q, k, lse, mask, skip=9), 70 * squares[..., 9:].amax(-1))


def test_alpha_lies_between_one_and_n_squared():
    q, k, v = (torch.zeros(1, 1, 50, 4, dtype=torch.float64) for _ in range(3))
    assert float(alpha(q, k, dense(q, k, v).lse)) == pytest.approx(1.0)
    k[:, :, 7], q[...] = 100.0, 1.0
    assert float(alpha(q, k, dense(q, k, v).lse)) == pytest.approx(2500.0)


def test_kappa_is_its_formula():
    q, k, v = qkv(1, 2, 2, 128, 128)
    method = HyperAttention(16, 0, 16)
    heavy = method.heavy(q, k, v, Context())
    found = kappa(dense(q, k, v).lse, heavy.lse)
    for h in range(2):
        w = torch.randn(16, 7, generator=torch.Generator().manual_seed(0))
        pi_q, pi_k = sort_by_hash(q[0, h], w), sort_by_hash(k[0, h], w)
        a = torch.exp(q[0, h] @ k[0, h].T / 4)[pi_q][:, pi_k]
        light = (a * (1 - torch.block_diag(*[torch.ones(16, 16)] * 8))).sum(1)
        assert float(found[0, h]) == pytest.approx(float(light.max() / light.min()), rel=1e-9)
