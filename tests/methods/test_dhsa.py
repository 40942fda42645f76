"""DHSA: the spec's oracles by their number, the predictor, and decoding."""

import pytest
import torch
from torch import nn

from foveate import Context, attention, blocks, causal, padding, window
from foveate.methods import make
from foveate.methods.dhsa import DHSA, BoundaryPredictor
from foveate.methods.dhsa.boundaries import equal, pick, with_instruction
from foveate.methods.dhsa.chunks import pooled, select
from foveate.methods.dhsa.labels import Jumps, focal_loss, labels, positions
from foveate.methods.dhsa.predictor import features
from foveate.ops.errors import InputError


def prompt() -> Context:
    return Context(mask=causal())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def qkv(q_len, kv_len=None, dtype=torch.float32, batch=2):
    kv_len = q_len if kv_len is None else kv_len
    shapes = (batch, 4, q_len, 16), (batch, 2, kv_len, 16), (batch, 2, kv_len, 16)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def random_bounds(length, count):
    inner = torch.randperm(length - 1)[: count - 1] + 1
    return torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([length])))


# -- oracle 1 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [16, 128, None])
def test_1_a_budget_of_everything_is_dense(block):
    q, k, v = qkv(150)
    method = DHSA(budget=150, block=block, local=128, sinks=16, instruction=20, chunk=8)
    dense = attention(q, k, v, causal(), backend="reference")
    torch.testing.assert_close(method(q, k, v, prompt()).out, dense.out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [16, 128, None])
def test_1_also_where_the_choice_is_made_with_any_boundaries(block):
    q, k, _ = qkv(150)
    method = DHSA(budget=150, block=block, local=128, sinks=16, instruction=20, chunk=8)
    bounds = [random_bounds(150, 9), random_bounds(150, 40)]
    seen = method.layout_from(bounds, q, k, prompt()).dense()
    assert torch.equal(seen.expand(2, 1, -1, -1), causal().dense(150, 150).expand(2, 1, -1, -1))


# -- oracle 2 ------------------------------------------------------------------------------------
def test_2_chunks_of_one_token_are_the_exact_top_k_of_averaged_heads():
    q, k, _ = qkv(90)
    method = DHSA(budget=12, block=1, local=1, sinks=0, instruction=0, chunk=1)
    seen = method.layout(q, k, k, prompt()).dense()[:, 0]
    scores = q.mean(1) @ k.repeat_interleave(2, 1).mean(1).mT
    own = torch.arange(90)
    scores[:, own, own] = torch.inf  # its own key is the local one
    scores = scores.masked_fill(~causal().dense(90, 90)[0, 0], -torch.inf)
    best = scores.topk(12, -1)
    expected = torch.zeros_like(seen).scatter_(2, best.indices, best.values > -torch.inf)
    assert torch.equal(seen, expected)


def test_2_without_local_tokens():
    q, k = torch.randn(7, 5), torch.randn(40, 5)
    end = torch.full((7,), 40)
    kept = select(
        q @ k.T, torch.arange(41), torch.zeros(7, dtype=torch.int64), end, budget=9, local=0
    )
    expected = torch.zeros(7, 40, dtype=torch.bool).scatter_(1, (q @ k.T).topk(9, 1).indices, True)
    assert torch.equal(kept, expected)


# -- oracle 3 ------------------------------------------------------------------------------------
def test_3_norm_is_the_sum_over_the_root_and_the_root_times_the_mean():
    x, bounds = torch.randn(60, 8, dtype=torch.float64), random_bounds(60, 11)
    n = bounds.diff()[:, None]
    norm = pooled(x, bounds)
    torch.testing.assert_close(norm, pooled(x, bounds, "sum") / n.sqrt())
    torch.testing.assert_close(norm, pooled(x, bounds, "mean") * n.sqrt())
    parts = x.split(bounds.diff().tolist())
    torch.testing.assert_close(pooled(x, bounds, "max"), torch.stack([p.amax(0) for p in parts]))


@pytest.mark.parametrize(("pooling", "power"), [("norm", 0.0), ("mean", -0.5), ("sum", 0.5)])
def test_3_noise_of_a_score_by_chunk_length(pooling, power):
    query = torch.randn(64, dtype=torch.float64)
    for n in (2, 8, 32, 128):
        keys = torch.randn(20_000 // 4 * n if n < 32 else 5_000 * n, 64, dtype=torch.float32)
        bounds = torch.arange(0, len(keys) + 1, n)
        scores = pooled(keys, bounds, pooling).double() @ query
        expected = float(query.norm()) * n**power
        assert float(scores.std()) == pytest.approx(expected, rel=0.05)


# -- oracle 4 ------------------------------------------------------------------------------------
def test_4_equal_chunks_choose_alike_by_mean_and_norm_and_as_block_sparse():
    q, k, _ = qkv(256)
    options = "budget=80, block=16, local=16, sinks=0, instruction=0, chunk=16"
    norm = make(f"dhsa({options})").layout(q, k, k, prompt()).dense()
    mean = make(f"dhsa({options}, pooling='mean')").layout(q, k, k, prompt()).dense()
    assert torch.equal(norm, mean)
    # The baseline: mean-pooled equal blocks, the own block and the four best before it.
    mean_q = q.mean(1).unflatten(1, (-1, 16)).mean(2)
    mean_k = k.mean(1).unflatten(1, (-1, 16)).mean(2)
    scores = (mean_q @ mean_k.mT).masked_fill(~torch.ones(16, 16).tril(-1).bool(), -torch.inf)
    best = scores.topk(4, -1)
    blocks = torch.zeros(2, 16, 16, dtype=torch.bool)
    blocks.scatter_(2, best.indices, best.values > -torch.inf)
    blocks |= torch.eye(16, dtype=torch.bool)
    tokens = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.equal(norm[:, 0], tokens & causal().dense(256, 256)[0, 0])


# -- oracle 5 ------------------------------------------------------------------------------------
def test_5_the_worked_example():
    kbar = torch.tensor([1.0, 1, 3, 0, 0, 0])[:, None]
    bounds = torch.tensor([0, 2, 3, 6])
    expected = {"mean": [1, 3, 0], "norm": [2**0.5, 3, 0], "sum": [2, 3, 0]}
    for pooling, values in expected.items():
        torch.testing.assert_close(pooled(kbar, bounds, pooling)[:, 0], torch.tensor(values) * 1.0)
    scores = pooled(kbar, bounds).T
    zero, six = torch.tensor([0]), torch.tensor([6])
    kept = select(scores, bounds, zero, six, budget=2, local=0)
    assert kept[0].nonzero()[:, 0].tolist() == [0, 2]


def test_sinks_replace_the_first_that_were_kept_and_none_counts_twice():
    scores, bounds = torch.tensor([[0.0, 1, 0, 0, 0]]), torch.tensor([0, 4, 8, 12, 16, 20])
    zero, end = torch.tensor([0]), torch.tensor([20])
    plain = select(scores, bounds, zero, end, budget=8, local=4)
    assert plain[0].nonzero()[:, 0].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    sunk = select(scores, bounds, zero, end, budget=8, local=4, sinks=2)
    assert sunk[0].nonzero()[:, 0].tolist() == [0, 1, 6, 7, 16, 17, 18, 19]


# -- oracle 6 ------------------------------------------------------------------------------------
def brute_ratio(a, w):
    length = len(a)
    found = torch.ones(length, dtype=torch.float64)
    for i in range(2 * w - 1, length - 2 * w):
        past = a[i + w + 1 :, i - w + 1 : i + 1].sum()
        future = a[i + w + 1 :, i + 1 : i + w + 1].sum()
        found[i] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    return found


def ratio(a, w):
    jumps = Jumps(len(a), w)
    for at in range(0, len(a), 7):
        jumps.add(at, a[at : at + 7])
    return jumps.ratio()


def test_6_ratios_are_those_of_the_definition():
    a = torch.randn(70, 70, dtype=torch.float64).exp().tril()
    a /= a.sum(1, keepdim=True)
    torch.testing.assert_close(ratio(a, 4), brute_ratio(a, 4), atol=1e-10, rtol=1e-10)
    assert bool((ratio(a, 4) >= 1).all())


def test_6_uniform_attention_has_no_jump_and_a_step_has_its_greatest_there():
    uniform = torch.ones(80, 80, dtype=torch.float64).tril()
    uniform /= uniform.sum(1, keepdim=True)
    at = positions(80, 4)
    assert (at[0], at[-1]) == (7, 71)
    torch.testing.assert_close(ratio(uniform, 4)[at], torch.ones(65).double(), atol=1e-9, rtol=0)
    step = uniform.clone()
    step[:, 31:] *= 10
    found = ratio(step, 4)
    assert int(found.argmax()) == 30
    assert labels(found)[30] == 1
    assert float(labels(ratio(uniform, 4)).sum()) == 0


def test_6_the_focal_loss_is_the_formula():
    logits, y = torch.randn(2, 30, dtype=torch.float64), torch.rand(2, 30).round().double()
    p = torch.sigmoid(logits)
    of_truth = torch.where(y > 0, p, 1 - p)
    each = (1 - of_truth) ** 2 * -torch.where(y > 0, 1.3, 1.0) * of_truth.log()
    torch.testing.assert_close(focal_loss(logits, y, 4), each[:, 7:22].mean())


# -- oracle 7 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("instruction", [0, 40])
def test_7_boundaries_are_apart_few_and_sorted(instruction):
    logits = torch.randn(300) * 3
    bounds = pick(logits, look=4, theta=1.1, nms=8, most=9, instruction=instruction)
    assert (bounds[0], bounds[-1]) == (0, 300)
    assert bool((bounds.diff() > 0).all())
    inner = bounds[1:-1]
    assert 0 < len(inner) <= 9
    assert bool((inner.diff() > 8).all())
    if instruction:
        assert inner[-1] == 260
    free = inner[inner != 300 - instruction]
    assert bool((logits[free - 1] > 1.1).all())
    everything = pick(logits, look=4, theta=-99, nms=0, most=999)
    assert everything[1:-1].tolist() == list(range(4, 297))


def test_7_the_greatest_comes_first():
    logits = torch.full((40,), -5.0)
    logits[[10, 15, 30]] = torch.tensor([2.0, 3.0, 1.2])
    assert pick(logits, look=4, theta=1.1, nms=8, most=9).tolist() == [0, 16, 31, 40]
    assert pick(logits, look=4, theta=1.1, nms=8, most=1).tolist() == [0, 16, 40]


# -- oracle 8 ------------------------------------------------------------------------------------
def test_8_values_and_with_given_boundaries_tokens_are_causal():
    q, k, v = qkv(200)
    method = DHSA(budget=48, block=16, local=16, sinks=8, instruction=16, chunk=8)
    bounds = [random_bounds(200, 20)] * 2
    i = 90
    changed = i + max(16, 8)
    q2, k2 = q.clone(), k.clone()
    q2[:, :, changed:], k2[:, :, changed:] = 7.0, -7.0
    before = method.layout_from(bounds, q, k, prompt()).dense()[..., : i + 1, :]
    after = method.layout_from(bounds, q2, k2, prompt()).dense()[..., : i + 1, :]
    assert torch.equal(before, after)
    layout = method.layout_from(bounds, q, k, prompt())
    later = v.clone()
    later[:, :, i + 1 :] += 1
    once, again = (attention(q, k, x, layout=layout).out[:, :, : i + 1] for x in (v, later))
    assert torch.equal(once, again)


# -- the predictor -------------------------------------------------------------------------------
def by_definition(predictor, x):
    """The logits of one sequence (L, C), with torch's own attention, position by position."""
    c, w = predictor.channels, predictor.look
    attend = nn.MultiheadAttention(c, predictor.heads, batch_first=True)
    attend.in_proj_weight.data, attend.in_proj_bias.data = (
        predictor.qkv.weight.data, predictor.qkv.bias.data
    )  # fmt: skip
    attend.out_proj.weight.data, attend.out_proj.bias.data = (
        predictor.out.weight.data, predictor.out.bias.data
    )  # fmt: skip
    found = []
    for i in range(len(x)):
        tokens = torch.zeros(2 * w, c)
        for slot, j in enumerate(range(i - w + 1, i + w + 1)):
            if 0 <= j < len(x):
                tokens[slot] = x[j]
        e = predictor.norm(attend(tokens[None], tokens[None], tokens[None])[0][0])
        if predictor.gate is None:
            left, right = e[:w].mean(0), e[w:].mean(0)
        else:
            g = predictor.gate.weight[0]
            left, right = (torch.softmax(h @ g, 0) @ h for h in (e[:w], e[w:]))
        cosine = torch.dot(left, right) / (left.norm() * right.norm())
        f = torch.cat((left, right, (left - right).abs(), left * right, cosine[None]))
        found.append(predictor.last(torch.relu(predictor.fuse(f)))[0])
    return torch.stack(found)


@pytest.mark.parametrize("gated", [False, True])
def test_the_predictor_is_the_papers(gated):
    predictor = BoundaryPredictor(24, look=3, heads=8, gated=gated)
    nn.init.normal_(predictor.qkv.bias)
    nn.init.normal_(predictor.out.bias)
    x = torch.randn(20, 24)
    torch.testing.assert_close(predictor(x[None])[0], by_definition(predictor, x))
    long = torch.randn(1, 2100, 24)
    torch.testing.assert_close(
        predictor(long)[:, 1000:1050], predictor(long[:, 900:1150])[:, 100:150]
    )


def test_features_lay_key_heads_side_by_side():
    k = torch.randn(2, 3, 5, 4, dtype=torch.bfloat16)
    x = features(k)
    assert (x.shape, x.dtype) == ((2, 5, 12), torch.float32)
    assert torch.equal(x[1, 2, 4:8], k[1, 1, 2].float())


def test_without_a_predictor_it_says_how_to_make_one():
    q, k, v = qkv(300)
    with pytest.raises(InputError, match="foveate fit MODEL --method dhsa"):
        DHSA(budget=256)(q, k, v, prompt())
    fitted = DHSA(budget=256).with_predictor(BoundaryPredictor(32))
    assert fitted(q, k, v, prompt()).out.isfinite().all()
    with pytest.raises(InputError, match="another model"):
        DHSA(budget=256).with_predictor(BoundaryPredictor(24))(q, k, v, prompt())


# -- decoding ------------------------------------------------------------------------------------
def loose(predictor_channels=32):
    """A method whose predictor fires often, so that decoding closes chunks."""
    predictor = BoundaryPredictor(predictor_channels)
    nn.init.constant_(predictor.last.bias, 2.0)
    return DHSA(
        budget=48, block=16, local=16, sinks=8, instruction=8, theta=1.9, longest=24
    ).with_predictor(predictor)


def test_decoding_keeps_its_chunks_and_chooses_as_from_scratch():
    q, k, v = qkv(160)
    method = loose()
    method(q[:, :, :100], k[:, :, :100], v[:, :, :100], prompt())
    before = [b.clone() for b in method._kept[0].bounds]
    for n in range(101, 161):
        one = (q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n])
        result = method(*one, Context(mask=causal(), phase="decode"))
        bounds = method._kept[0].bounds
        # Nothing that was closed moves, and the vectors are those of the whole sequence.
        for b, closed in enumerate(method._kept[0].closed):
            assert torch.equal(bounds[b][: len(before[b]) - 1], before[b][:-1])
            torch.testing.assert_close(closed, pooled(k[b, :, :n].mean(0), bounds[b])[:-1])
            assert int(bounds[b].diff().max()) <= max(24 + 4, int(before[b].diff().max()))
    # The last token's choice, by the definition over those boundaries.
    for b in range(2):
        kr = pooled(k[b].mean(0), bounds[b])
        scores = (q[b, :, -1].mean(0) @ kr.T)[None]
        kept = select(
            scores, bounds[b], torch.tensor([0]), torch.tensor([160]), budget=48, local=16, sinks=8
        )
        allowed = blocks(kept[None, None], 1)
        one = slice(b, b + 1)
        expected = attention(q[one, :, -1:], k[one], v[one], allowed)
        torch.testing.assert_close(result.out[b], expected.out[0])
    assert len(bounds[0]) > len(before[0])


def test_decoding_another_sequence_begins_anew_and_beams_are_followed():
    q, k, v = qkv(120)
    method = loose()
    method(q[:, :, :100], k[:, :, :100], v[:, :, :100], prompt())
    mine = method._kept[0].bounds
    swapped = k.flip(0)
    method(q[:, :, 100:101], swapped[:, :, :101], v[:, :, :101], Context(causal(), phase="decode"))
    assert torch.equal(
        method._kept[0].bounds[0][:-1], mine[1][: len(method._kept[0].bounds[0]) - 1]
    )
    other = torch.randn_like(k)
    method(q[:, :, 100:101], other[:, :, :101], v[:, :, :101], Context(causal(), phase="decode"))
    assert torch.equal(method._kept[0].bounds[0], method.boundaries(other[0, :, :101]))


def test_layers_of_a_forward_share_the_first_ones_boundaries():
    q, k, v = qkv(130)
    method = loose()
    ctx = Context(mask=causal())
    method(q, k, v, ctx)
    ctx.layer = 1
    method(q, torch.randn_like(k), v, ctx)
    assert method._kept[0].bounds is method._kept[1].bounds


# -- masks and refusals --------------------------------------------------------------------------
def test_a_sliding_window_limits_what_can_be_chosen():
    q, k, _ = qkv(256)
    method = DHSA(budget=64, block=16, local=16, sinks=8, instruction=16, chunk=8)
    ctx = Context(mask=causal() & window(99, -1))
    seen = method.layout(q, k, k, ctx).dense()
    assert not (seen & ~ctx.mask.dense(256, 256)).any()
    # The first ones that are kept are the window's, not the sequence's.
    assert int(seen[0, 0, 192].nonzero()[0]) == 192 - 99
    counts = seen[..., 120:240, :].sum(-1)
    assert int(counts.max()) <= 64


def test_padding_moves_no_boundary():
    q, k, v = qkv(200)
    method = DHSA(budget=64, block=16, local=16, sinks=8, instruction=16, chunk=8)
    alone = method(q[:, :, 37:], k[:, :, 37:], v[:, :, 37:], prompt()).out
    positions = (torch.arange(200) - 37)[None]
    ctx = Context(
        mask=causal() & padding([163, 163]), q_positions=positions, kv_positions=positions
    )
    torch.testing.assert_close(method(q, k, v, ctx).out[:, :, 37:], alone)


def test_a_sequence_of_padding_alone_sees_nothing():
    q, k, v = qkv(100)
    method = DHSA(budget=48, block=16, local=16, sinks=8, instruction=16, chunk=8)
    out = method(q, k, v, Context(mask=causal() & padding([100, 0]))).out
    assert not out[1].any()
    torch.testing.assert_close(out[:1], method(q[:1], k[:1], v[:1], prompt()).out)
    with pytest.raises(InputError, match="each of 2 sequences"):
        method.layout_from([torch.tensor([0, 100])], q, k, prompt())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dhsa(block=256)", "at least block"),
        ("dhsa(budget=200)", "part of the budget"),
        ("dhsa(pooling='median')", "norm, mean, sum, max"),
        ("dhsa(budget=0)", "at least 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        make(text)


def test_an_instruction_is_one_chunk_also_of_equal_ones():
    assert with_instruction(equal(20, 8), 6).tolist() == [0, 8, 14, 20]
    assert equal(16, 8).tolist() == [0, 8, 16]
