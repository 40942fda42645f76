"""The Routing Transformer in layers and models: training, decoding, variants, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import foveate
from foveate import Context, attention, causal, padding, window
from foveate.methods import make
from foveate.methods.routing_transformer.centroids import Centroids, layer_norm
from foveate.ops.errors import InputError
from foveate.parts import Heads

SPEC = "routing-transformer(clusters=4, window=6, block=8{})"


def layer(more="", kv_heads=4, **given):
    text = SPEC.format(f", {more}" if more else "")
    text = text.replace("window=6, ", "" if "window=" in more else "window=6, ")
    return foveate.Attention(64, 4, f"gqa(kv_heads={kv_heads})", text, **given)


def steps(made, x, cuts, **more):
    cache = made.new_cache()
    with torch.no_grad():
        found = [made(part, mask=causal(), cache=cache, **more).y for part in x.split(cuts, 1)]
    return torch.cat(found, 1), cache


# -- decoding -------------------------------------------------------------------------------------
VARIANTS = [
    "",
    "shared=False",
    "shared=False, memory=2",
    "memory=1",
    "relative=4",
    "own=True",
    "relative=3, own=True",
    "local=0, window=1",
    "local=4",
    "init='hash', update='none'",
]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("more", VARIANTS)
def test_decoding_equals_the_full_forward(more, kv_heads):
    made = layer(more, kv_heads).eval()
    x = torch.randn(2, 45, 64)
    want = made(x, mask=causal()).y
    for cuts in ([1] * 45, [30, 1, 1, 5, 8]):
        got, cache = steps(made, x, cuts)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert len(cache) == 45


@pytest.mark.parametrize("more", ["", "shared=False"])
def test_decoding_behind_left_padding(more):
    made = layer(more, position="rope").eval()
    x, pads = torch.randn(2, 40, 64), torch.tensor([0, 9])
    at = torch.arange(40) - pads[:, None]
    alone = made(x[1:, 9:], mask=causal()).y
    cache = made.new_cache()
    got = []
    with torch.no_grad():
        for start, end in [(0, 20), *((i, i + 1) for i in range(20, 40))]:
            ctx = Context(
                mask=causal() & padding(end - pads),
                q_positions=at[:, start:end],
                kv_positions=at[:, :end],
            )
            got.append(made(x[:, start:end], ctx=ctx, cache=cache).y)
    torch.testing.assert_close(torch.cat(got, 1)[1:, 9:], alone, atol=1e-5, rtol=1e-4)


def test_a_state_follows_beams_and_is_cut():
    made, x = layer().eval(), torch.randn(2, 40, 64)
    want = made(x, mask=causal()).y
    _, cache = steps(made, x[:, :33], [20] + [1] * 13)
    cache.truncate(25)
    cache.reorder(torch.tensor([1, 0, 0]))
    with torch.no_grad():
        got = [made(x[[1, 0, 0], i : i + 1], mask=causal(), cache=cache).y for i in range(25, 40)]
    torch.testing.assert_close(torch.cat(got, 1), want[[1, 0, 0], 25:], atol=1e-5, rtol=1e-4)
    assert cache.batch == 3
    cache.truncate(0)
    assert len(cache) == 0
    assert cache.bytes() == 0


def test_a_state_holds_what_it_declares():
    made, x = layer(kv_heads=2).eval(), torch.randn(3, 20, 64)
    _, cache = steps(made, x, [20])
    local, keys, values, scores = 1 * (16 + 16), 2 * 16, 1 * 16, 2 * 4
    assert cache.elements_per_token == local + keys + values + scores
    members = 3 * 2 * 4 * (6 * (8 + 4) + 4)  # places, scores, and the lowest score
    assert cache.bytes() == 3 * 20 * 4 * cache.elements_per_token + members


def test_a_step_reads_about_one_clusters_keys(monkeypatch):
    from foveate.methods.routing_transformer import step

    made = foveate.Attention(
        32, 1, attention="routing-transformer(clusters=16, window=16, local=0)", position="none"
    ).eval()
    x = torch.randn(1, 256, 32)
    _, cache = steps(made, x[:, :200], [200])
    read = []
    inner = step.attention
    monkeypatch.setattr(
        step,
        "attention",
        lambda q, k, *a, **b: read.append(k.shape[0] * k.shape[2]) or inner(q, k, *a, **b),
    )
    with torch.no_grad():
        for i in range(200, 256):
            made(x[:, i : i + 1], mask=causal(), cache=cache)
    assert sum(read) / 56 < 2.5 * 16  # of 200 to 256 keys


# -- heads ----------------------------------------------------------------------------------------
def test_local_heads_see_their_block_and_the_one_before():
    made = make(SPEC.format(", local=2")).build(Heads(64, 4, 4, 16, 16)).eval()
    q, k, v = torch.randn(3, 2, 4, 30, 16).unbind(0)
    near = causal() & window(1, 1, block=8)
    want = attention(q[:, :2], k[:, :2], v[:, :2], near, backend="reference")
    got = made(q, k, v, Context(mask=causal()))
    torch.testing.assert_close(got.out[:, :2], want.out)
    torch.testing.assert_close(got.lse[:, :2], want.lse)
    assert got.lse[:, 2:].isnan().all()
    seen = near.dense(30, 30)[0, 0]
    assert seen[20].nonzero()[:, 0].tolist() == list(range(8, 21))


@pytest.mark.parametrize(("heads", "kv", "local"), [(8, 8, 4), (8, 4, 4), (6, 3, 2), (8, 1, 4)])
def test_half_of_the_heads_are_local(heads, kv, local):
    made = make("routing-transformer").build(Heads(64, heads, kv, 8, 8))
    assert (made.local, made.routed) == (local, heads - local)


def test_the_first_layers_are_local():
    for index, routed in ((0, 0), (1, 0), (2, 2)):
        made = layer("skip_first=2", layer=index).attention
        assert made.routed == routed
        assert (made.centroids is None) == (routed == 0)


# -- training -------------------------------------------------------------------------------------
def test_centroids_move_in_training_and_not_in_eval():
    made, x = layer(), torch.randn(2, 30, 64)
    before = made.attention.centroids.mu.clone()
    made.eval()
    y, _, aux = made(x, mask=causal())
    assert aux == {}
    assert torch.equal(made.attention.centroids.mu, before)
    made.train()
    y, _, aux = made(x, mask=causal())
    assert set(aux) == {"commitment_loss"}
    assert not torch.equal(made.attention.centroids.mu, before)
    assert "attention.centroids.mu" in made.state_dict()
    assert "attention.centroids.mu" not in dict(made.named_parameters())
    aux["commitment_loss"].backward()
    assert sum(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters()) == 1


def test_a_call_routes_with_the_centroids_from_before_it():
    made, x = layer("form='sequence'"), torch.randn(2, 30, 64)
    still = copy.deepcopy(made).eval()
    torch.testing.assert_close(made.train()(x, mask=causal()).y, still(x, mask=causal()).y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_move_centroids_once_and_give_the_same_gradients(reentrant):
    made, x = layer("decay=0.5"), torch.randn(2, 30, 64, requires_grad=True)
    twin = copy.deepcopy(made)
    weight = torch.randn(2, 30, 64)

    def run(m, x):
        y, _, aux = m(x, mask=causal())
        return (y * weight).sum() + 100 * aux["commitment_loss"]

    run(made, x).backward()
    want, x.grad = x.grad, None
    checkpoint(run, twin, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, want)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


def test_activations_that_are_recomputed_in_eval_are_routed_as_at_first():
    made = layer("decay=0.2").train()
    for _ in range(2):
        made(torch.randn(2, 30, 64), mask=causal())  # moves the centroids
    made.eval()
    x, weight = torch.randn(2, 30, 64, requires_grad=True), torch.randn(2, 30, 64)

    def run(x):
        return (made(x, mask=causal()).y * weight).sum()

    (want,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x)
    torch.testing.assert_close(got, want)


def test_micro_batches_are_one_step():
    x = layer_norm(torch.randn(4, 2, 10, 16))
    whole, cut = Centroids(2, 3, 16), Centroids(2, 3, 16, micro_batches=2)
    cut.mu.copy_(whole.mu)
    cut.total.copy_(whole.total)
    whole.learn([(x, None)])
    before = cut.mu.clone()
    cut.learn([(x[:2], None)])
    assert torch.equal(cut.mu, before)
    cut.learn([(x[2:], None)])
    torch.testing.assert_close(cut.mu, whole.mu)


def test_centroids_stay_in_fp32():
    made = layer().bfloat16()
    assert made.attention.centroids.mu.dtype == torch.float32
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    made.train()
    y, _, aux = made(torch.randn(2, 30, 64, dtype=torch.bfloat16), mask=causal())
    assert y.dtype == torch.bfloat16
    assert made.attention.centroids.total.dtype == torch.float32
    made.double()
    assert made.attention.centroids.mu.dtype == torch.float64


def test_the_papers_printed_update():
    made = Centroids(1, 2, 2, update="sum", decay=0.5)
    made.mu.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    q = torch.tensor([[2.0, 1.0], [3.0, 0.0]])[None, None]
    k = torch.tensor([[0.0, 4.0]])[None, None]
    made.learn([(q, None), (k, None)])
    want = torch.tensor([[0.5 + 0.25 * 5, 0.25 * 1], [0.0, 0.5 + 0.25 * 4]])
    torch.testing.assert_close(made.mu[0], want)


def test_spherical_centroids_are_of_unit_norm_and_empty_ones_stay():
    made = Centroids(1, 3, 2, update="spherical", decay=0.9)
    made.mu.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]))
    made.learn([(torch.tensor([[2.0, 1.0], [1.0, 2.1]])[None, None], None)])
    torch.testing.assert_close(made.mu.norm(dim=-1), torch.ones(1, 3))
    assert torch.equal(made.mu[0, 2], torch.tensor([-1.0, 0.0]))
    mean = torch.nn.functional.normalize(torch.tensor([2.0, 1.0]), dim=0)
    want = torch.nn.functional.normalize(0.9 * torch.tensor([1.0, 0.0]) + 0.1 * mean, dim=0)
    torch.testing.assert_close(made.mu[0, 0], want)


@pytest.mark.parametrize("update", ["ema", "spherical"])
def test_centroids_begin_from_the_first_batch(update):
    x = layer_norm(torch.randn(3, 1, 16) * 4 + 0.1 * torch.randn(3, 50, 16))
    made = Centroids(1, 3, 16, update=update, init="data")
    torch.manual_seed(3)
    made.begin([(x.reshape(1, 1, 150, 16), None)])
    means = torch.nn.functional.normalize(x.mean(1), dim=-1)
    likeness = torch.nn.functional.normalize(made.mu[0], dim=-1) @ means.T
    assert likeness.amax(0).min() > 0.99
    found = made.mu.clone()
    made.begin([(x.reshape(1, 1, 150, 16), None)])
    assert torch.equal(made.mu, found)
    if update == "ema":  # the state says the same as the centroids
        torch.testing.assert_close(made.total / made.number[..., None], made.mu)


def test_hashed_centroids_are_the_sign_hash():
    made = Centroids(2, 8, 16, init="hash", update="none")
    x = torch.randn(5, 2, 30, 16)
    near = made.scores(x).argmax(2)
    directions = made.mu[:, [1, 2, 4]] - made.mu[:, [0]]  # twice one direction each
    torch.testing.assert_close(
        directions @ directions.mT, 4 * torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=1e-5
    )
    signs = (x @ directions.mT > 0).long()
    assert torch.equal((signs * torch.tensor([1, 2, 4])).sum(-1), near)


def test_random_members_are_drawn_anew():
    made = layer("assignment='random', local=0").eval()
    assert made.attention.centroids is None
    x = torch.randn(1, 40, 64)
    assert not torch.equal(made(x, mask=causal()).y, made(x, mask=causal()).y)
    y, _, aux = made.train()(x, mask=causal())
    assert aux == {}


# -- memory and distances -------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [True, False])
def test_memories_are_keys_of_their_clusters(shared):
    fields = f"clusters=1, window=20, local=0, memory=2, eps=0.0, shared={shared}, own=True"
    made = make(f"routing-transformer({fields})").build(Heads(64, 2, 2, 16, 16))
    q, k, v = torch.randn(3, 1, 2, 20, 16).unbind(0)
    x, y = layer_norm(q), layer_norm(q if shared else k)
    keys, values = (torch.cat((table[None], x), 2) for table, x in zip(made.memory, (y, v)))
    want = attention(x, keys, values, causal(), backend="reference").out
    got = made(q, k, v, Context(mask=causal())).out
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert all(table.grad.abs().sum() > 0 for table in made.memory)


@pytest.mark.parametrize("form", ["sequence", "prefix"])
def test_distances_count_slots(form):
    spec = f"routing-transformer(clusters=3, window=6, local=0, relative=4, form='{form}')"
    made = make(spec).build(Heads(64, 1, 1, 16, 16)).eval()
    q, k, v = torch.randn(3, 1, 1, 24, 16).unbind(0)
    x = layer_norm(q)
    key, value = (table[0] for table in made.relative)
    scores = made.centroids.mu[0] @ x[0, 0].T
    want = torch.zeros(24, 16)
    for i in range(24):
        outs = []
        for c in range(3):
            upto = scores[c, : i + 1] if form == "prefix" else scores[c]
            inside = sorted(upto.topk(min(6, len(upto))).indices.tolist())
            if i not in inside:
                continue
            inside = [j for j in inside if j <= i]
            slots = {j: len(inside) - 1 - s for s, j in enumerate(inside)}
            keys = [j for j in inside if j != i] or [i]
            at = torch.tensor([min(3, slots[j]) for j in keys])
            logits = ((x[0, 0, keys] + key[at]) @ x[0, 0, i]) * 0.25
            outs.append(logits.softmax(0) @ (v[0, 0, keys] + value[at]))
        if outs:
            want[i] = sum(outs) / (len(outs) + 1e-5)
    got = made(q, k, v, Context(mask=causal())).out
    torch.testing.assert_close(got[0, 0], want, atol=1e-5, rtol=1e-4)
    got.sum().backward()
    assert all(table.grad.abs().sum() > 0 for table in made.relative)


def test_sinks_of_the_model():
    made = (
        make("routing-transformer(clusters=1, window=20, local=1, eps=0.0, own=True)")
        .build(Heads(64, 2, 2, 16, 16))
        .eval()
    )
    q, k, v = torch.randn(3, 1, 2, 20, 16).unbind(0)
    sinks = torch.tensor([0.3, 1.2])
    x = torch.cat((q[:, :1], layer_norm(q[:, 1:])), 1)
    y = torch.cat((k[:, :1], x[:, 1:]), 1)
    want = attention(x, y, v, causal(), sink_logits=sinks, backend="reference").out
    got = made(q, k, v, Context(mask=causal(), sink_logits=sinks)).out
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# -- what is skipped ------------------------------------------------------------------------------
def test_only_clusters_are_visited():
    made = make("routing-transformer(clusters=16, window=128, local=0)").build(
        Heads(64, 1, 1, 16, 16)
    )
    q, k, v = torch.randn(3, 1, 1, 2048, 16).unbind(0)
    _, layout = made.train().layouts(q, k, v, Context(mask=causal()))
    assert layout.pairs == 16 * (128 * 127 // 2 + 1)
    assert layout.tile_area <= 16 * 128 * 128


# -- models and ranks -----------------------------------------------------------------------------
def test_a_model_trains_and_generates():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    config = FoveateConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=64,
        attention="routing-transformer(clusters=4, window=4, block=4, skip_first=1)",
    )  # fmt: skip
    model = FoveateForCausalLM(config)
    ids = torch.randint(1, 64, (2, 24))  # 0 is taken for padding
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    wanted = ids
    for _ in range(4):
        logits = model(wanted, use_cache=False).logits[:, -1]
        wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), 1)
    got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(got, wanted)
    model.generate(ids, max_new_tokens=3, num_beams=3, pad_token_id=0)


def _rank(rank: int, file: str, x: torch.Tensor, start: dict, found) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    made = Centroids(1, 3, 16)
    made.load_state_dict(start)
    made.sum_over(dist.group.WORLD)
    made.learn([(x[rank : rank + 1], None)])
    found[rank].copy_(made.mu)
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_count_each_others_tokens(tmp_path):
    x = layer_norm(torch.randn(2, 1, 20, 16))
    alone = Centroids(1, 3, 16)
    start = {name: value.clone() for name, value in alone.state_dict().items()}
    alone.learn([(x, None)])
    found = torch.zeros(2, 1, 3, 16).share_memory_()
    torch.multiprocessing.start_processes(
        _rank, (str(tmp_path / "meet"), x, start, found), 2, start_method="fork"
    )
    torch.testing.assert_close(found[0], alone.mu)
    torch.testing.assert_close(found[1], alone.mu)


# -- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("form='future'", "form='future'.*unknown"),
        ("update='emma'", "ema"),
        ("local=3", "whole"),
        ("own=2", "True, False or None"),
        ("decay=1.0", "decay"),
        ("eps=-1.0", "eps"),
        ("relative=3, shared=False", "shared=True"),
        ("init='hash', clusters=6", "power of two"),
        ("window=None, form='prefix'", "give window="),
        ("micro_batches=2, update='none'", "micro_batches"),
    ],
)
def test_hyper_parameters_that_do_not_fit(more, match):
    fields = {"clusters": 4, "window": 6}
    text = ", ".join(f"{k}={v}" for k, v in fields.items() if f"{k}=" not in more)
    with pytest.raises(InputError, match=match):
        foveate.Attention(64, 4, "gqa(kv_heads=2)", f"routing-transformer({text}, {more})")


def test_calls_that_are_refused():
    made = layer().eval().attention
    q, k, v = torch.randn(3, 1, 4, 20, 16).unbind(0)
    with pytest.raises(InputError, match="neither"):
        made(q, k, v, Context(mask=causal() & window(3, 0)))
    with pytest.raises(InputError, match="new_cache"):
        made(q[:, :, -1:], k, v, Context(mask=causal()))
    with pytest.raises(InputError, match="built for"):
        made(q[:, :2], k[:, :2], v[:, :2], Context(mask=causal()))
    with pytest.raises(InputError, match="bias"):
        made(q, k, v, Context(mask=causal(), bias=torch.zeros(1, 1, 20, 20)))
    cache = layer().eval()
    with pytest.raises(InputError, match="causal"):
        cache(torch.randn(1, 3, 64), cache=cache.new_cache())
    open_ = foveate.Attention(64, 4, attention="routing-transformer(window=None)").eval()
    with pytest.raises(InputError, match="give window="):
        open_.new_cache()
    with pytest.raises(InputError, match="give window="):
        open_(torch.randn(1, 9, 64), mask=causal())
    open_.train()(torch.randn(1, 9, 64), mask=causal())
