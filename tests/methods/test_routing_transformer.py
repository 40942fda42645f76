"""The Routing Transformer: the oracles of its spec, and what only it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate import Context, attention, causal, padding
from foveate.methods import make
from foveate.methods.routing_transformer import clusters
from foveate.methods.routing_transformer.centroids import Centroids, layer_norm
from foveate.methods.routing_transformer.members import best, streamed
from foveate.parts import Heads
from foveate.parts.selection import topk_mask

D, DV = 16, 24


def build(spec: str = "", heads=(4, 4), layer=0, **more):
    """An attention of routing heads alone, unless told otherwise; in eval mode."""
    fields = {"local": 0, "clusters": 4, "window": 8} | more
    inner = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    made = make(f"routing-transformer({inner})").build(Heads(64, *heads, D, DV, layer))
    return made.eval()


def tensors(length=40, heads=(4, 4), batch=2, dtype=torch.float32, kv_len=None) -> list[Tensor]:
    sizes = [
        (heads[0], length, D),
        (heads[1], kv_len or length, D),
        (heads[1], kv_len or length, DV),
    ]
    return [torch.randn(batch, *size, dtype=dtype) for size in sizes]


def by_masks(
    q, k, v, q_in: Tensor, k_in: Tensor, allowed: Tensor, scale: float, eps: float, own: bool
):
    """Oracle 2's brute force: a dense softmax for each cluster, then the mean.

    q_in (B, H, C, Lq) bool members; k_in (B, H, C, Lq, Lkv) bool: keys of the cluster for each row.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (
        k.repeat_interleave(group, 1),
        v.repeat_interleave(v.shape[1] and q.shape[1] // v.shape[1], 1),
    )
    total, number = 0, 0
    for c in range(q_in.shape[2]):
        seen = q_in[:, :, c, :, None] & k_in[:, :, c] & allowed
        if not own:
            alone = seen.sum(-1, keepdim=True) == 1
            seen = seen & (~torch.eye(seen.shape[-1], dtype=torch.bool) | alone)
        scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
        some = seen.any(-1, keepdim=True)
        out = scores.masked_fill(~some, 0).softmax(-1).masked_fill(~seen, 0) @ v
        total, number = total + out * some, number + some
    return total / (number + eps) if eps else total / number.clamp_min(1)


def expected(made, q, k, v, *, form: str, real: Tensor | None = None):
    """What `made` should give, by brute force in float64."""
    is_causal = form in ("sequence", "prefix")
    shared = made.shares(is_causal)
    q = layer_norm(q.double())
    k = q if shared else layer_norm(k.double())
    v = v.double()
    group = q.shape[1] // made.centroids.mu.shape[0]
    mu = made.centroids.mu.double().repeat_interleave(group, 0)
    every_k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    q_scores, k_scores = mu @ q.mT, mu @ every_k.mT
    lq, lk = q.shape[2], k.shape[2]
    w = [made.hyper.window or -(-n // made.hyper.clusters) for n in (lq, lk)]
    open_ = None if real is None else real[:, None, None]
    if form == "prefix":
        steps = torch.arange(lq)
        q_in, k_in = [], []
        for t in steps:
            upto = steps <= t
            upto = upto if open_ is None else upto & open_
            q_in.append(topk_mask(q_scores, w[0], upto.expand_as(q_scores))[..., t])
            k_in.append(topk_mask(k_scores, w[1], upto.expand_as(k_scores)))
        q_in, k_in = torch.stack(q_in, -1), torch.stack(k_in, -2)
    else:
        q_in = topk_mask(q_scores, w[0], open_)
        k_in = topk_mask(k_scores, w[1], open_)[..., None, :].expand(-1, -1, -1, lq, -1)
    allowed = torch.ones(lq, lk, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if real is not None:
        allowed = allowed & real[:, None, None]
    scale = made.hyper.scale or D**-0.5
    own = made.sees_own(shared)
    return by_masks(q, every_k, v, q_in, k_in, allowed, scale, made.hyper.eps, own)


# -- oracle 1: everything in every cluster is dense attention --------------------------------------
@pytest.mark.parametrize("form", ["sequence", "prefix"])
@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("pads", [0, 5])
def test_oracle_1_whole_clusters_are_dense_attention(form, clusters, pads):
    # With padding the general path runs, which doesn't know that all clusters are one.
    made = build(clusters=clusters, window=40, eps=0.0, own=True, form=form)
    q, k, v = tensors(40 + pads)
    x = layer_norm(q.double())[:, :, :40]
    want = attention(x, x, v[:, :, :40].double(), causal(), backend="reference").out
    mask = causal() & padding([40, 40]) if pads else causal()
    got = made(q, k, v, Context(mask=mask)).out[:, :, :40]
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_oracle_1_bidirectional(shared):
    made = build(clusters=3, window=40, eps=0.0, own=True, shared=shared)
    q, k, v = tensors()
    x, y = layer_norm(q.double()), layer_norm((q if shared else k).double())
    want = attention(x, y, v.double(), backend="reference").out
    torch.testing.assert_close(made(q, k, v).out.double(), want, atol=1e-6, rtol=1e-5)


# -- oracle 2: brute force ------------------------------------------------------------------------
FORMS = ["sequence", "prefix", "both"]


def call(made, q, k, v, form, real=None):
    mask = None if form == "both" else causal()
    if real is not None:
        mask = padding(real.sum(1)) if mask is None else mask & padding(real.sum(1))
    return made(q, k, v, Context(mask=mask)).out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("clusters", "window", "length"), [(4, 8, 40), (7, 5, 61), (3, 20, 45), (5, 1, 30)]
)
def test_oracle_2_equals_brute_force(form, shared, clusters, window, length):
    made = build(
        clusters=clusters, window=window, shared=shared, form="auto" if form == "both" else form
    )
    q, k, v = tensors(length)
    want = expected(made, q, k, v, form=form)
    torch.testing.assert_close(call(made, q, k, v, form).double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_oracle_2_with_grouped_heads_padding_and_own_keys(form, shared):
    own = form != "both" or not shared or None
    made = build(heads=(4, 2), shared=shared, own=own, form="auto" if form == "both" else form)
    q, k, v = tensors(heads=(4, 2))
    real = torch.arange(40) < torch.tensor([40, 23])[:, None]
    want = expected(made, q, k, v, form=form, real=real)
    got = call(made, q, k, v, form, real)
    assert not got[1, :, 23:].any()
    torch.testing.assert_close(got.double()[0], want[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.double()[1, :, :23], want[1, :, :23], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("memory", [0, 1])
def test_long_prefixes_are_cut_into_pieces_with_their_own_keys(monkeypatch, shared, memory):
    spec = {"clusters": 3, "window": 9, "shared": shared, "form": "prefix", "memory": memory}
    q, k, v = tensors(90)
    made = build(**spec)
    whole = call(made, q, k, v, "prefix")
    pieces = []
    cut = clusters.by_rows
    monkeypatch.setattr(clusters, "_TILE", 8)
    monkeypatch.setattr(clusters, "by_rows", lambda *x: pieces.append(1) or cut(*x))
    torch.testing.assert_close(call(made, q, k, v, "prefix"), whole)
    assert pieces
    if not memory:
        want = expected(made, q, k, v, form="prefix")
        torch.testing.assert_close(whole.double(), want, atol=1e-6, rtol=1e-5)


def test_oracle_2_cross_attention():
    made = build(heads=(4, 2))
    q, k, v = tensors(30, heads=(4, 2), kv_len=50)
    want = expected(made, q, k, v, form="both")
    torch.testing.assert_close(made(q, k, v).out.double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_oracle_2_backward(form, shared):
    made = build(heads=(4, 2), shared=shared, form="auto" if form == "both" else form)
    q, k, v = (x.requires_grad_() for x in tensors(heads=(4, 2)))
    got = call(made, q, k, v, form)
    want = expected(made, q, k, v, form=form)
    weight = torch.randn_like(got)
    inputs = (q, v) if shared else (q, k, v)
    ours = torch.autograd.grad((got * weight).sum(), inputs)
    theirs = torch.autograd.grad((want * weight.double()).sum(), inputs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_released_codes_scale_and_eps():
    made = build(scale=1.0, eps=1e-2, form="sequence")
    q, k, v = tensors()
    want = expected(made, q, k, v, form="sequence")
    got = call(made, q, k, v, "sequence").double()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_low_precision():
    made = build(form="sequence")
    q, k, v = tensors(dtype=torch.bfloat16)
    out, lse = made(q, k, v, Context(mask=causal()))
    assert out.dtype == torch.bfloat16
    assert lse.isnan().all()
    want = expected(made, layer_norm(q).double(), k, v, form="sequence")
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


# -- oracle 3: causality ------------------------------------------------------------------------
def test_oracle_3_values_never_leak_and_routing_does_in_the_papers_form():
    made = build(clusters=4, window=4, heads=(1, 1), form="sequence")
    q, k, v = tensors(16, heads=(1, 1), batch=1)
    ctx = Context(mask=causal())
    before = made(q, k, v, ctx).out
    other = v.clone()
    other[:, :, 12:] = torch.randn(1, 1, 4, DV)
    after = made(q, k, other, ctx).out
    assert torch.equal(after[:, :, :12], before[:, :, :12])  # members don't depend on values
    changed = 0
    for _ in range(20):
        q2 = q.clone()
        q2[:, :, 12:] = torch.randn(1, 1, 4, D)
        changed += int((made(q2, k, v, ctx).out != before)[:, :, :12].any(-1).sum())
    assert changed > 0


@pytest.mark.parametrize("shared", [True, False])
def test_oracle_3_the_prefix_form_is_strictly_causal(shared):
    made = build(clusters=4, window=4, shared=shared, form="prefix")
    q, k, v = tensors(40)
    ctx = Context(mask=causal())
    before = made(q, k, v, ctx).out
    for cut in (3, 12, 33):
        changed = [
            torch.cat((x[:, :, :cut], torch.randn_like(x[:, :, cut:])), 2) for x in (q, k, v)
        ]
        after = made(*changed, Context(mask=causal())).out
        torch.testing.assert_close(after[:, :, :cut], before[:, :, :cut])
        assert not torch.equal(after[:, :, cut:], before[:, :, cut:])


def test_auto_is_the_papers_form_in_training_alone():
    made, same = build(), build(form="sequence")
    same.load_state_dict(made.state_dict())
    q, k, v = tensors()
    ctx = Context(mask=causal())
    in_eval = made(q, k, v, ctx).out
    made.train()
    in_training = made(q, k, v, ctx).out
    torch.testing.assert_close(in_training, same(q, k, v, ctx).out)
    assert not torch.allclose(in_eval, in_training)


# -- oracle 4 --------------------------------------------------------------------------------------
def test_oracle_4_norms_and_nearest_centroids():
    x = layer_norm(torch.randn(500, D) * 3 + 1)
    torch.testing.assert_close(x.norm(dim=-1), torch.full((500,), D**0.5), atol=1e-4, rtol=1e-4)
    mu = torch.nn.functional.normalize(torch.randn(9, D), dim=-1) * 2.5
    assert torch.equal((x @ mu.T).argmax(-1), torch.cdist(x, mu).argmin(-1))


# -- oracle 5 --------------------------------------------------------------------------------------
def clouds(n=400):
    """LN'd tokens (1, 1, n, D) of two well separated clouds, and the clouds' means (2, D)."""
    centers = torch.randn(2, 1, D) * 4
    x = layer_norm(centers + 0.3 * torch.randn(2, n // 2, D))
    return x.reshape(1, 1, n, D), x.mean(1)


def test_oracle_5_centroids_become_the_means_of_the_clouds():
    x, means = clouds()
    made = Centroids(1, 2, D, decay=0.9)
    first = x[0, 0, [0, 300]]
    made.mu.copy_(first[None])
    made.total.copy_(first[None])
    for _ in range(200):
        made.learn([(x, None)])
    torch.testing.assert_close(made.mu[0], means, atol=0.05 * D**0.5, rtol=0)
    torch.testing.assert_close(made.number.sum(), torch.tensor(400.0), atol=1e-3, rtol=1e-4)
    assert (made.mu.norm(dim=-1) < D**0.5).all()


def test_oracle_5_one_step_by_hand():
    made = Centroids(1, 2, 2, decay=0.5)
    mu = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    made.mu.copy_(mu)
    made.total.copy_(mu)
    x = torch.tensor([[2.0, 1.0], [3.0, 0.0], [0.0, 4.0]])[None, None]
    made.learn([(x, None)])
    number = torch.tensor([1.0, 0.5])  # half of 2 and 1 tokens
    total = torch.tensor([[0.5 + 2.5, 0.5], [0.0, 0.5 + 2.0]])
    smooth = (number + 1e-5) / (1.5 + 2e-5) * 1.5
    torch.testing.assert_close(made.number[0], number)
    torch.testing.assert_close(made.mu[0], total / smooth[:, None])


def test_padding_moves_no_centroid():
    x, _ = clouds()
    noisy = torch.cat((x, 100 * torch.randn(1, 1, 50, D)), 2)
    real = torch.arange(450)[None] < 400
    one, two = (Centroids(1, 3, D) for _ in range(2))
    two.load_state_dict(one.state_dict())
    one.learn([(x, None)])
    two.learn([(noisy, real)])
    torch.testing.assert_close(two.mu, one.mu)


# -- oracle 6 --------------------------------------------------------------------------------------
def test_oracle_6_every_cluster_is_of_one_size():
    scores = torch.randn(2, 3, 5, 64)
    place = best(scores, 12)
    assert place.shape == (2, 3, 5, 12)
    assert (place.diff(dim=-1) > 0).all()
    count = torch.zeros(2, 3, 64).scatter_add(2, place.flatten(2), torch.ones(2, 3, 60))
    assert (count.sum(-1) == 5 * 12).all()


@pytest.mark.parametrize("shared", [True, False])
def test_oracle_6_permuted_inputs_give_permuted_outputs(shared):
    made = build(shared=shared)
    q, k, v = tensors()
    order = torch.randperm(40)
    once = made(q, k, v).out
    again = made(*(x[:, :, order] for x in (q, k, v))).out
    torch.testing.assert_close(again, once[:, :, order])


def test_oracle_6_commitment_loss():
    made = Centroids(2, 3, D)
    x = made.mu[:, [0, 2, 1, 1]].expand(2, -1, -1, -1).clone().requires_grad_()
    assert made.losses(x, None, 1.0)["commitment_loss"] == 0
    y = torch.randn(2, 2, 7, D, requires_grad=True)
    loss = made.losses(y, None, 0.5)["commitment_loss"]
    near = (made.mu @ y.mT).argmax(2)
    mine = torch.stack([torch.stack([made.mu[h, near[b, h]] for h in range(2)]) for b in range(2)])
    torch.testing.assert_close(loss, 0.5 * (y - mine).square().mean())
    loss.backward()
    torch.testing.assert_close(y.grad, (y - mine).detach() / y.numel())
    assert not made.mu.requires_grad
    assert list(made.parameters()) == []


def test_a_centroid_that_is_learnt_by_gradient_has_a_loss_of_its_own():
    made = Centroids(1, 2, D, update="gradient")
    y = torch.randn(1, 1, 9, D, requires_grad=True)
    losses = made.losses(y, None, 1e-4)
    losses["centroid_loss"].backward()
    assert y.grad is None
    assert made.mu.grad.abs().sum() > 0
    before = made.mu.clone()
    made.learn([(y, None)])
    assert torch.equal(made.mu, before)


# -- oracle 7 --------------------------------------------------------------------------------------
def test_oracle_7_neighbours_of_a_centroid_are_alike():
    unit = torch.nn.functional.normalize
    m = unit(torch.randn(200, D, dtype=torch.float64), dim=-1)
    q, k = (unit(m + s * torch.randn_like(m), dim=-1) for s in (0.05, 0.2))
    radius = torch.maximum((q - m).norm(dim=-1), (k - m).norm(dim=-1))
    assert ((q * k).sum(-1) >= 1 - 2 * radius**2 - 1e-12).all()


# -- members ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", [False, True])
def test_members_of_every_prefix(ties):
    for trial in range(20):
        n, w = int(torch.randint(1, 60, ())), int(torch.randint(1, 9, ()))
        scores = torch.randint(0, 6, (2, 3, n)).float() if ties else torch.randn(2, 3, n)
        real = torch.rand(2, 1, n) > 0.2 if trial % 3 == 0 else None
        stay, held = streamed(scores, w, real)
        for t in range(n):
            now = (stay.place >= 0) & (stay.place <= t) & (stay.until > t)
            got = torch.zeros(2, 3, n + 1, dtype=torch.bool)
            got.scatter_(2, torch.where(now, stay.place, n), True)
            upto = None if real is None else real[..., : t + 1]
            want = topk_mask(scores[..., : t + 1], w, upto)
            assert torch.equal(got[..., : t + 1], want)
        assert torch.equal(held.place, best(scores, w, real))


def test_scores_that_rise_all_along():
    scores = torch.arange(300.0)[None]
    stay, held = streamed(scores, 7)
    assert torch.equal(stay.place[0], torch.arange(300))
    assert torch.equal(stay.until[0], (torch.arange(300) + 7).clamp_max(300))
    assert torch.equal(held.place[0], torch.arange(293, 300))
