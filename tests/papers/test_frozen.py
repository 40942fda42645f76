"""The frozen encoder of sentence pairs: its features by hand, and that only the head is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from foveate.ops.errors import InputError
from foveate.papers.training.frozen import OnFrozen, RandomEncoder


def test_features_by_hand():
    torch.manual_seed(0)
    encoder = RandomEncoder(9, dim=8, length=6, heads=2, sharpness=0.7, place=0.25).double()
    ids = torch.tensor([[5, 3, 1, 5, 7]])
    e = encoder
    x = torch.stack([
        e.tokens.weight[token]
        + 0.25 * (e.positions.weight[at] + e.segments.weight[0 if at < 2 else 1])
        for at, token in enumerate(ids[0].tolist())
    ])  # fmt: skip
    h = functional.layer_norm(x, (8,))
    seen = torch.zeros_like(h)
    for head in (0, 1):
        mine = slice(4 * head, 4 * head + 4)
        q = h @ e.query[0].weight[mine].T
        for t in range(5):
            weights = [math.exp(0.7 * float(q[t] @ q[s]) / 2) for s in range(5)]
            for s in range(5):
                seen[t, mine] += weights[s] / sum(weights) * h[s, mine]
    x = x + e.value[0](seen)
    x = x + e.down[0](functional.gelu(e.up[0](functional.layer_norm(x, (8,)))))
    torch.testing.assert_close(encoder(ids)[0], functional.layer_norm(x, (8,)))


def test_equal_tokens_are_told_in_both_segments():
    """A token's features depend on whether the other segment has it, wherever it stands there."""
    torch.manual_seed(0)
    encoder = RandomEncoder(9, dim=32, sharpness=0.5)
    twin, other = encoder(torch.tensor([[5, 3, 1, 5], [5, 3, 1, 7]]))[:, 0]
    assert (twin - other).norm() > 0.05 * twin.norm()


def test_only_the_head_is_trained():
    pytest.importorskip("transformers")
    from foveate.papers.grassmann import AS_THE_PAPER, HEADS
    from foveate.papers.training.classify import encoder_classifier
    from foveate.papers.training.language import Sizes

    torch.manual_seed(0)
    head = encoder_classifier(
        Sizes(1, 16, 4, vocab=9), 3, mixer=HEADS["pairs: no mixing"],
        max_position_embeddings=16, **AS_THE_PAPER,
    ).model  # fmt: skip
    model = OnFrozen(RandomEncoder(9, dim=32), head)
    logits = model(torch.tensor([[5, 3, 1, 5, 7], [2, 3, 1, 4, 6]])).logits
    assert logits.shape == (2, 1, 3)
    logits.square().sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "reduced.weight" in learnt
    assert any(name.startswith("head.") for name in learnt)
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in learnt), name
        assert not (name.startswith("frozen") and p.requires_grad)
        assert "embed_positions" not in name or not p.any()
    with pytest.raises(InputError, match="3 heads don't divide"):
        RandomEncoder(9, dim=32, heads=3)
