"""Flux: the spec's oracles by their number, routing, decoding, and its fit on a small model."""

import math

import pytest
import torch

from foveate import Context, attention, blocks, causal, padding, sinks, window
from foveate.methods import make
from foveate.methods.flux import Flux, LayerRouter, Routers
from foveate.methods.flux.router import FULL, pooled
from foveate.methods.flux.train import (
    Mixing,
    Multipliers,
    gumbel,
    learning_rate,
    optimizer_of,
    relaxed,
    temperature,
)
from foveate.ops.errors import InputError
from foveate.parts.rope import Rope

SMALL = {"sinks": 16, "local": 32, "block": 16, "pool": 8}


def prompt(**more):
    return Context(mask=causal(), **more)


def qkv(q_len, kv_len=None, dtype=torch.float32, batch=2):
    kv_len = q_len if kv_len is None else kv_len
    shapes = (batch, 4, q_len, 16), (batch, 2, kv_len, 16), (batch, 2, kv_len, 16)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def sided(*values, layers=(0,)):
    """Routers whose odds of full attention are sigmoid(value), whatever the prompt."""
    routers = Routers(layers, 16)
    for layer, value in zip(layers, values):
        routers.by_layer[str(layer)].head[-1].bias.data = torch.tensor([0.0, float(value)])
    return routers


def chosen(bits):
    """A method whose decision for the sequences of a batch is given."""

    class Given(Routers):
        def logits(self, layer, u):
            return torch.tensor([[0.0, 1.0 if bit else -1.0] for bit in bits])

    return Flux(**SMALL).with_routers(Given((0,), 16))


# -- oracle 1 ------------------------------------------------------------------------------------
def test_1_full_is_dense_and_sparse_is_dense_under_the_streaming_mask():
    q, k, v = qkv(150)
    dense = attention(q, k, v, causal(), backend="reference").out
    torch.testing.assert_close(Flux(**SMALL, route="full")(q, k, v, prompt()).out, dense)
    own, key = torch.arange(150)[:, None] // 16, torch.arange(150)[None] // 16
    seen = ((key < 1) | ((key > own - 2) & (key <= own))) & causal().dense(150, 150)[0, 0]
    expected = attention(q, k, v, blocks(seen, 1), backend="reference").out
    torch.testing.assert_close(Flux(**SMALL, route="sparse")(q, k, v, prompt()).out, expected)
    mixed = chosen([True, False])(q, k, v, prompt()).out
    torch.testing.assert_close(mixed[0], dense[0])
    torch.testing.assert_close(mixed[1], expected[1])


def test_1_by_tokens_it_is_sinks_and_a_window():
    method = Flux(sinks=5, local=20, block=1, route="sparse")
    q, k, v = qkv(100)
    expected = (causal() & (sinks(5) | window(19, 0))).dense(100, 100)
    assert torch.equal(method.layout(q, k, v, prompt()).dense(), expected)


# -- oracle 2 ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("length", "fields"), [(48, SMALL), (25, {"sinks": 5, "local": 20, "block": 1})]
)
def test_2_short_sequences_are_dense_whatever_the_router_says(length, fields):
    q, k, v = qkv(length)
    dense = attention(q, k, v, causal(), backend="reference").out
    torch.testing.assert_close(Flux(**fields, route="sparse")(q, k, v, prompt()).out, dense)


# -- oracle 3 ------------------------------------------------------------------------------------
def test_3_straight_through():
    logits = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    noise = gumbel((5, 2), torch.Generator().manual_seed(0))
    r = relaxed(logits, noise, 1.3)
    y = torch.softmax((logits + noise) / 1.3, -1)[:, FULL]
    assert torch.equal(r.detach(), (y > 0.5).double())
    weight = torch.randn(5, dtype=torch.float64)
    (ours,) = torch.autograd.grad((weight * r).sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad((weight * y).sum(), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(relaxed(logits, noise, 1.3, soft=True), y)


def test_3_the_gradient_through_the_decision_is_that_of_the_two_branches():
    q, k, v = qkv(100, dtype=torch.float64)
    method = Flux(**SMALL)
    routers = sided(0.3).double()
    weight = torch.randn(2, 4, 100, 16, dtype=torch.float64)

    class Double(Routers):
        def logits(self, layer, u):
            return super().logits(layer, u.double())

    routers.__class__ = Double
    mixing = Mixing(method, routers, (100, 100), soft=True)
    last = routers.by_layer["0"].head[-1].bias
    (mixing(q, k, v, prompt()).out * weight).sum().backward()
    full = attention(q, k, v, causal()).out
    sparse = attention(q, k, v, method.sparse(causal())).out
    slope = ((full - sparse) * weight).flatten(1).sum(1)  # dL/dr
    odds = mixing.r[0].detach()
    assert torch.allclose(odds, torch.sigmoid(torch.tensor(0.3, dtype=torch.float64)))
    expected = (slope * odds * (1 - odds)).sum()
    torch.testing.assert_close(last.grad, torch.stack((-expected, expected)))
    # Finite differences on the bias, which moves y.
    found = []
    for step in (1e-5, -1e-5):
        moved = sided(0.3).double()
        moved.__class__ = Double
        moved.by_layer["0"].head[-1].bias.data += torch.tensor([0.0, step])
        other = Mixing(method, moved, (100, 100), soft=True)
        found.append(float((other(q, k, v, prompt()).out * weight).sum().detach()))
    assert float(last.grad[1]) == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-4)


# -- oracle 4 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [[True, True], [False, False], [True, False]])
def test_4_decoding_after_a_prompt_is_the_longer_prompt_with_its_decision(bits):
    q, k, v = qkv(130)
    whole = chosen(bits)(q, k, v, prompt()).out
    method = chosen(bits)
    method(q[:, :, :100], k[:, :, :100], v[:, :, :100], prompt())
    object.__setattr__(method, "routers", sided(9.0))  # which would say full: isn't asked again
    for n in range(101, 131):
        step = (q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n])
        out = method(*step, prompt(phase="decode")).out
        torch.testing.assert_close(out[:, :, 0], whole[:, :, n - 1], atol=1e-5, rtol=1e-5)
    # A chunk of several tokens, and rows that were swapped in between (as in beam search).
    chunk = method(q[:, :, 110:], k, v, prompt()).out
    torch.testing.assert_close(chunk, whole[:, :, 110:], atol=1e-5, rtol=1e-5)
    swapped = method(q.flip(0)[:, :, -1:], k.flip(0), v.flip(0), prompt(phase="decode")).out
    torch.testing.assert_close(swapped.flip(0)[:, :, 0], whole[:, :, -1], atol=1e-5, rtol=1e-5)


def test_4_a_sequence_whose_prompt_was_not_seen_is_full():
    q, k, v = qkv(1, 130)
    out = chosen([False, False])(q, k, v, prompt(phase="decode")).out
    torch.testing.assert_close(out, attention(q, k, v, causal()).out)


# -- oracle 5 ------------------------------------------------------------------------------------
def test_5_the_example_of_the_block_mask():
    method = Flux(sinks=2, local=4, block=2, route="sparse")
    q, k, v = qkv(8)
    seen = method.layout(q, k, v, prompt()).dense()[0, 0]
    assert seen[7].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 6, 7]
    assert seen[6].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 6]


# -- oracle 6 ------------------------------------------------------------------------------------
def test_6_multipliers_rise_while_the_target_is_missed():
    multipliers = Multipliers(torch.Generator().manual_seed(0))
    assert bool(((multipliers.values >= 0) & (multipliers.values <= 0.5)).all())
    optimizer = optimizer_of(Routers((0,), 4), multipliers, 1e-3, 1e-2)
    for _ in range(4):
        before = multipliers.values.detach().clone()
        optimizer.zero_grad()
        loss = multipliers.constraint(torch.tensor([0.2, 0.3]), ("prose", "retrieval"))
        loss.backward()
        optimizer.step()
        assert bool((multipliers.values > before).all())


def test_6_the_constraint_is_the_formula():
    multipliers = Multipliers()
    (a1, a2), (b1, b2) = multipliers.values.detach().tolist()
    omega = torch.tensor([0.2, 0.3, 0.6])
    found = float(multipliers.constraint(omega, ("retrieval", "prose", "retrieval")).detach())
    retrieval = (a1 * 0.25 + a2 * 0.25**2 + a1 * 0.15 + a2 * 0.15**2) / 2
    assert found == pytest.approx((retrieval + b1 * 0.7 + b2 * 0.49) / 2)


def test_6_routers_begin_almost_surely_full():
    router = LayerRouter(16)
    logits = router(torch.randn(9, 16))
    odds = torch.softmax(logits, -1)[:, FULL]
    torch.testing.assert_close(odds, torch.full((9,), 1 / (1 + math.exp(-4.5))))
    assert sum(p.numel() for p in LayerRouter(128).parameters()) == 592_002


def test_a_standardized_router_is_the_papers_on_queries_of_mean_0_and_variance_1():
    u = 0.03 * torch.randn(40, 16) + torch.linspace(-2, 2, 16)
    plain, router = LayerRouter(16), LayerRouter(16)
    torch.nn.init.normal_(plain.head[-1].weight)  # 0 at first, which would hide everything
    router.load_state_dict(plain.state_dict())
    router.standardize(u)
    scaled = (u - u.mean(0)) / (u - u.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(router(u), plain(scaled), atol=1e-4, rtol=1e-4)
    assert float((router(u) - plain(u)).detach().abs().max()) > 1e-2
    alike = LayerRouter(16)
    before = alike.encoder[0].weight.clone()
    alike.standardize(torch.ones(3, 16))
    assert torch.equal(alike.encoder[0].weight, before)


# -- oracle 7 ------------------------------------------------------------------------------------
def test_7_the_router_looks_at_both_ends_only_and_before_rotation():
    raw, rope = torch.randn(1, 4, 60, 16), Rope.of(16)
    rows = [torch.arange(60)]
    expected = torch.cat((raw[:, :, :8], raw[:, :, -8:]), 2).mean((1, 2))
    torch.testing.assert_close(pooled(raw, Context(), rows, 8), expected)
    for offset in (0, 1000):
        positions = torch.arange(offset, offset + 60)
        turned = rope.rotate(raw, positions)
        known = Context(query_rope=(rope, positions))
        torch.testing.assert_close(pooled(turned, known, rows, 8), expected, atol=1e-5, rtol=1e-4)
    between = raw.clone()
    between[:, :, 8:-8] += 5
    assert torch.equal(pooled(between, Context(), rows, 8), pooled(raw, Context(), rows, 8))
    overlapping = torch.cat((raw[:, :, :40], raw[:, :, 20:]), 2).mean((1, 2))
    torch.testing.assert_close(pooled(turned, Context(raw_query=raw), rows, 40), overlapping)


# -- oracle 8: tests/hf/test_fit_flux.py, on a model -----------------------------------------------


# -- the schedule --------------------------------------------------------------------------------
def test_the_temperature_falls_from_one_and_a_half_to_one():
    assert temperature(0, 100) == 1.5
    assert temperature(30, 100) == pytest.approx(1.25)
    assert [temperature(n, 100) for n in (60, 61, 99)] == [1.0, 1.0, 1.0]
    rates = [learning_rate(n, 50) for n in range(50)]
    assert rates[9] == 1.0 == max(rates)
    assert 0 <= rates[-1] < 0.01


def test_gumbel_noise_has_its_mean_and_variance():
    noise = gumbel((200_000,), torch.Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)


# -- other forms and refusals ----------------------------------------------------------------------
def test_a_triangles_last_queries_see_everything():
    q, k, v = qkv(150)
    method = Flux(**SMALL, mode="triangle", last=20, route="sparse")
    seen = method.layout(q, k, v, prompt()).dense()[0, 0]
    streaming = Flux(**SMALL, route="sparse").layout(q, k, v, prompt()).dense()[0, 0]
    assert torch.equal(seen[:130], streaming[:130])
    assert torch.equal(seen[130:], causal().dense(150, 150)[0, 0, 130:])


def test_a_window_has_no_sinks():
    q, k, v = qkv(150)
    seen = Flux(**SMALL, mode="window", route="sparse").layout(q, k, v, prompt()).dense()[0, 0]
    assert not seen[100, :16].any()
    assert seen[100, 90:101].all()


def test_left_padding_moves_neither_blocks_nor_the_decision():
    torch.manual_seed(3)
    q, k, v = qkv(120, batch=1)
    routers = Routers((0,), 16)
    routers.by_layer["0"].head[-1].weight.data.normal_()
    routers.by_layer["0"].head[-1].bias.data.zero_()
    method = Flux(**SMALL).with_routers(routers)
    alone = method(q[:, :, 37:], k[:, :, 37:], v[:, :, 37:], prompt()).out
    positions = (torch.arange(120) - 37)[None]
    ctx = Context(mask=causal() & padding([83]), q_positions=positions, kv_positions=positions)
    torch.testing.assert_close(method(q, k, v, ctx).out[:, :, 37:], alone)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flux(mode='circle')", "streaming, triangle, window"),
        ("flux(route='both')", "learned, full, sparse"),
        ("flux(local=0)", "at least 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        make(text)


def test_without_routers_it_says_how_to_make_them():
    q, k, v = qkv(60)
    with pytest.raises(InputError, match="foveate fit MODEL --method flux"):
        Flux()(q, k, v, prompt())
    with pytest.raises(InputError, match="Layer 3 has no router"):
        Flux().with_routers(sided(1.0))(q, k, v, prompt(layer=3))
