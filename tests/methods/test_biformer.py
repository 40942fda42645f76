"""Bi-level routing: the spec's oracles, against attention under a mask and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate import Context, attention, causal, padding
from foveate.methods import make
from foveate.methods.biformer import BiLevelRouting, grid_regions, region_layout, route
from foveate.models import DiT
from foveate.nn import Attention
from foveate.ops.errors import InputError

SCALE = 0.17


def heads(n: int, batch: int = 2, count: int = 3, width: int = 8, **more) -> tuple[Tensor, ...]:
    made = torch.randn(3, batch, count, n, width, dtype=torch.float64, **more)
    return tuple(x.requires_grad_() for x in made.unbind(0))


def region_of(height: int, width: int, s: int) -> Tensor:
    """(N,) the region of each token of an image, by its coordinates."""
    rows, cols = -(-height // s), -(-width // s)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (y // rows * s + x // cols).flatten()


def chosen_by_hand(q: Tensor, k: Tensor, of: Tensor, p: int, topk: int) -> Tensor:
    """M (B, N, N): whether the key's region is among the best of the query's, region by region."""
    seen = torch.zeros(len(q), q.shape[2], k.shape[2], dtype=torch.bool)
    for b in range(len(q)):
        mean_q, mean_k = (
            torch.stack([x[b, :, of == r].mean(1).flatten() for r in range(p)]) for x in (q, k)
        )
        for r in range(p):
            score = [float(mean_q[r] @ mean_k[t]) for t in range(p)]
            for t in sorted(range(p), key=lambda t: -score[t])[:topk]:
                seen[b, (of == r)[:, None] & (of == t)] = True
    return seen


def dense(q, k, v, mask=None, scale=SCALE):
    """Softmax attention, written out."""
    scores = scale * q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("s", [1, 2, 4])
def test_oracle_1_all_regions_is_dense(s):
    q, k, v = heads(64)
    want = dense(q, k, v)
    method = BiLevelRouting(topk=s * s, regions=s, shape=(8, 8))
    ours = method(q, k, v, Context(scale=SCALE)).out
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=0)
    # by way of a layout, with the chosen regions in any order
    parts = grid_regions((8, 8), s)
    for chosen in (method.choose(q, k, Context()), torch.rand(2, s * s, s * s).argsort(-1)):
        layout = region_layout(chosen, parts, parts)
        assert layout.dense().all()
        out = attention(q, k, v, layout=layout, scale=SCALE).out
        torch.testing.assert_close(out, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("topk", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_oracle_2_and_6_dense_under_the_mask_of_the_chosen_regions(topk, dtype):
    """Values and gradients, the index held fixed: none passes through routing."""
    q, k, v = heads(54)
    of = region_of(6, 9, 3)
    mask = chosen_by_hand(q.detach(), k.detach(), of, 9, topk)[:, None]
    want = dense(q, k, v, mask)
    weight = torch.randn_like(want)
    wanted = torch.autograd.grad((want * weight).sum(), (q, k, v))
    one = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    method = BiLevelRouting(topk=topk, regions=3, shape=(6, 9))
    ours = method(*one, Context(scale=SCALE)).out
    grads = torch.autograd.grad((ours * weight.to(dtype)).sum(), one)
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours.double(), want, atol=tol, rtol=0)
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a.double(), b, atol=4 * tol, rtol=tol)


def test_oracle_3_one_region_and_regions_of_one_token():
    q, k, v = heads(20)
    whole = BiLevelRouting(topk=1, regions=1, shape=(4, 5))(q, k, v, Context(scale=SCALE)).out
    torch.testing.assert_close(whole, dense(q, k, v), atol=1e-12, rtol=0)
    fine = BiLevelRouting(topk=6, regions=(4, 5), shape=(4, 5))(q, k, v, Context(scale=SCALE)).out
    scores = torch.einsum("bhid,bhjd->bij", q, k)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(2, scores.topk(6).indices, True)
    torch.testing.assert_close(fine, dense(q, k, v, mask[:, None]), atol=1e-12, rtol=0)


def test_oracle_4_planted_routing():
    p, shape = 16, (8, 8)
    of = region_of(*shape, 4)
    order = torch.randperm(p)
    unit = torch.eye(p)
    q = 5 * unit[of] + 0.01 * torch.randn(64, p)
    k = 5 * unit[order[of]] + 0.01 * torch.randn(64, p)
    method = BiLevelRouting(topk=3, regions=4, shape=shape)
    chosen = method.choose(q[None, None], k[None, None], Context())
    assert torch.equal(chosen[0, :, 0], order.argsort())


def test_oracle_5_permutations():
    height, width, s = 6, 6, 3
    q, k, v = heads(36)
    method = BiLevelRouting(topk=2, regions=s, shape=(height, width))
    ctx = Context(scale=SCALE)
    base = method(q, k, v, ctx).out

    def moved(order: Tensor) -> Tensor:
        out = method(*(x[:, :, order] for x in (q, k, v)), ctx).out
        return out[:, :, order.argsort()]

    table = grid_regions((height, width), s).table[0]
    inside = torch.empty(36, dtype=torch.int64)
    inside[table] = table[:, torch.randperm(4)]
    regions = torch.empty(36, dtype=torch.int64)
    regions[table] = table[torch.randperm(9)]
    grid = torch.arange(36).view(6, 6)
    for order in (inside, regions, grid.roll((2, -4), (0, 1)).flatten()):
        torch.testing.assert_close(moved(order), base, atol=1e-12, rtol=0)
    other = moved(grid.roll((1, 0), (0, 1)).flatten())  # no whole region: another partition
    assert not torch.allclose(other, base)


def test_oracle_6_finite_differences_where_the_choice_stays():
    q, k, v = heads(24, batch=1, count=1, width=4)
    method = BiLevelRouting(topk=2, regions=2, shape=(4, 6))
    ctx = Context(scale=SCALE)
    weight = torch.randn(1, 1, 24, 4, dtype=torch.float64)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return (method(q, k, v, ctx).out * weight).sum()

    grads = torch.autograd.grad(loss(q, k), (q, k))
    way = [torch.randn_like(x) for x in (q, k)]
    ends = [(q + sign * 1e-6 * way[0], k + sign * 1e-6 * way[1]) for sign in (1, -1)]
    assert torch.equal(method.choose(*ends[0], ctx), method.choose(*ends[1], ctx))
    slope = (loss(*ends[0]) - loss(*ends[1])) / 2e-6
    told = sum((g * w).sum() for g, w in zip(grads, way))
    torch.testing.assert_close(told, slope, rtol=1e-6, atol=1e-7)


def test_oracle_8_keys_that_a_query_sees_at_224_pixels():
    seen = []
    for side, topk in ((56, 1), (28, 4), (14, 16)):
        q, k, v = (x.detach().float() for x in heads(side * side, batch=1, count=1))
        method = BiLevelRouting(topk=topk, regions=7, shape=(side, side))
        layout = method.layout(q, k, v, Context())
        assert (layout.dense().sum(-1) == layout.pairs / side**2).all()
        assert layout.gathered.shape[1] == 64
        seen.append(int(layout.pairs / side**2))
    assert seen == [64, 64, 64]  # and 49 in the last stage, which sees all of 7 x 7


def test_oracle_9_tiny_case():
    q, k, v = (
        torch.tensor(x, dtype=torch.float64).view(1, 1, 4, 1)
        for x in ([1, 2, 3, -1], [1, -1, 2, 0], [1, 2, 3, 4])
    )
    method = BiLevelRouting(topk=2, regions=2, shape=(2, 2))
    assert method.choose(q, k, Context())[0].tolist() == [[2, 0], [2, 0], [2, 0], [1, 3]]
    e = math.exp
    want = [
        (3 * e(2) + e(1)) / (e(2) + e(1)),
        (3 * e(4) + e(2)) / (e(4) + e(2)),
        (3 * e(6) + e(3)) / (e(6) + e(3)),
        (2 * e(1) + 4) / (e(1) + 1),
    ]
    assert want == pytest.approx([2.462117, 2.761594, 2.905148, 2.537883], abs=1e-6)
    assert method(q, k, v, Context(scale=1.0)).out.flatten().tolist() == pytest.approx(want)


@pytest.mark.parametrize("shape", [(6, 8), (4, 2, 6), (10,), (7, 9)])
def test_means_of_regions(shape):
    """With and without a grid that is cut evenly, and of what is real alone."""
    x = torch.randn(2, 3, math.prod(shape), 5)
    real = torch.rand(2, math.prod(shape)) > 0.3
    parts = grid_regions(shape, 2)
    for some, seen in ((parts, torch.ones_like(real)), (parts.only(real), real)):
        for r in range(parts.count):
            inside = (parts.of[0] == r) & seen
            for b in range(2):
                want = x[b, :, inside[b]].double().sum(1) / max(1, int(inside[b].sum()))
                torch.testing.assert_close(some.means(x)[b, :, r].double(), want)


@pytest.mark.parametrize("shape", [(30, 30), (13, 8), (5, 3, 4), (11,)])
def test_regions_that_divide_nothing(shape):
    """Each token is in one region; smaller and empty regions are routed by what they hold."""
    parts = grid_regions(shape, 4)
    tokens = parts.table[parts.table >= 0]
    assert torch.equal(tokens.sort().values, torch.arange(math.prod(shape)))
    q, k, v = heads(math.prod(shape), batch=2, count=2)
    of, p = parts.of[0], parts.count
    filled = [r for r in range(p) if (of == r).any()]
    index = torch.tensor([filled.index(int(r)) for r in of])
    mask = chosen_by_hand(q.detach(), k.detach(), index, len(filled), 2)[:, None]
    ours = BiLevelRouting(topk=2, regions=4, shape=shape)(q, k, v, Context(scale=SCALE)).out
    torch.testing.assert_close(ours, dense(q, k, v, mask), atol=1e-12, rtol=0)


def test_a_masked_image_is_routed_by_what_is_real():
    """Padding of a batch's second image: no choice and no output hears of it."""
    q, k, v = heads(36)
    real = torch.tensor([36, 22])
    ctx = Context(mask=padding(real), scale=SCALE)
    method = BiLevelRouting(topk=2, regions=3, shape=(6, 6))
    out = method(q, k, v, ctx).out
    noise = torch.randn(3, 1, 1, 36, 1, dtype=q.dtype) * (torch.arange(36) >= 22)[:, None]
    other = method(
        *(torch.cat((x[:1], x[1:] + n)) for x, n in zip((q, k, v), noise)),
        Context(mask=padding(real), scale=SCALE),
    ).out
    torch.testing.assert_close(other[0], out[0])
    torch.testing.assert_close(other[1, :, :22], out[1, :, :22])
    # against the table without these tokens, cut and routed by hand
    of = region_of(6, 6, 3)[:22]
    filled = sorted(set(of.tolist()))
    index = torch.tensor([filled.index(r) for r in of.tolist()])
    short = [x[1:, :, :22] for x in (q, k, v)]
    mask = chosen_by_hand(*(x.detach() for x in short[:2]), index, len(filled), 2)[:, None]
    torch.testing.assert_close(out[1:, :, :22], dense(*short, mask), atol=1e-12, rtol=0)


def test_any_mask_only_takes_away():
    q, k, v = heads(36)
    ctx = Context(mask=causal())
    method = BiLevelRouting(topk=2, regions=4)
    layout = method.layout(q, k, v, ctx).dense()
    assert not (layout & ~causal().dense(36, 36)).any()
    of = torch.arange(36) // 9
    for b in range(2):
        chosen = method.choose(q, k, ctx)[b]
        want = torch.zeros(36, 36, dtype=torch.bool)
        for r, row in enumerate(chosen.tolist()):
            assert all(t <= r for t in row)
            for t in (t for t in row if t >= 0):
                want[(of == r)[:, None] & (of == t)] = True
        assert torch.equal(layout[b, 0], want & causal().dense(36, 36)[0, 0])


@pytest.mark.parametrize("differentiable", [False, True])
def test_soft_routing_weights_what_is_gathered(differentiable):
    q, k, v = heads(36)
    method = BiLevelRouting(
        topk=3, regions=3, shape=(6, 6), soft=True, differentiable=differentiable
    )
    chosen = method.choose(q, k, Context())
    of = region_of(6, 6, 3)
    means = [
        torch.stack([x[:, :, of == r].mean(2) for r in range(9)], 1).flatten(2) for x in (q, k)
    ]
    scores = means[0] @ means[1].mT * (3 * 8) ** -0.5
    if not differentiable:
        scores = scores.detach()
    weights = scores.gather(2, chosen).softmax(-1)
    each = torch.zeros_like(scores).scatter(2, chosen, weights)[:, of][:, :, of][:, None]
    mask = torch.zeros_like(scores).scatter(2, chosen, 1.0)[:, of][:, :, of][:, None] > 0
    logits = (SCALE * (q @ k.mT) * each).masked_fill(~mask, -torch.inf)
    want = (logits.softmax(-1) * each) @ v
    ours = method(q, k, v, Context(scale=SCALE)).out
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=0)
    grads, wanted = (
        torch.autograd.grad(out.sin().sum(), (q, k, v), retain_graph=True) for out in (ours, want)
    )
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("soft", [False, True])
def test_fewer_key_heads_count_for_their_groups(soft):
    q, k, v = (x.detach() for x in heads(36, count=6))
    few = k[:, :2], v[:, :2]
    method = BiLevelRouting(topk=3, regions=3, shape=(6, 6), soft=soft)
    want = method(q, *(x.repeat_interleave(3, 1) for x in few)).out
    torch.testing.assert_close(method(q, *few).out, want, atol=1e-12, rtol=0)


def test_of_equal_regions_the_first_is_taken():
    scores = torch.tensor([[[0.0, 1.0, 1.0, 0.0, float("nan")]]])
    assert route(scores, 3)[0, 0].tolist() == [1, 2, 0]
    allowed = torch.tensor([False, False, True, False, False])
    assert route(scores, 3, allowed)[0, 0].tolist() == [2, -1, -1]
    low = torch.tensor([[[0.0, -torch.inf, 1.0, -torch.inf]]])
    allowed = torch.tensor([False, True, True, True])
    assert route(low, 3, allowed)[0, 0].tolist() == [2, 1, 3]


def test_keys_on_a_grid_of_their_own():
    q, k, v = heads(48)[0], *(x[:, :, :12] for x in heads(48)[1:])
    of_q, of_k = region_of(6, 8, 2), region_of(3, 4, 2)
    scores = torch.stack(
        [
            torch.stack(
                [
                    (q[:, :, of_q == r].mean(2) * k[:, :, of_k == t].mean(2)).sum((1, 2))
                    for t in range(4)
                ],
                1,
            )
            for r in range(4)
        ],
        1,
    )
    seen = torch.zeros_like(scores).scatter(2, scores.topk(2).indices, 1.0) > 0
    want = dense(q, k, v, seen[:, of_q][:, :, of_k][:, None])
    method = BiLevelRouting(topk=2, regions=2, shape=(6, 8), kv_shape=(3, 4))
    torch.testing.assert_close(method(q, k, v, Context(scale=SCALE)).out, want, atol=1e-12, rtol=0)


def test_a_number_is_a_shape_of_one_axis():
    q, k, v = (x.detach() for x in heads(36))
    one, two = make("biformer(shape=36, regions=4)"), BiLevelRouting(shape=(36,), regions=4)
    assert one == two
    assert torch.equal(one(q, k, v).out, BiLevelRouting(regions=4)(q, k, v).out)


def test_it_is_an_attention_of_a_layer():
    layer = Attention(32, 4, attention="biformer(regions=2, topk=1)", position="none")
    x = torch.randn(2, 24, 32)
    y = layer(x, ctx=Context(grid=(4, 6))).y
    y.square().sum().backward()
    other = x.clone()
    other[:, 0] += 1e-3
    moved = (layer(other, ctx=Context(grid=(4, 6))).y != y).any(-1)
    assert 0 < int(moved.sum()) < 48


def test_bf16_is_within_its_rounding():
    q, k, v = (x.detach() for x in heads(64, width=16))
    method = BiLevelRouting(topk=2, regions=4, shape=(8, 8))
    half = [x.bfloat16() for x in (q, k, v)]
    ours = method(*half).out
    want = method(*(x.double() for x in half)).out
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), want, atol=2e-2, rtol=2e-2)


def test_what_is_refused():
    q, k, v = heads(36)
    with pytest.raises(InputError, match="doesn't make 36 queries"):
        BiLevelRouting(shape=(5, 5))(q, k, v)
    with pytest.raises(InputError, match="no step-by-step decoding"):
        BiLevelRouting()(q[:, :, :1], k, v)
    with pytest.raises(InputError, match="give no positions"):
        BiLevelRouting(shape=(6, 6))(q, k, v, Context(q_positions=torch.arange(36)))
    with pytest.raises(InputError, match="a hard choice has no gradient"):
        BiLevelRouting(differentiable=True)
    with pytest.raises(InputError, match="takes no mask"):
        BiLevelRouting(soft=True)(q, k, v, Context(mask=causal()))
    with pytest.raises(InputError, match="shape"):
        make("biformer(shape=6.5)")
    with pytest.raises(InputError, match="topk=0"):
        make("biformer(topk=0)")
    with pytest.raises(InputError, match="expected 2 values"):
        BiLevelRouting(regions=(2, 2, 2), shape=(6, 6))(q, k, v)


def test_a_diffusion_transformer_takes_it():
    torch.manual_seed(0)
    model = DiT((8, 8), (1, 1), attention="biformer(regions=2, topk=4)", dim=16, depth=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, step = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    all_regions = model(x, step)
    torch.testing.assert_close(model.swap("full")(x, step), all_regions)
    assert not torch.allclose(model.swap("biformer(regions=2, topk=1)")(x, step), all_regions)
