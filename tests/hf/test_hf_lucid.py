"""LUCID in a transformers model: for fine-tuning, and decoding from a cache of values."""

from __future__ import annotations

import torch
from tiny_models import padded, tiny, tokens

import foveate

LUCID = "lucid(block=4)"


def test_it_decodes_as_it_reads_and_is_another_model():
    model, ids = tiny("llama"), tokens(2, 12)
    with torch.no_grad():
        dense = model(ids).logits
        with foveate.use(model, LUCID):
            whole = model(ids).logits
            past = model(ids[:, :7], use_cache=True).past_key_values
            steps = [
                model(ids[:, i : i + 1], past_key_values=past, use_cache=True).logits
                for i in range(7, 12)
            ]
        after = model(ids).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 7:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole[:, 0], dense[:, 0])  # the first token has nothing to erase
    assert (whole - dense)[:, 5:].abs().max() > 1e-3
    assert torch.equal(after, dense)


def test_padding_changes_nothing():
    model, ids = tiny("llama"), tokens(2, 12)
    mask = padded(2, 12, "left")
    pads = int((mask[1] == 0).sum())
    assert pads
    with torch.no_grad(), foveate.use(model, LUCID):
        found = model(ids, attention_mask=mask).logits[1, pads:]
        alone = model(ids[1:, pads:]).logits[0]
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_it_is_tuned():
    model, ids = tiny("llama").train(), tokens(2, 12)
    with foveate.use(model, LUCID):
        model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
