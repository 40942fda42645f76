"""Hierarchical attention in transformers' encoders, on trees made from input ids."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import tiny  # noqa: E402

import foveate  # noqa: E402
from foveate.hf import (  # noqa: E402
    ModelError,
    SentenceTree,
    late_alternating,
    use_on_tree,
)
from foveate.methods.hsa.definition import written  # noqa: E402
from foveate.parts.tree import Tree  # noqa: E402

CLS, SEP, STOP = 1, 2, 3
IDS = torch.tensor(
    [
        [CLS, 11, 12, 13, STOP, 14, STOP, 15, 16, 17, STOP, STOP, 18, 19, SEP],
        [CLS, 21, 22, STOP, 23, 24, 25, STOP, SEP, 0, 0, 0, 0, 0, 0],
    ]
)
REAL = IDS != 0
# "14 ." is too short to stand alone, and ". ." ends one sentence.
TREES = [
    [0, [1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [12, 13], 14],
    [0, [1, 2, 3, 4, 5, 6, 7], 8],
]


def lists(tree: Tree, node: int):
    kids = (tree.parent == node).nonzero()[:, 0].tolist()
    return [lists(tree, c) for c in kids] if kids else int(tree.token[node]) % tree.length


def test_sentences_are_read_off_the_ids():
    forest = SentenceTree(ends=(STOP,), special=(CLS, SEP, 0))(IDS, REAL)
    assert [lists(forest, 0), lists(forest, 1)] == TREES
    cut = SentenceTree(ends=(STOP,), special=(CLS, SEP, 0), most=5)(IDS, REAL)
    assert lists(cut, 0)[2:4] == [[5, 6, 7, 8, 9], [10, 11, 12, 13]]


def test_unknown_and_masked_words_belong_to_their_sentence():
    class Tokenizer:
        unk_token_id, mask_token_id = 5, 6
        all_special_ids = (CLS, SEP, 0, 5, 6)

        def convert_tokens_to_ids(self, mark):
            return STOP if mark == "." else self.unk_token_id

    made = SentenceTree.of(Tokenizer())
    assert (made.ends, made.special) == ((STOP,), (CLS, SEP, 0))
    ids = torch.tensor([[CLS, 11, 5, 12, STOP, 13, 6, 14, 15, SEP]])
    assert lists(made(ids, ids != 0), 0) == [0, [1, 2, 3, 4], [5, 6, 7, 8], 9]


@pytest.mark.parametrize(
    ("layers", "chosen"), [(12, (7, 9, 11)), (6, (3, 5)), (24, (13, 15, 17, 19, 21, 23)), (1, (0,))]
)
def test_late_layers_alternate_as_in_the_paper(layers, chosen):
    assert late_alternating(layers) == chosen


@torch.no_grad()
def test_the_chosen_layer_runs_the_hierarchical_matrix_and_all_is_undone():
    model = tiny("bert")
    before = model(IDS, REAL.long()).last_hidden_state
    layers = model.encoder.layer
    with use_on_tree(model, SentenceTree((STOP,), (CLS, SEP, 0)), layers=(1,)):
        inside = model(IDS, REAL.long(), output_hidden_states=True)
        other = model(IDS[:, :9], REAL[:, :9].long()).last_hidden_state  # a tree of its own
    after = model(IDS, REAL.long()).last_hidden_state
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    assert other.shape[1] == 9
    # By hand, in the last layer: theta of each head from its own scores, on each entry's tree.
    x, attention = inside.hidden_states[1], layers[1].attention
    own = attention.self
    heads = own.num_attention_heads
    split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = split(own.query(x)), split(own.key(x)), split(own.value(x))
    out = torch.zeros_like(q)
    for b, tree in enumerate(TREES):
        n = int(REAL[b].sum())
        for h in range(heads):
            s = (q[b, h, :n] @ k[b, h, :n].T * q.shape[3] ** -0.5).double()
            out[b, h, :n] = (written(s, tree).theta @ v[b, h, :n].double()).float()
    y = attention.output(out.transpose(1, 2).flatten(2), x)
    y = layers[1].output(layers[1].intermediate(y), y)
    for b in range(2):
        n = int(REAL[b].sum())
        torch.testing.assert_close(inside.last_hidden_state[b, :n], y[b, :n], atol=2e-5, rtol=2e-5)
        assert float((y[b, :n] - before[b, :n]).abs().max()) > 1e-3


@torch.no_grad()
def test_a_tree_of_all_inputs_and_the_default_windows():
    model, ids = tiny("bert"), torch.randint(4, 90, (2, 20))
    with use_on_tree(model, Tree.windows(20, 4, first=1), layers=(1,)):
        one = model(ids).last_hidden_state
    with foveate.use(model, foveate.hf.Assignment({1: "hsa(branch=4, first=1)"})):
        two = model(ids).last_hidden_state
    torch.testing.assert_close(one, two)


@torch.no_grad()
def test_patches_of_an_image_are_a_tree():
    """Blocks of 2 x 2 patches behind the class token, as the library cuts them and by hand."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    made = ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=4, qkv_bias=False)
    model, images = ViTModel(made, add_pooling_layer=False).eval(), torch.randn(2, 3, 32, 32)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.normal_(0.0, 0.3)
    before = model(images).last_hidden_state

    def on(tree):
        with use_on_tree(model, tree):
            return model(images).last_hidden_state

    block = [[[1 + 8 * (2 * r + i) + 2 * c + j for i in (0, 1) for j in (0, 1)] for c in range(4)]
             for r in range(4)]  # fmt: skip
    blocks = Tree.nested([0, *[one for row in block for one in row]])
    ours = on(Tree.patches((8, 8), (2,), first=1))
    torch.testing.assert_close(ours, on(blocks), atol=1e-4, rtol=1e-4)
    assert float((ours - before).abs().max()) > 1e-3
    lines = on(Tree.nested([0, *[[*range(1 + i, 5 + i)] for i in range(0, 64, 4)]]))
    assert float((ours - lines).abs().max()) > 1e-3
    flat = on(Tree.nested(list(range(65))))
    torch.testing.assert_close(flat, before, atol=1e-4, rtol=1e-4)  # softmax


def test_inputs_that_no_tree_can_be_made_of_are_refused():
    model = tiny("bert")
    with use_on_tree(model, SentenceTree((STOP,))), pytest.raises(ModelError, match="input ids"):
        model(inputs_embeds=torch.randn(1, 5, 32))
    with pytest.raises(ModelError, match="stacks"):
        use_on_tree(tiny("whisper"), SentenceTree((STOP,)))
    with pytest.raises(foveate.hf.AssignmentError):
        use_on_tree(model, SentenceTree((STOP,)), layers=(7,))


def test_gradients_pass():
    model = tiny("bert").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    with use_on_tree(model, SentenceTree((STOP,), (CLS, SEP, 0))):
        model(IDS, REAL.long()).last_hidden_state[REAL].square().sum().backward()
    grad = model.encoder.layer[1].attention.self.query.weight.grad
    assert grad is not None
    assert grad.isfinite().all()
    assert grad.any()
