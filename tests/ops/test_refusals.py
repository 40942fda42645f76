"""Bad calls are refused before any work, and say what was expected."""

from __future__ import annotations

import pytest
import torch

from foveate.ops import (
    RelativeBias,
    alibi,
    alibi_slopes,
    attention,
    causal,
    documents,
    explain,
    padding,
    window,
)
from foveate.ops.check import check_tensors
from foveate.ops.errors import BackendError, FoveateError, InputError


def qkv(heads=4, kv_heads=2, q_len=8, kv_len=8, dim=16):
    return torch.randn(2, heads, q_len, dim), *(torch.randn(2, kv_heads, kv_len, dim),) * 2


Q, K, V = qkv()


EIGHT = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: attention(Q[0], K, V), r"query must be \(batch, heads, length, head size\)"),
        (lambda: attention(Q.long(), K, V), "expected a floating-point dtype"),
        (lambda: attention(Q.bfloat16(), K, V), "must have one dtype"),
        (lambda: attention(Q, K.to(EIGHT), V), "keys and values together"),
        (lambda: attention(Q.double(), K.to(EIGHT), V.to(EIGHT)), "queries of float16"),
        (lambda: attention(Q.to(EIGHT), K.to(EIGHT), V.to(EIGHT)), "queries of float16"),
        (
            lambda: attention(Q, K.clone().requires_grad_().to(EIGHT), V.to(EIGHT)),
            "would be rounded to 8 bits",
        ),
        (lambda: check_tensors(Q, K.to(EIGHT), V.to(EIGHT)), "8 bits are for"),
        (lambda: attention(Q.to("meta"), K, V), "must be on one device"),
        (lambda: attention(Q[:1], K, V), "Batch sizes differ"),
        (lambda: attention(Q[:, :3], K, V), "3 query heads are not a multiple of 2"),
        (lambda: attention(Q, K, V[:, :, :5]), "same heads and length"),
        (lambda: attention(Q[..., :8], K, V), "Head sizes differ: query 8, key 16"),
        (lambda: attention(Q, K, V, torch.zeros(8, 8)), "must be boolean with True = attend"),
        (lambda: attention(Q, K, V, "causal"), "mask must be a foveate mask"),
        (lambda: attention(Q, K, V, torch.ones(7, 7).bool()), "columns"),
        (lambda: attention(Q, K, V, documents([0, 9])), "ends at 9 but there are 8 keys"),
        (lambda: attention(Q, K, V, padding([8, 8, 8])), "batch of 3"),
        (lambda: attention(Q, K, V, torch.ones(3, 8, 8).bool()), "3 heads"),
        (lambda: attention(Q, K, V, causal(), layout=causal().layout(8, 8)), "not both"),
        (lambda: attention(Q, K, V, layout=causal().layout(8, 9)), "8 queries and 9 keys"),
        (lambda: attention(Q, K, V, layout=padding([1, 2, 3]).layout(8, 8)), "batch of 3"),
        (lambda: attention(Q, K, V, scale=float("nan")), "finite"),
        (lambda: attention(Q, K, V, softcap=0.0), "positive number"),
        (lambda: attention(Q, K, V, softcap="a"), "softcap must be a number"),
        (lambda: attention([1.0], K, V), "query must be a tensor, got list"),
        (lambda: attention(Q, K, V, dropout=1.0), "probability"),
        (lambda: attention(Q, K, V, sink_logits=torch.zeros(2)), r"must be \(4,\)"),
        (lambda: attention(Q, K, V, bias=torch.zeros(3, 8, 8)), "does not broadcast"),
        (lambda: attention(Q, K, V, bias=torch.ones(8, 8).bool()), "a mask goes in mask="),
        (lambda: attention(Q, K, V, bias=0.5), "tensor or a RelativeBias, got float"),
        (lambda: attention(Q, K, V, bias=RelativeBias(torch.ones(3, 9), 0)), "does not broadcast"),
        (lambda: RelativeBias(torch.ones(3, 0), 0), "at least one entry"),
        (lambda: RelativeBias(torch.ones(3).int(), 0), "floating-point"),
        (lambda: RelativeBias(torch.ones(3), 0.5), "whole number"),
        (lambda: alibi(torch.ones(2, 2), 3), r"must be \(Hq,\)"),
        (lambda: alibi(torch.ones(2), -1), "at least 0"),
        (lambda: alibi_slopes(0), "at least 1"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_errors_have_one_base_and_are_ordinary_ones_too():
    assert issubclass(InputError, FoveateError)
    assert issubclass(InputError, ValueError)
    assert issubclass(BackendError, RuntimeError)


def test_a_forced_backend_is_never_replaced_and_gives_every_reason():
    with pytest.raises(BackendError) as caught:
        attention(Q, K, V[..., :5], causal(), softcap=2.0, bias=torch.zeros(8, 8), backend="sdpa")
    for reason in ("softcap", "bias", "value head size 5 differs", "reference"):
        assert reason in str(caught.value)
    with pytest.raises(BackendError, match="keys of float8_e4m3fn beside wider queries"):
        attention(Q, K.to(EIGHT), V.to(EIGHT), backend="sdpa")
    with pytest.raises(BackendError, match="did you mean 'blocks'"):
        attention(Q, K, V, backend="block")
    with pytest.raises(BackendError, match="no backward on the CPU"):
        attention(Q.clone().requires_grad_(), K, V, backend="flex")
    with pytest.raises(BackendError, match="dropout"):
        attention(Q, K, V, dropout=0.1, backend="blocks")


def test_explain_tells_of_every_backend():
    story = explain(Q, K, V, causal() & window(3, 0), backend="reference")
    assert story.backend == "reference"
    assert "asked for" in str(story)
