"""Routers that share: the spec's oracles, and the routers in whole models."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import Attention, Context, attention, blocks, catalog, causal, padding
from foveate.methods import make
from foveate.methods.attn_smoe import (
    AttentionRelation,
    CosineScores,
    FrozenScores,
    SimilarityRelation,
    StableScores,
)
from foveate.nn import MoE, Router
from foveate.ops.errors import InputError
from foveate.parts.again import Again, repeatable
from foveate.parts.balance import load_balance
from foveate.parts.routes import entropy, fluctuation, unevenness
from foveate.parts.routing import Around, RouterSizes, advance

F64 = torch.float64
B, L, D, E, H = 2, 13, 16, 6, 4


def tokens(*shape, norm=False):
    u = torch.randn(*(shape or (B, L, D)), dtype=F64)
    return u / u.norm(dim=-1, keepdim=True) if norm else u


def routes_of(u):
    return torch.randn(*u.shape[:-1], E, dtype=F64).softmax(-1)


def explicit(u, form, tau, mask=None):
    """S as the spec writes it, held whole."""
    scores = torch.einsum("bid,de,bje->bij", u, form, u) / tau
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(L, L)[0, 0], -torch.inf)
    return scores.softmax(-1)


def relation(tau, **more):
    made = SimilarityRelation(D, tau, **more).double()
    made.requires_grad_(False)
    return made


class Fixed(Again):
    """Weights that are given, in place of a layer's."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def __call__(self, values):
        return self.weights @ values[:, None]


def attended(weights, routes, how="mean"):
    made = AttentionRelation(weights.shape[1], how)
    return made(tokens(*routes.shape[:2], D), routes, Around(again=Fixed(weights)))


def layer_of(text="full", projection="gqa(kv_heads=2)"):
    return Attention(D, H, projection, text).double().requires_grad_(False)


def filled(layer, x, mask):
    again = Again()
    return again, layer(x, ctx=Context(mask=mask, again=again)).y


# -- the spec's oracles ---------------------------------------------------------------------------
def test_oracle_1_the_identity_is_the_plain_router():
    u = tokens()
    plain = Router(D, E, 2, renormalize=True).double()
    eye = torch.eye(L, dtype=F64).expand(B, H, L, L)
    r = Router(D, E, 2, renormalize=True, relation=AttentionRelation(H, "mean")).double()
    r.weight = plain.weight
    found, wanted = r(u, Around(again=Fixed(eye))), plain(u)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, atol=1e-15, rtol=0)
    # tau -> 0 with W_s = I and equal norms: each token is most similar to itself
    u = tokens(norm=True)
    torch.testing.assert_close(relation(1e-5)(u, routes := routes_of(u), Around()), routes)


def test_oracle_2_uniform_weights_give_every_token_the_same_experts():
    u = tokens()
    even = torch.full((B, H, L, L), 1 / L, dtype=F64)
    router = Router(D, E, 2, relation=AttentionRelation(H, "mean")).double()
    by_attention = router(u, Around(again=Fixed(even))).chosen
    router = Router(D, E, 2, relation=relation(1e12)).double()  # every score is the same
    for chosen in (by_attention, router(u).chosen):
        assert (chosen == chosen[:, :1]).all()
        assert chosen.sum(-1).eq(2).all()
    assert not (plain := Router(D, E, 2).double()(u).chosen).eq(plain[:, :1]).all()


@pytest.mark.parametrize("mask", [None, causal(), causal() & padding([L, 7])])
def test_oracle_3_rows_are_distributions(mask):
    u = tokens()
    again, _ = filled(layer_of(), u, mask)
    around = Around(Context(mask=mask), again)
    found = [relation(2.0)(u, routes_of(u), around)]
    for how in ("mean", "learned", "posterior"):
        found.append(AttentionRelation(H, how, 2.0).double()(u, routes_of(u), around).detach())
    for rbar in found:
        assert (rbar >= 0).all()
        torch.testing.assert_close(rbar.sum(-1), torch.ones(B, L, dtype=F64))


def test_oracle_4_entropy_lies_between_its_bounds_and_rises_for_some_tokens():
    u = tokens(40, 100, D)
    sharp = (3 * torch.randn(40, 100, E, dtype=F64)).softmax(-1)
    rbar, own = relation(4.0)(u, sharp, Around()), entropy(sharp)
    s = (u @ u.mT / 4.0).softmax(-1)
    low = (s @ own[..., None])[..., 0]
    high = low + entropy(s)
    assert (low <= entropy(rbar) + 1e-12).all()
    assert (entropy(rbar) <= high + 1e-12).all()
    assert (entropy(rbar) > own).any()  # it doesn't fall for every token
    assert (entropy(rbar) < own).any()


def test_oracle_5_twins_are_routed_alike_and_permutations_pass_through():
    u = tokens()
    u[:, 9] = u[:, 2]
    router = Router(D, E, 2, relation=relation(2.0)).double().requires_grad_(False)
    rbar = router(u).probs
    torch.testing.assert_close(rbar[:, 9], rbar[:, 2], atol=1e-15, rtol=0)
    order = torch.randperm(L)
    torch.testing.assert_close(router(u[:, order]).probs, rbar[:, order])


@pytest.mark.parametrize("name", ["similarity", "attention"])
def test_oracle_6_causal_routing_does_not_see_later_tokens(name):
    layer = layer_of()
    router = Router(
        D, E, 2, relation=relation(2.0) if name == "similarity" else AttentionRelation(H, "mean")
    ).double()

    def probs(x):
        again, y = filled(layer, x, causal())
        return router(y, Around(Context(mask=causal()), again)).probs.detach()

    x, t = tokens(), 8
    other = x.clone()
    other[:, t] = tokens(B, D)
    before, after = probs(x), probs(other)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize("mask", [None, causal(), causal() & padding([L, 6])])
def test_oracle_7_extra_values_are_the_explicit_weights(mask):
    layer, x = layer_of(), tokens()
    again, _ = filled(layer, x, mask)
    routes = routes_of(x)
    p = layer.projection
    at = torch.arange(L)
    q, k = (layer.rope.rotate(t, at) for t in (p.query(x), p.entries(x)["k"]))
    scores = q @ k.repeat_interleave(H // 2, 1).mT / math.sqrt(D // H)
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(L, L), -torch.inf)
    a = scores.softmax(-1).nan_to_num()
    found = AttentionRelation(H, "mean")(x, routes, Around(Context(mask=mask), again))
    torch.testing.assert_close(found, a.mean(1) @ routes, atol=1e-10, rtol=0)
    single = again(routes.float())  # values of a lower precision keep theirs
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), a @ routes[:, None], atol=1e-5, rtol=0)


def test_oracle_8_worked_example():
    routes = torch.tensor([[[0.9, 0.1], [0.4, 0.6]]], dtype=F64)
    s = torch.tensor([[[[0.7, 0.3], [0.2, 0.8]]]], dtype=F64)
    rbar = attended(s, routes)
    torch.testing.assert_close(rbar, torch.tensor([[[0.75, 0.25], [0.5, 0.5]]], dtype=F64))
    assert entropy(routes)[0].tolist() == pytest.approx([0.3251, 0.6730], abs=5e-5)
    assert entropy(rbar)[0].tolist() == pytest.approx([0.5623, 0.6931], abs=5e-5)


def test_oracle_9_balance_is_1_by_slots_and_k_by_tokens():
    probs = torch.full((12, E), 1 / E, dtype=F64)
    turn = (torch.arange(12)[:, None] + torch.arange(2) * 3) % E  # two experts each, all alike
    chosen = torch.zeros(12, E, dtype=torch.bool).scatter(1, turn, True)
    assert load_balance(probs, chosen, per_slot=True).loss.item() == pytest.approx(1.0)
    assert load_balance(probs, chosen).loss.item() == pytest.approx(2.0)
    code = E * (chosen.double().sum(0) / 24 * (probs.sum(0) / 24)).sum()
    assert code.item() == pytest.approx(1 / 2)
    # in a layer it is taken of rbar
    moe = MoE(Router(D, E, 2, relation=relation(2.0)), 8, balance=0.01, per_slot=True).double()
    u = tokens()
    routed = moe.router(u)
    share = routed.chosen.double().sum((0, 1)) / (2 * B * L)
    wanted = 0.01 * E * (share * routed.probs.mean((0, 1))).sum()
    torch.testing.assert_close(moe(u)[1]["expert_balance_loss"], wanted)


# -- what else the mechanism must do ---------------------------------------------------------------
@pytest.mark.parametrize("mask", [None, causal()])
def test_similarity_is_the_softmax_of_its_form(mask):
    u, routes = tokens(), routes_of(tokens())
    made = SimilarityRelation(D, 3.0).double()
    torch.nn.init.normal_(made.form, std=0.3)
    twin = made.form.detach().clone().requires_grad_(True)
    grown = u.clone().requires_grad_(True)
    found = made(grown, routes, Around(Context(mask=mask)))
    wanted = explicit(u, twin, 3.0, mask) @ routes
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(found)
    (found * probe).sum().backward()
    (wanted * probe).sum().backward()
    torch.testing.assert_close(made.form.grad, twin.grad)
    assert grown.grad.abs().sum() > 0


def test_normalized_similarity_does_not_see_the_norm():
    u, routes = tokens(), routes_of(tokens())
    made = relation(4.0, normalize=True, learned=False)
    longer = u * torch.rand(B, L, 1, dtype=F64).exp()
    torch.testing.assert_close(made(longer, routes, Around()), made(u, routes, Around()))
    unit = u / u.norm(dim=-1, keepdim=True) * 4
    wanted = explicit(unit, torch.eye(D, dtype=F64), 4.0) @ routes
    torch.testing.assert_close(made(u, routes, Around()), wanted)


def test_heads_by_learned_weights_and_by_responsibility():
    layer, x, routes = layer_of(), tokens(), routes_of(tokens())
    again, y = filled(layer, x, causal())
    by_head = again(routes)
    learned = AttentionRelation(H, "learned").double()
    torch.nn.init.normal_(learned.weight)
    w = learned.weight.softmax(0)
    around = Around(Context(mask=causal()), again)
    wanted = sum(w[h] * by_head[:, h] for h in range(H))
    torch.testing.assert_close(learned(x, routes, around), wanted)
    parts = torch.stack(list(again.projected()), 1)  # (B, H, L, D)
    torch.testing.assert_close(parts.sum(1), y)
    out = layer.projection.out.weight.unflatten(1, (H, -1))  # (D, H, Dv)
    torch.testing.assert_close(parts[:, 1], again._call.heads[:, 1] @ out[:, 1].T)
    far = (x[:, None] - parts).square().sum(-1)
    shares = (-far / (2 * 1.5**2)).softmax(1)
    found = AttentionRelation(H, "posterior", 1.5)(x, routes, around)
    torch.testing.assert_close(found, (shares[..., None] * by_head).sum(1))


def test_weights_of_a_pattern_are_the_pattern_s():
    layer, x, routes = layer_of(), tokens(), routes_of(tokens())
    far = routes.clone()
    far[:, 3] = far[:, 3].roll(1, -1)  # out of the window of token 12, no sink

    def rows(method):
        layer.attention = make(method)
        again, _ = filled(layer, x, causal())
        around = Around(Context(mask=causal()), again)
        return [AttentionRelation(H, "mean")(x, r, around)[:, 12] for r in (routes, far)]

    near, moved = rows("sink-window(sinks=1, window=4)")
    torch.testing.assert_close(moved, near)
    dense, changed = rows("full")
    assert not torch.allclose(changed, dense)
    assert not torch.allclose(near, dense)


def test_dropout_of_the_layer_leaves_the_router_s_weights_whole():
    layer = Attention(D, H, dropout=0.5).double().train()
    x = tokens()
    again, _ = filled(layer, x, causal())
    torch.testing.assert_close(
        again(torch.ones(B, L, 1, dtype=F64)), torch.ones(B, H, L, 1).double()
    )


def test_a_token_that_sees_nobody_keeps_its_own_distribution():
    seen = torch.ones(B, 1, L, L, dtype=torch.bool)
    seen[1, 0, 4:7] = False
    mask, blind = blocks(seen, 1), ~seen[:, 0].any(-1)
    x = tokens()
    routes = routes_of(x)
    again, _ = filled(layer_of(), x, mask)
    around = Around(Context(mask=mask), again)
    for made in (relation(16.0), AttentionRelation(H, "mean")):
        rbar = made(x, routes, around)
        torch.testing.assert_close(rbar[blind], routes[blind])
        assert not torch.isclose(rbar[~blind], routes[~blind]).all(-1).any()


def test_padding_counts_for_nobody():
    mask, layer = padding([L, 5]), layer_of()
    x = tokens()
    routes = routes_of(x)
    other, moved = x.clone(), routes.clone()
    other[1, 5:], moved[1, 5:] = tokens(L - 5, D), routes_of(tokens(L - 5, D))
    for name in ("similarity", "attention"):
        rows = []
        for u, r in ((x, routes), (other, moved)):
            again, _ = filled(layer, u, mask)
            made = relation(2.0) if name == "similarity" else AttentionRelation(H, "mean")
            rows.append(made(u, r, Around(Context(mask=mask), again)))
        torch.testing.assert_close(rows[0][1, :5], rows[1][1, :5])


def test_xmoe_scores_by_directions_and_balances_with_its_temperature():
    scores = CosineScores(D, E).double()
    torch.testing.assert_close(scores.embeddings.norm(dim=1), torch.full((E,), 1.5).double())
    u = tokens(5, D)
    small = u @ scores.reduce.weight.T
    e = scores.embeddings / scores.embeddings.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scores(u), small @ e.T)
    router = Router(D, E, 2, renormalize=True, scores=scores)
    routed = router(u)
    best = (small @ e.T).topk(2, -1)  # gates of the code base: softmax over the chosen logits
    wanted = torch.zeros(5, E, dtype=F64).scatter(1, best.indices, best.values.softmax(-1))
    torch.testing.assert_close(routed.weights, wanted)
    torch.testing.assert_close(routed.spread, (small @ e.T / 0.3).softmax(-1))


def test_smoe_dropout_grows_from_k_to_all_experts_and_is_not_trained():
    router = Router(D, E, 2, scores=FrozenScores(D, E))
    assert [name for name, _ in router.named_parameters()] == []
    seen = []
    for step in range(101):
        advance(router, step / 100)
        seen.append(router.active)
        assert router(tokens(3, D)).chosen.sum(-1).eq(seen[-1]).all()
    assert seen == sorted(seen)
    assert (seen[0], seen[50], seen[-1]) == (2, 4, E)
    assert router.bfloat16().active == E  # kept through changes of dtype, and saved
    again = Router(D, E, 2, scores=FrozenScores(D, E))
    again.load_state_dict(router.state_dict())
    assert again.active == E


def test_figures_of_routing():
    chosen = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool()
    later = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 1, 0]]).bool()
    best, other = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 0, 2, 0])
    assert fluctuation((best, chosen), (other, later)) == (0.5, 0.25)
    assert unevenness(later) == pytest.approx(
        torch.tensor([3.0, 4, 1]).std(unbiased=False) / (8 / 3)
    )
    assert unevenness(torch.ones(3, 2).bool()) == 0
    even = torch.full((4,), 0.25, dtype=F64)
    assert entropy(even).item() == pytest.approx(math.log(4))
    assert entropy(torch.tensor([0.0, 1.0])).item() == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("similarity-smoe(tau=0)", "above 0"),
        ("attention-smoe(heads='max')", "mean"),
        ("attention-smoe(spread=2.0)", "posterior"),
        ("attention-smoe(heads='posterior', spread=-1)", "above 0"),
        ("xmoe(width=0)", "at least 1"),
    ],
)
def test_bad_hyper_parameters(text, said):
    with pytest.raises(InputError, match=said):
        make(text)


def test_refusals_name_what_would_work():
    with pytest.raises(InputError, match="similarity-smoe"):
        make("attention-smoe").build(RouterSizes(D, E))
    with pytest.raises(InputError, match="'softmax'"):
        Router(D, E, 2, "sigmoid", relation=relation(2.0))
    with pytest.raises(InputError, match=r"\(B, L, 16\)"):
        Router(D, E, 2, relation=relation(2.0))(tokens(5, D))
    with pytest.raises(InputError, match="Block"):
        Router(D, E, 2, relation=AttentionRelation(H, "mean")).double()(tokens())
    with pytest.raises(InputError, match="same tokens"):
        fluctuation((torch.zeros(3), torch.ones(3, 2)), (torch.zeros(4), torch.ones(4, 2)))
    lucid = Attention(D, H, attention="lucid")
    with pytest.raises(InputError, match="sink-window"):
        lucid(torch.randn(B, L, D), ctx=Context(mask=causal(), again=Again()))


def test_the_weights_are_those_of_the_op():
    """`Again` against the op's own output: on the layer's values it gives the layer's heads."""
    q, k, v = torch.randn(3, B, H, L, 4, dtype=F64).unbind(0)
    again = Again()
    ctx = Context(mask=causal(), scale=0.3, again=again)
    with pytest.raises(InputError, match="wasn't called"):
        again.fill(make("full"), (q, k[:, :2], v[:, :2]), ctx, v, lambda o: o)
    make("full")(q, k[:, :2], v[:, :2], ctx)
    again.fill(make("full"), (q, k[:, :2], v[:, :2]), ctx, v, lambda o: o)
    shared = v[:, 0]
    wanted = attention(q, k[:, :2], shared[:, None].expand(-1, 2, -1, -1), causal(), scale=0.3).out
    torch.testing.assert_close(again(shared), wanted)


@pytest.mark.parametrize("new", [150, 1])  # prefill; decoding, where some patterns are dense
@pytest.mark.parametrize("key", [row.key for row in catalog.rows() if row.kind == "pattern"])
def test_every_pattern_s_weights_are_applied_again_or_refused(key, new):
    from test_matrix import method as small

    method, again = small(key), Again()
    phase = "decode" if new == 1 else "prefill"
    ctx = Context(mask=causal() & padding([150, 130]), phase=phase, again=again)
    q = torch.randn(B, 4, new, 8, dtype=F64)
    k = torch.randn(B, 2, 150, 8, dtype=F64)
    v = torch.randn(B, 1, 150, E, dtype=F64).expand(-1, 2, -1, -1)
    if not repeatable(method):
        with pytest.raises(InputError, match="sink-window"):
            again.fill(method, (q, k, v), ctx, v, lambda o: o)
        return
    wanted = method(q, k, v, ctx).out
    again.fill(method, (q, k, v), ctx, wanted, lambda o: o)
    torch.testing.assert_close(again(v[:, 0]), wanted)


def test_stable_moe_learns_its_own_choice_and_then_keeps_to_it():
    vocab = 9
    scores = StableScores(D, E, vocab, width=7, first=0.25).double()
    router = Router(D, E, 2, renormalize=True, scores=scores)
    u, ids = tokens(), torch.randint(-1, vocab, (B, L))
    around = Around(Context(ids=ids))
    own = torch.zeros(B, L, E).bool().scatter(-1, (u @ scores.weight.T).topk(2).indices, True)
    x = scores.words.weight[ids + 1]
    light = (x @ scores.light.T).log_softmax(-1)
    learnt = torch.zeros(B, L, E).bool().scatter(-1, light.topk(2).indices, True)
    assert not torch.equal(own, learnt)

    routed = router(u, around)  # first it chooses by u, and another learns to
    assert torch.equal(routed.chosen, own)
    torch.testing.assert_close(routed.choice_losses, -(light * own).sum(-1) / 2)
    losses = routed.choice_losses.sum()
    grads = torch.autograd.grad(losses, list(scores.parameters()), allow_unused=True)
    assert [name for (name, _), g in zip(scores.named_parameters(), grads) if g is not None] == [
        "light", "words.weight",
    ]  # fmt: skip

    for moved in ("stage", "eval"):
        advance(router, 0.25 if moved == "stage" else 0.0)
        router.train(moved == "stage")
        routed = router(u, around)
        assert torch.equal(routed.chosen, learnt)
        assert routed.choice_losses is None
        assert routed.frozen
        weights = (u @ scores.weight.T).softmax(-1) * learnt  # which still weighs, and is trained
        torch.testing.assert_close(routed.weights, weights / weights.sum(-1, keepdim=True))
        scores.weight.grad = None
        routed.weights.square().sum().backward()
        assert scores.weight.grad.abs().sum() > 0
        assert scores.light.grad is None
        assert scores.words.weight.grad is None
        trained = [p is scores.weight for p in scores.parameters() if p.requires_grad]
        assert trained == ([True] if moved == "stage" else [True, False, False])
    with pytest.raises(InputError, match="ids"):
        router(u)
    with pytest.raises(InputError, match="share"):
        make("stable-moe(first=2.0)")


def test_stable_moe_s_light_router_comes_to_choose_as_the_other_does():
    torch.manual_seed(0)
    router = Router(D, E, 1, scores=StableScores(D, E, 30, first=1.0)).double()
    words = tokens(30, D)
    optimizer = torch.optim.Adam(router.scores.parameters(), lr=0.02)
    for _ in range(200):
        ids = torch.randint(0, 30, (4, L))
        loss = router(words[ids], Around(Context(ids=ids))).choice_losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.arange(30)[None]
    around = Around(Context(ids=ids))
    assert torch.equal(router(words[ids], around).chosen, router.eval()(words[ids], around).chosen)


@pytest.mark.parametrize("how", ["groups", "bias"])
def test_stable_moe_learns_the_choice_that_is_made(how):
    torch.manual_seed(0)
    more = {"groups": 3, "top_groups": 2} if how == "groups" else {}
    router = Router(D, E, 2, scores=StableScores(D, E, 30), **more).double()
    if how == "bias":
        router.bias[:2] = 0.3
    u, ids = tokens(), torch.randint(0, 30, (B, L))
    routed = router(u, Around(Context(ids=ids)))
    plain = (u @ router.scores.weight.T).topk(2).indices
    assert not torch.equal(routed.chosen, torch.zeros_like(routed.chosen).scatter(-1, plain, True))
    light = (router.scores.words(ids + 1) @ router.scores.light.T).log_softmax(-1)
    torch.testing.assert_close(routed.choice_losses, -(light * routed.chosen).sum(-1) / 2)


def test_stable_moe_knows_the_ids_that_it_was_made_for_and_far_logits_too():
    router = Router(D, E, 2, scores=StableScores(D, E, 9)).double().eval()
    with pytest.raises(InputError, match="knows 9 ids, got 9"):
        router(tokens(1, 1, D), Around(Context(ids=torch.tensor([[9]]))))
    with torch.no_grad():
        router.scores.light.mul_(1e5)  # a softmax of these has many zeros
    ids = torch.arange(9)[None]
    wanted = (router.scores.words(ids + 1) @ router.scores.light.T).topk(2).indices
    found = router(tokens(1, 9, D), Around(Context(ids=ids))).chosen
    assert torch.equal(found, torch.zeros_like(found).scatter(-1, wanted, True))


def test_stable_moe_in_a_mixture_leaves_padding_out_and_balances_until_it_is_frozen():
    made = Router(D, E, 2, scores=StableScores(D, E, 9)).double()
    moe = MoE(made, 8, balance=0.1).double()
    u, ids = tokens(), torch.randint(0, 9, (B, L))
    real = torch.arange(L) < torch.tensor([[L], [4]])
    around = Around(Context(ids=ids))
    aux = moe(u, real, around)[1]
    losses = made(u, around).choice_losses
    torch.testing.assert_close(aux["expert_choice_loss"], losses[real].mean())
    assert "expert_balance_loss" in aux
    empty = moe(u[:, :0], None, Around(Context(ids=ids[:, :0])))[1]
    assert empty["expert_choice_loss"] == 0
    advance(moe, 0.5)
    assert set(moe(u, real, around)[1]) == {"expert_load"}
