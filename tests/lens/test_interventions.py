"""Interventions: on activations, on weights, along one path; oracles of the talking-heads spec."""

from __future__ import annotations

import pytest
import torch

from foveate.lens.attention_only import AttentionOnly
from foveate.lens.interventions import (
    END,
    Edit,
    Path,
    coefficients,
    edited,
    rescale_weights,
    rescaled,
    signed,
)
from foveate.lens.reading import Reading, places
from foveate.lens.watching import watched
from foveate.ops.errors import InputError

IDS = torch.arange(18).view(2, 9) * 5 % 23


def model(seed=0) -> AttentionOnly:
    torch.manual_seed(seed)
    made = AttentionOnly(23, 32, 4, 3, length=16).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.25)
    return made.eval()


def with_bias(made: AttentionOnly) -> AttentionOnly:
    for layer in made.layers:
        layer.projection.v.bias = torch.nn.Parameter(torch.randn(32).double())
    return made


def logits(made, *edits):
    with torch.no_grad(), edited(made, *edits):
        return made(IDS)


def by_hand(made, ablate=None, zero=None, path=None):
    """The whole model written out; components are subtracted per source, before mixing.

    ablate: (layer, head, u, s, v); zero: (layer, head); path: (layer, head, kind), which alone
    sees what is ablated.
    """
    x = made.embed(IDS) + made.positions(torch.arange(9))
    causal = torch.ones(9, 9).tril().bool()
    unseen = torch.zeros_like(x)  # what the path's end sees beside x
    for n, layer in enumerate(made.layers):
        p, y = layer.projection, torch.zeros_like(x)
        for h in range(4):
            rows = slice(8 * h, 8 * h + 8)
            ends = path if path is not None and path[:2] == (n, h) else None
            given = {kind: x + unseen if ends and ends[2] == kind else x for kind in "qkv"}
            q, k, v = (
                given[kind] @ m.weight[rows].T + (0 if m.bias is None else m.bias[rows])
                for kind, m in zip("qkv", (p.q, p.k, p.v))
            )
            a = (q @ k.mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
            sources = v @ p.out.weight[:, rows].T
            if zero == (n, h):
                sources = sources * 0
            if ablate is not None and ablate[:2] == (n, h):
                _, _, u, s, w = ablate
                taken = (x @ u)[..., None] * s * w
                if path is None:
                    sources = sources - taken
                else:
                    unseen = -a @ taken
            y = y + a @ sources
        x = x + y
    return made.unembed(x)


def component(made, layer, head, i):
    heads = Reading()(made)
    at, spectrum = heads.at(layer, head), heads.ov().svd()
    return spectrum.u[at, :, i], spectrum.s[at, i], spectrum.v[at, :, i]


@torch.no_grad()
def test_oracle_5_removal_by_weights_is_subtraction_from_ov():
    made, (u, s, v) = model(), component(model(), 1, 2, 3)
    before = Reading()(made)
    with rescaled(made, Edit(1, 2, v[:, None])):
        after = Reading()(made)
    want = before.ov().dense()
    want[before.at(1, 2)] -= s * torch.outer(u, v)
    torch.testing.assert_close(after.ov().dense(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.qk().dense(), before.qk().dense(), atol=0, rtol=0)


@torch.no_grad()
def test_oracle_5_activations_and_weights_remove_the_same_in_a_forward():
    made = model()
    u, s, v = component(made, 1, 2, 3)
    edit = Edit(1, 2, v[:, None])
    want = by_hand(made, ablate=(1, 2, u, s, v))
    assert (want - made(IDS)).abs().max() > 1e-2
    torch.testing.assert_close(logits(made, edit), want, atol=1e-9, rtol=0)
    with rescaled(made, edit):
        torch.testing.assert_close(made(IDS), want, atol=1e-9, rtol=0)
    single = model().float()
    torch.testing.assert_close(logits(single, edit), want.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(by_hand(made), made(IDS))


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_oracle_6_removing_all_components_is_zero_ablation(biased):
    made = with_bias(model()) if biased else model()
    heads = Reading()(made)
    v = heads.ov().svd().v[heads.at(0, 3)]
    edit = Edit(0, 3, v)
    want = by_hand(made, zero=(0, 3))
    assert (want - made(IDS)).abs().max() > 1e-2
    torch.testing.assert_close(logits(made, edit), want, atol=1e-9, rtol=0)
    with rescaled(made, edit):
        torch.testing.assert_close(made(IDS), want, atol=1e-9, rtol=0)


@torch.no_grad()
def test_oracle_7_a_factor_of_1_changes_nothing():
    made = model()
    *_, v = component(made, 1, 2, 3)
    kept = [p.clone() for p in made.parameters()]
    rescale_weights(made, Edit(1, 2, v[:, None], factor=1.0))
    assert all(torch.equal(a, b) for a, b in zip(kept, made.parameters()))
    torch.testing.assert_close(logits(made, Edit(1, 2, v[:, None], 1.0)), made(IDS), atol=0, rtol=0)
    with rescaled(made, Edit(1, 2, v[:, None], 5.0)):
        assert not torch.equal(made.layers[1].projection.out.weight, kept[0])
    assert all(torch.equal(a, b) for a, b in zip(kept, made.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("kind", "qkv")
def test_a_path_shows_the_change_to_one_head_alone(kind):
    made = model()
    u, s, v = component(made, 0, 1, 0)
    edit = Edit(0, 1, v[:, None])
    want = by_hand(made, ablate=(0, 1, u, s, v), path=(2, 3, kind))
    got = logits(made, Path(edit, 2, 3, kind))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    assert (got - made(IDS)).abs().max() > 1e-3
    with torch.no_grad(), watched(made) as watch, edited(made, Path(edit, 1, 2, "q")):
        made(IDS)
        changed = watch.weights(1)
    with watched(made) as watch:
        made(IDS)
        plain = watch.weights(1)
    assert [bool((changed[:, h] - plain[:, h]).abs().max() > 1e-4) for h in range(4)] == [
        False, False, True, False,
    ]  # fmt: skip


@torch.no_grad()
def test_paths_into_the_same_map_add_up():
    made = model()
    edits = [Edit(0, h, component(made, 0, h, 0)[2][:, None]) for h in (0, 1)]
    both = logits(made, *(Path(e, 2, 3, "q") for e in edits))
    place = places(made)[2]
    caught = {}
    hooks = [
        places(made)[0].out.module.register_forward_hook(
            lambda m, given, out: caught.update(d=sum(e.changes(given[0], places(made)[0])
                                                      for e in edits))),
        place.query.module.register_forward_hook(
            lambda m, given, out: torch.cat((out[..., :24], m.forward(given[0] + caught["d"])
                                             [..., 24:]), -1)),
    ]  # fmt: skip
    want = made(IDS)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(both, want, atol=1e-9, rtol=0)


def gpt2_by_hand(made, delta_of, kind):
    """GPT-2 written out; head 2.3 reads x + delta with one of its maps, through the norm."""
    body, causal = made.transformer, torch.ones(9, 9).tril().bool()
    x, delta = body.wte(IDS) + body.wpe(torch.arange(9)), None
    for n, block in enumerate(body.h):
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        maps = list((block.ln_1(x) @ weight + bias).split(32, -1))
        if n == 2 and kind:
            at = "qkv".index(kind)
            other = (block.ln_1(x + delta) @ weight + bias).split(32, -1)[at]
            maps[at] = torch.cat((maps[at][..., :24], other[..., 24:]), -1)
        q, k, v = (one.view(2, 9, 4, 8).transpose(1, 2) for one in maps)
        a = (q @ k.mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        z = (a @ v).transpose(1, 2).reshape(2, 9, 32)
        delta = delta_of(z[..., 8:16] @ block.attn.c_proj.weight[8:16]) if n == 0 else delta
        x = x + z @ block.attn.c_proj.weight + block.attn.c_proj.bias
        x = x + block.mlp(block.ln_2(x))
    return made.lm_head(body.ln_f(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", "qkv")
def test_a_path_goes_through_the_norm(kind):
    """With biases, LayerNorms, feed-forward layers, and one module for q, k and v."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=23, n_embd=32, n_layer=3, n_head=4, n_positions=16, initializer_range=0.3
    )
    made = transformers.GPT2LMHeadModel(config).double().eval()
    for name, p in made.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    heads = Reading()(made)
    v = heads.ov().svd().v[heads.at(0, 1)][:, :1]
    plain = made(IDS).logits
    torch.testing.assert_close(gpt2_by_hand(made, lambda y: y, None), plain)
    want = gpt2_by_hand(made, lambda y: -(y @ v) @ v.mT, kind)
    with edited(made, Path(Edit(0, 1, v), 2, 3, kind)):
        got = made(IDS).logits
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    assert (got - plain).abs().max() > 1e-3
    edit = Edit(1, 2, heads.ov().svd().v[heads.at(1, 2)][:, :2], factor=[0.0, 2.0])
    with edited(made, edit):
        got = made(IDS).logits
    with rescaled(made, edit):
        torch.testing.assert_close(made(IDS).logits, got, atol=1e-9, rtol=0)


@torch.no_grad()
def test_what_is_removed_in_bf16_is_gone():
    made = model().bfloat16()
    heads = Reading()(made)
    place, v = places(made)[1], heads.ov().svd().v[heads.at(1, 2)]
    z = torch.randn(2, 9, 32).bfloat16()
    wrote = z.float()[..., 16:24] @ place.out.weight_of(2).float()
    left = wrote + Edit(1, 2, v).changes(z, place).float()
    assert float(left.norm()) <= 1e-5 * float(wrote.norm())
    assert logits(made, Edit(1, 2, v)).dtype == torch.bfloat16


@torch.no_grad()
def test_layers_that_dont_know_their_number_are_watched_apart():
    import foveate

    layers = torch.nn.ModuleList(foveate.Attention(32, 4) for _ in range(2))
    x = torch.randn(1, 9, 32)
    with watched(layers) as watch:
        for layer in layers:
            layer(x, mask=foveate.causal())
    for number, layer in enumerate(layers):
        with watched(layer) as alone:
            layer(x, mask=foveate.causal())
        torch.testing.assert_close(watch.weights(number), alone.weights(0), atol=0, rtol=0)
    assert not torch.allclose(watch.weights(0), watch.weights(1), atol=1e-3)


@torch.no_grad()
def test_positions_and_steps():
    made = model()
    *_, v = component(made, 2, 0, 0)
    step = Edit(2, 0, v[:, None], factor=1.0, step=2.5, positions=[END])
    moved = logits(made, step) - made(IDS)
    assert moved[:, :-1].abs().max() == 0
    want = 2.5 * made.unembed.weight @ v
    torch.testing.assert_close(moved[:, -1], want.expand(2, -1), atol=1e-9, rtol=0)
    rows = Edit(2, 0, v[:, None], factor=0.0, positions=torch.tensor([[0, 3], [-1, 5]]))
    changed = (logits(made, rows) - made(IDS)).abs().amax(-1) > 1e-9
    assert changed.nonzero().tolist() == [[0, 0], [0, 3], [1, 5], [1, 8]]
    c = coefficients(made, 2, 0, v[:, None], lambda: made(IDS))
    assert c.shape == (2, 9, 1)
    everywhere = Edit(2, 0, v[:, None], factor=3.0)
    want = made(IDS) + 2 * c * (made.unembed.weight @ v)
    torch.testing.assert_close(logits(made, everywhere), want, atol=1e-9, rtol=0)
    turned = signed(-v[:, None] * torch.sign(c.mean()), c * -torch.sign(c.mean()))
    torch.testing.assert_close(turned, v[:, None] * torch.sign(c.mean()))


@torch.no_grad()
def test_several_components_have_factors_of_their_own():
    made = model()
    heads = Reading()(made)
    v = heads.ov().svd().v[heads.at(2, 1)][:, :2]
    both = logits(made, Edit(2, 1, v, factor=[0.0, 2.0])) - made(IDS)
    apart = sum(
        logits(made, Edit(2, 1, v[:, i : i + 1], factor=f)) - made(IDS)
        for i, f in enumerate((0.0, 2.0))
    )
    torch.testing.assert_close(both, apart, atol=1e-9, rtol=0)


@torch.no_grad()
def test_grouped_heads_of_a_llama_are_edited_one_by_one():
    """A head of transformers' Llama, zeroed by its components; a group's keys change together."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).double().eval()
    heads = Reading()(made)
    v = heads.ov().svd().v[heads.at(0, 2)]
    with edited(made, Edit(0, 2, v)):
        got = made(IDS).logits
    weight = made.model.layers[0].self_attn.o_proj.weight
    kept = weight[:, 16:24].clone()
    weight[:, 16:24] = 0
    want = made(IDS).logits
    weight[:, 16:24] = kept
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    seen = []
    for path in ((), (Path(Edit(0, 2, v), 1, 3, "k"),)):
        with watched(made) as watch, edited(made, *path):
            made(IDS)
            seen.append(watch.weights(1))
    changed = [bool((seen[0][:, h] - seen[1][:, h]).abs().max() > 1e-5) for h in range(4)]
    assert changed == [False, False, True, True]


def test_what_cant_be_edited_is_refused():
    made, v = model(), torch.eye(32).double()[:, :2]
    for edit, said in (
        (Edit(7, 0, v), r"no head 7\.0"),
        (Edit(0, 4, v), r"no head 0\.4"),
        (Edit(0, 0, torch.eye(31).double()), "31 wide"),
        (Edit(0, 0, v, positions=[9]), "9 to 9 in a sequence of 9"),
        (Edit(0, 0, v, positions=torch.zeros(3, 1, dtype=torch.int64)), r"\(2, n\)"),
    ):
        with pytest.raises(InputError, match=said):
            logits(made, edit)
    with pytest.raises(InputError, match="orthonormal"):
        Edit(0, 0, 2 * v)
    with pytest.raises(InputError, match="3 numbers for 2"):
        Edit(0, 0, v, factor=[1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="doesn't stand behind"):
        Path(Edit(1, 0, v), 1, 0)
    with pytest.raises(InputError, match="kind='z'"):
        Path(Edit(0, 0, v), 1, 0, "z")
    with pytest.raises(InputError, match="path can't be written"):
        rescale_weights(made, Path(Edit(0, 0, v), 1, 0))
    with pytest.raises(InputError, match="factors only"):
        rescale_weights(made, Edit(0, 0, v, step=1.0))
    import foveate

    made.layers[0] = foveate.Attention(32, 4, attention="sink-window", position="none").double()
    with pytest.raises(InputError, match="watched of dense"), watched(made):
        pass
