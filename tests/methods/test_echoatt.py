"""EchoAtt: the oracles of its spec, and what a layer that copies owes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

import foveate
from foveate import Context, causal, padding
from foveate.methods import make
from foveate.methods.echoatt import EchoAtt, leader_map
from foveate.methods.echoatt.choice import (
    PAPER_LISTS,
    in_blocks,
    most_alike,
    scores,
    similarity,
    unchanged,
)
from foveate.methods.echoatt.counts import Saved, cache_share, map_bytes
from foveate.ops.errors import InputError

pytest.importorskip("transformers")

from foveate.models import FoveateConfig, FoveateForCausalLM, echo_student  # noqa: E402
from foveate.models.echo import (  # noqa: E402
    EchoWeights,
    Stages,
    adjust,
    block_ends,
    distillation,
    followers_of,
    next_tokens,
)

MODES = ["store", "recompute", "stats"]


def model(layers=5, seed=0, **options) -> FoveateForCausalLM:
    torch.manual_seed(seed)
    given = {
        "vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.3,
        "projection": "gqa(kv_heads=2)", "num_hidden_layers": layers, "intermediate_size": 48,
    }  # fmt: skip
    return FoveateForCausalLM(FoveateConfig(**(given | options))).eval()


def ids(length=41, batch=2, seed=1):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def maps(q, k, allowed):
    """softmax(q k^T / sqrt(d)) by definition, key heads repeated."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    return s.masked_fill(~allowed, -torch.inf).softmax(-1)


def qkv(length=150, dtype=torch.float64, batch=2):
    torch.manual_seed(3)
    q = torch.randn(batch, 4, length, 16, dtype=dtype)
    k = torch.randn(batch, 2, length, 16, dtype=dtype)
    values = torch.randn(3, batch, 2, length, 12, dtype=dtype)
    return q, k, values


def block_of_three(method, q, k, values, ctx=None, **more):
    """A leader and two followers, as the layers of one forward."""
    given = {"mask": causal()} | more
    store = {}
    none = k[..., :0]
    out = []
    for layer in range(3):
        at = Context(layer=layer, store=store, **given)
        queries = q if layer == 0 else q[..., :0]
        out.append(method(queries, k if layer == 0 else none, values[layer], at))
    return out


# -- oracles of the spec --------------------------------------------------------------------------
def test_oracle_1_without_followers_student_is_teacher():
    teacher = model()
    student = echo_student(teacher, ())
    assert torch.equal(student(ids()).logits, teacher(ids()).logits)
    assert student is not teacher
    assert student.config.attention == "echoatt(followers=())"


@torch.no_grad()
def test_oracle_2_maps_that_coincide_by_construction_cost_nothing():
    teacher = model(5).double()
    inside, leaders = 20, {2: 1, 3: 1}
    for block in teacher.model.blocks[1:4]:
        first = teacher.model.blocks[1].attention.projection
        projection = block.attention.projection
        projection.q.weight.copy_(first.q.weight)
        projection.k.weight.copy_(first.k.weight)
        projection.q.weight[:, inside:] = 0  # reads only P, the first dimensions
        projection.k.weight[:, inside:] = 0
        projection.out.weight[:inside] = 0  # writes only outside P
        block.feedforward.down.weight[:inside] = 0
    student = echo_student(teacher, (2, 3)).double()
    for block in (*teacher.model.blocks, *student.model.blocks):
        block.attention_norm = block.feedforward_norm = nn.Identity()
    assert followers_of(student) == leaders
    want = teacher(ids()).logits
    torch.testing.assert_close(student(ids()).logits, want, atol=1e-6, rtol=0)
    assert want.std() > 0.1
    teacher.model.blocks[3].attention.projection.q.weight.mul_(-1.0)
    assert (student(ids()).logits - teacher(ids()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_oracle_3_modes_agree_with_the_definition(mode):
    q, k, values = (x.float().requires_grad_() for x in qkv())
    method = EchoAtt(followers=(1, 2), mode=mode)
    found = torch.stack([x.out for x in block_of_three(method, q, k, values)])
    exact = [x.detach().double().requires_grad_() for x in (q, k, values)]
    allowed = torch.ones(150, 150, dtype=torch.bool).tril()
    a = maps(exact[0], exact[1], allowed)
    want = torch.stack([a @ v.repeat_interleave(2, 1) for v in exact[2]])
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)
    weight = torch.randn_like(want)
    ours = torch.autograd.grad((found * weight.float()).sum(), (q, k, values))
    theirs = torch.autograd.grad((want * weight).sum(), exact)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one.double(), two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_oracle_4_copied_rows_are_distributions_and_causal(mode):
    q, k, values = qkv()
    method = EchoAtt(followers=(1, 2), mode=mode)
    ones = torch.ones_like(values)
    for part in block_of_three(method, q, k, ones):
        torch.testing.assert_close(part.out, torch.ones_like(part.out))
    unit = torch.zeros_like(values)
    unit[:, :, :, 90] = 1  # the column of key 90 in the map
    for part in block_of_three(method, q, k, unit):
        assert part.out.min() >= 0
        assert not part.out[:, :, :90].any()
        assert part.out[:, :, 90:].gt(0).all()


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_oracle_4_later_tokens_change_nothing_before(mode):
    student = echo_student(model(), (2, 3), mode)
    changed = ids().clone()
    changed[:, 30] = (changed[:, 30] + 1) % 61
    before, after = student(ids()).logits, student(changed).logits
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_oracle_5_decoding_with_split_caches(mode):
    student = echo_student(model(), (1, 3, 4), mode)
    tokens = ids()
    want = student(tokens, use_cache=False).logits
    cache, found = student.new_cache(), []
    with torch.no_grad():
        for part in tokens.split((30, 1, 1, 5, 1, 3), 1):
            found.append(student(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-5, rtol=1e-5)
    for layer, held in enumerate(cache.layers):
        names = [field.name for field in held.held.fields]
        assert names == (["v"] if layer in (1, 3, 4) else ["k", "v"])
    full = model().new_cache()
    assert Fraction(cache.elements_per_token, full.elements_per_token) == cache_share(3, 5)


def test_oracle_6_counts_of_tinyllama():
    saved = Saved(dim=2048, heads=32, kv_heads=4, head_dim=64)
    assert saved.parameters == 4_718_592
    assert saved.projection_flops(10) == 2 * 10 * 4_718_592
    assert saved.score_flops(100 * 100) == 2 * 100 * 100 * 32 * 64
    assert map_bytes(32, 2048, 2) == 268_435_456
    config = {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 22,
        "num_attention_heads": 32, "intermediate_size": 5632, "projection": "gqa(kv_heads=4)",
    }  # fmt: skip
    with torch.device("meta"):
        teacher = FoveateForCausalLM(FoveateConfig(**config))
    whole = sum(p.numel() for p in teacher.parameters())
    assert whole == 1_100_048_384
    for name, count, percent in (("23%", 5, 2.14), ("41%", 9, 3.86), ("77%", 17, 7.29)):
        followers = PAPER_LISTS[f"tinyllama-1.1b {name}"]
        assert len(followers) == count
        kept = {
            "projection": [
                "echoatt-values(kv_heads=4)" if n in followers else "gqa(kv_heads=4)"
                for n in range(22)
            ],
            "attention": f"echoatt(followers={followers})",
        }
        with torch.device("meta"):
            student = FoveateForCausalLM(FoveateConfig(**(config | kept)))
        lost = whole - sum(p.numel() for p in student.parameters())
        assert lost == count * saved.parameters
        assert round(100 * lost / whole, 2) == percent
        per_token = student.new_cache().elements_per_token
        assert Fraction(per_token, teacher.new_cache().elements_per_token) == cache_share(count, 22)
        assert teacher.new_cache().elements_per_token - per_token == count * saved.cache


def test_oracle_7_similarity_of_maps():
    allowed = torch.ones(32, 32, dtype=torch.bool).tril()
    torch.manual_seed(0)
    q, k = torch.randn(4, 3, 32, 8), torch.randn(4, 3, 32, 8)
    sim = similarity(maps(q, k, allowed))
    assert torch.equal(sim, sim.mT)
    assert torch.equal(sim.diagonal(), torch.ones(4))
    assert sim.min() >= 0
    assert sim.max() <= 1
    by_hand = maps(q, k, allowed).flatten(1)
    want = torch.nn.functional.cosine_similarity(by_hand[0], by_hand[3], dim=0)
    torch.testing.assert_close(sim[0, 3], want)
    uniform = maps(q * 0, k, allowed)
    torch.testing.assert_close(similarity(uniform), torch.ones(4, 4))
    same = maps(q[:1], k[:1], allowed).expand(3, -1, -1, -1)
    torch.testing.assert_close(similarity(same), torch.ones(3, 3))
    # Maps that share nothing but a first column that takes nearly all are alike only with it.
    sunk = maps(q, k + 0, allowed) * 0.02
    sunk[..., 0] += 0.98
    assert similarity(sunk)[0, 1] > 0.99
    assert similarity(sunk, skip=1)[0, 1] < 0.9


def test_oracle_8_the_sheets_choice_of_layers():
    s = torch.tensor([0.2, 0.3, 0.8, 0.85, 0.9, 0.82, 0.35])
    kept = unchanged(s)
    assert kept == (0, 1, 6)
    followers = in_blocks(kept, 7, 2)
    assert leader_map(followers) == {3: 2, 5: 4}


def test_oracle_9_losses_where_student_is_teacher():
    teacher = model()
    student = echo_student(teacher, ())
    total, parts = distillation(student, teacher, ids(), ends=[1, 3])
    assert parts["hidden"].item() == 0
    assert abs(parts["soft"].item()) < 1e-6
    logits = teacher(ids()).logits.flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, logits.argmax(-1))
    torch.testing.assert_close(parts["hard"], want)
    assert want > 0.1
    torch.testing.assert_close(total, 0.5 * want)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_oracle_9_gradients_by_finite_differences(kl):
    teacher = model(4, norm="layer", feedforward="gelu").double()
    student = echo_student(teacher, (2,))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    weights = EchoWeights(0.3, 0.4, 0.3)

    def loss():
        return distillation(student, teacher, ids(12), weights=weights, kl=kl)[0].double()

    loss().backward()
    blocks = student.model.blocks
    for p in (
        blocks[1].attention.projection.q.weight,  # the leader's, through both layers' outputs
        blocks[2].attention.projection.v.weight,
        blocks[3].feedforward.down.weight,
    ):
        direction = torch.randn(
            p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        )
        direction /= direction.norm()
        got = float((p.grad * direction).sum())
        step, ends = 1e-2, []
        with torch.no_grad():
            for sign in (1, -1):
                p.add_(sign * step * direction)
                ends.append(float(loss()))
                p.sub_(sign * step * direction)
        want = (ends[0] - ends[1]) / (2 * step)
        assert abs(got - want) < 2e-3 * max(1.0, abs(want)), (got, want)
        assert abs(want) > 1e-3


# -- choosing --------------------------------------------------------------------------------------
def test_followers_copy_from_the_nearest_earlier_layer_that_is_not_listed():
    assert leader_map((4, 6, 8, 10)) == {4: 3, 6: 5, 8: 7, 10: 9}
    assert leader_map(PAPER_LISTS["tinyllama-1.1b 23%"]) == {2: 1, 3: 1, 4: 1, 5: 1, 7: 6}
    assert leader_map(((5, 1), (3, 2))) == {5: 1, 3: 2}
    assert block_ends({2: 1, 3: 1, 5: 4}) == [3, 5]


@pytest.mark.parametrize(
    ("followers", "said"),
    [
        ((0, 2), "layer 0 can't follow"),
        ((2, 2), "twice"),
        (((3, 2), (2, 1)), "computes a map"),
        (((2, 3),), "computes a map"),
        ((-1,), "indices"),
    ],
)
def test_layers_that_cannot_follow_are_refused(followers, said):
    with pytest.raises(InputError, match=said):
        EchoAtt(followers=followers)


def test_the_most_alike_layers_follow():
    sim = torch.eye(6)
    for i, j, x in ((1, 2, 0.95), (3, 4, 0.9), (4, 5, 0.2), (2, 3, 0.3), (0, 1, 0.1)):
        sim[i, j] = sim[j, i] = x
    assert most_alike(sim, 2) == (2, 4)
    assert most_alike(sim, 2, least=True) == (1, 2)  # both would copy layer 0: 0.1 and 0
    assert 2 not in most_alike(sim, 1, (0, 2))
    assert scores(sim)[1] == pytest.approx((0.95 + 0.1) / 5)
    with pytest.raises(InputError, match="may follow"):
        most_alike(sim, 6)


# -- in models -------------------------------------------------------------------------------------
def test_student_by_hand():
    """One layer's copy written out: the follower's own values, its leader's map."""
    teacher = model(3)
    student = echo_student(teacher, (1,))
    got = student(ids(), output_hidden_states=True).hidden_states
    blocks = teacher.model.blocks
    x1 = got[1]
    first, second = blocks[0], blocks[1]
    told = []

    class Told(type(foveate.methods.make("full"))):
        def __call__(self, q, k, v, ctx=None):
            told.append((q, k))
            return super().__call__(q, k, v, ctx)

    first.attention.attention = Told()
    teacher(ids())
    a = maps(*told[0], torch.ones(41, 41, dtype=torch.bool).tril())
    v = second.attention.projection.entries(second.attention_norm(x1))["v"]
    y = second.attention.projection.output(a @ v.repeat_interleave(2, 1), x1)
    x = x1 + y
    want = x + second.feedforward(second.feedforward_norm(x))
    torch.testing.assert_close(got[2], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_padding_changes_nothing(side, mode):
    student = echo_student(model(), (2, 4), mode)
    tokens = ids(20, 1)
    mask = torch.ones(1, 27, dtype=torch.long)
    cut = slice(7, None) if side == "left" else slice(0, 20)
    padded = torch.zeros(1, 27, dtype=torch.long)
    padded[:, cut] = tokens
    mask[:, :7] = 0 if side == "left" else 1
    if side == "right":
        mask[:, 20:] = 0
    both = torch.cat((padded, ids(27, 1, 9)))
    mask = torch.cat((mask, torch.ones(1, 27, dtype=torch.long)))
    got = student(both, attention_mask=mask).logits[:1, cut]
    torch.testing.assert_close(got, student(tokens).logits, atol=1e-5, rtol=1e-5)
    assert got.isfinite().all()


def test_generation_beams_saving_and_loading(tmp_path):
    student = echo_student(model(), (2, 3))
    tokens = ids(9)
    with torch.no_grad():
        wanted = tokens
        for _ in range(4):
            logits = student(wanted, use_cache=False).logits[:, -1]
            wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), 1)
    got = student.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(got, wanted)
    student.generate(tokens, max_new_tokens=3, num_beams=3, pad_token_id=0)
    student.save_pretrained(tmp_path)
    again = FoveateForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, student(tokens).logits)
    assert followers_of(again) == {2: 1, 3: 1}
    names = dict(again.named_parameters())
    assert "model.layers.2.attention.projection.v.weight" in names
    assert "model.layers.2.attention.projection.q.weight" not in names


def test_low_precision():
    student = echo_student(model(), (2, 3))
    want = student(ids()).logits
    half = student.to(torch.bfloat16)
    got = half(ids()).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() < 0.05 * want.abs().mean() + 0.05


def test_gradient_checkpointing_keeps_the_leaders_gradients():
    student = echo_student(model(), (2, 3)).train()
    next_tokens(student, ids()).backward()
    plain = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    next_tokens(student, ids()).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.model.embed_tokens.register_forward_hook(lambda m, a, y: y.requires_grad_())
    with pytest.raises(InputError, match="use_reentrant=False"):
        next_tokens(student, ids()).backward()


def test_dropped_weights_are_dropped_once():
    q, k, values = qkv()
    torch.manual_seed(0)
    same = values[:1].expand(3, -1, -1, -1, -1)
    out = block_of_three(EchoAtt(followers=(1, 2)), q, k, same, dropout=0.4, phase="train")
    assert torch.equal(out[0].out, out[1].out)
    plain = block_of_three(EchoAtt(followers=(1, 2)), q, k, same)
    assert not torch.allclose(out[0].out, plain[0].out)
    with pytest.raises(InputError, match="dropped once"):
        block_of_three(EchoAtt(followers=(1, 2), mode="stats"), q, k, same, dropout=0.4)


@pytest.mark.parametrize(
    "inner",
    ["sink-window(sinks=2, window=9)", "vertical-slash(verticals=8, slashes=20, forced_slashes=8)"],
)
def test_a_sparse_leaders_choice_is_copied(inner):
    q, k, values = qkv()
    out = block_of_three(EchoAtt(followers=(1, 2), inner=inner), q, k, values)
    for part, v in zip(out, values):
        want = make(inner)(q, k, v, Context(mask=causal()))
        torch.testing.assert_close(part.out, want.out)


def test_softcap_bias_sinks_and_padding_in_all_modes():
    q, k, values = qkv(70)
    more = {
        "softcap": 2.0, "bias": torch.randn(1, 4, 70, 70, dtype=torch.float64),
        "sink_logits": torch.randn(4, dtype=torch.float64), "scale": 0.3,
        "mask": causal() & padding([70, 50]), "backend": "reference",
    }  # fmt: skip
    found = [block_of_three(EchoAtt(followers=(1, 2), mode=m), q, k, values, **more) for m in MODES]
    for layer in range(3):
        for other in (1, 2):
            torch.testing.assert_close(found[0][layer].out, found[other][layer].out)
            torch.testing.assert_close(found[0][layer].lse, found[other][layer].lse)


def test_a_shared_layer_splits_over_ranks():
    torch.manual_seed(0)
    made = foveate.Attention(
        32, 4, "echoatt-values(kv_heads=2)", "echoatt(followers=(1,))", layer=1
    )
    p = made.projection
    x, a = torch.randn(2, 7, 32), torch.rand(2, 4, 7, 7)
    whole = p.output(a @ p.entries(x)["v"].repeat_interleave(2, 1), x)
    parts = []
    for rank in range(2):
        part = p.shard(rank, 2)
        mine = a[:, 2 * rank : 2 * rank + 2]
        parts.append(part.output(mine @ part.entries(x)["v"].repeat_interleave(2, 1), x))
    torch.testing.assert_close(sum(parts), whole)


def test_refusals():
    q, k, values = qkv(20)
    with pytest.raises(InputError, match="foveate fit"):
        EchoAtt()(q, k, values[0], Context(mask=causal()))
    with pytest.raises(InputError, match="hasn't run in this forward"):
        EchoAtt(followers=(1,))(q, k, values[0], Context(mask=causal(), layer=1))
    with pytest.raises(InputError, match="no queries and keys"):
        EchoAtt(followers=(1,))(q[..., :0], k[..., :0], values[0], Context(mask=causal(), layer=2))
    with pytest.raises(InputError, match="has values only"):
        foveate.Attention(32, 4, "echoatt-values")(torch.randn(1, 3, 32))
    for inner in ("dma", "h2o", "flowformer"):
        with pytest.raises(InputError, match="inner"):
            EchoAtt(followers=(1,), inner=inner)
    with pytest.raises(InputError, match="recompute"):
        EchoAtt(followers=(1,), inner="sink-window", mode="stats")
    with pytest.raises(InputError, match="echo_student"):
        echo_student(model(), (7,))
    with pytest.raises(InputError, match="share maps already"):
        echo_student(echo_student(model(), (2,)), (3,))


def test_stages_lower_the_losses_and_go_on_after_a_kill():
    teacher = model(4, hidden_size=32)
    stages = Stages(first=8, second=3, lr=3e-3)
    batches = [ids(24, 4, seed) for seed in range(11)]

    class Kept:
        held = None

        def load(self):
            return self.held

        def save(self, facts, tensors):
            self.held = (facts, {n: t.clone() for n, t in tensors.items()})

    whole = echo_student(teacher, (1, 2))
    before = float(distillation(whole, teacher, batches[10])[0].detach())
    history = adjust(whole, teacher, batches.__getitem__, stages)
    assert len(history) == 11
    assert float(distillation(whole, teacher, batches[10])[0].detach()) < before
    assert set(history[0]) >= {"hidden", "soft", "hard"}
    assert "hidden" not in history[8]

    kept, cut = Kept(), echo_student(teacher, (1, 2))

    class Killed(Exception):
        pass

    def stop(number):
        if number == 6:
            raise Killed
        return batches[number]

    with pytest.raises(Killed):
        adjust(cut, teacher, stop, stages, state=kept, every=2)
    again = echo_student(teacher, (1, 2))
    adjust(again, teacher, batches.__getitem__, stages, state=kept, every=2)
    for one, two in zip(again.parameters(), whole.parameters()):
        assert torch.equal(one, two)


def test_a_padded_batch_generates_what_each_row_does_alone():
    student = echo_student(model(), (2, 3))
    rows = [ids(n, 1, n) for n in (14, 5)]
    both = torch.cat([nn.functional.pad(r, (14 - r.shape[1], 0)) for r in rows])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        got = student.generate(both, attention_mask=(both > 0).long(), num_beams=beams, **options)
        for b, row in enumerate(rows):
            want = student.generate(row, num_beams=beams, **options)[0]
            assert torch.equal(got[b, 14 - row.shape[1] :], want)


def test_a_forward_leaves_no_cycle():
    import gc
    import weakref

    q, k, values = qkv(20)
    gc.collect()
    gc.disable()
    try:
        q = q.clone()
        seen = weakref.ref(q)
        block_of_three(EchoAtt(followers=(1, 2)), q, k, values)
        del q
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_of_both_stages_ignore_padding(side):
    teacher = model()
    student = echo_student(teacher, (2, 3))
    tokens = ids(20, 1)
    pad = (6, 0) if side == "left" else (0, 6)
    both, mask = nn.functional.pad(tokens, pad), nn.functional.pad(torch.ones_like(tokens), pad)
    torch.testing.assert_close(next_tokens(student, both, mask), next_tokens(student, tokens))
    got, want = distillation(student, teacher, both, mask)[0], distillation(
        student, teacher, tokens
    )[0]  # fmt: skip
    torch.testing.assert_close(got, want)


def test_the_last_block_is_compared_before_the_last_norm():
    teacher = model(4)
    student = echo_student(teacher, (1, 3))
    got = distillation(student, teacher, ids())[1]["hidden"]
    made: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}
    for name, who in (("ours", student), ("theirs", teacher)):
        for end in (1, 3):
            who.model.blocks[end].register_forward_hook(
                lambda block, given, out, at=made[name]: at.append(out.y)
            )
        who(ids())
    pairs = zip(made["ours"], made["theirs"], strict=True)
    want = torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
    torch.testing.assert_close(got, want)
