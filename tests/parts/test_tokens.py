"""Which tokens are real and whether a mask is causal, told by the mask alone."""

from __future__ import annotations

import pytest
import torch

from foveate.ops import blocks, causal, documents, padding, prefix, sinks, window
from foveate.parts import Context
from foveate.parts.tokens import tokens_of


def told(mask, q_len=40, kv_len=40, batch=2, **fields):
    q, k = torch.zeros(batch, 2, q_len, 4), torch.zeros(batch, 1, kv_len, 4)
    return tokens_of(q, k, Context(mask=mask, **fields))


@pytest.mark.parametrize(
    "mask",
    [
        causal(),
        causal() & window(5, 5),
        window(7, 0) | (causal() & sinks(3)),
        causal() & documents([0, 15, 40]),
        causal() & padding([40, 31]),
        blocks(torch.ones(40, 40).tril().bool(), 1),
        blocks(torch.ones(3, 5, 5).tril().bool(), 8) & causal(),
    ],
    ids=repr,
)
def test_causal_masks_are_told(mask):
    assert told(mask).causal


@pytest.mark.parametrize(
    "mask",
    [
        None,
        padding([40, 31]),
        window(5, 1),
        causal() | prefix(3),
        causal(block=8),
        blocks(torch.ones(40, 40).tril(1).bool(), 1),
        causal() | sinks(2),
    ],
    ids=repr,
)
def test_masks_that_look_ahead_are_told(mask):
    assert not told(mask).causal


@pytest.mark.parametrize("ahead", [None, causal()], ids=["both ways", "causal"])
def test_right_padding(ahead):
    mask = padding([40, 31]) if ahead is None else ahead & padding([40, 31])
    tokens = told(mask)
    real = torch.arange(40) < torch.tensor([[40], [31]])
    assert torch.equal(tokens.q_real, real)
    assert torch.equal(tokens.k_real, real)
    assert tokens.shift.tolist() == [0, 0]
    assert tokens.regular


def test_left_padding_with_earlier_keys():
    pads = torch.tensor([[0], [9]])
    kv = torch.arange(40) - pads
    tokens = told(causal() & padding([40, 31]), q_len=6, q_positions=kv[:, 34:], kv_positions=kv)
    assert tokens.q_real.all()
    assert torch.equal(tokens.k_real, kv >= 0)
    assert tokens.shift.tolist() == [34, 34]


def test_a_static_cache_is_real_up_to_the_last_query():
    tokens = told(causal(), q_len=6, kv_len=64, q_positions=torch.arange(10, 16))
    assert tokens.k_real[0].tolist() == [True] * 16 + [False] * 48
    assert tokens.shift.tolist() == [10]


def test_earlier_keys_without_rows_in_a_table_are_real_if_seen():
    table = torch.ones(6, 40).tril(34).bool()
    table[:, :4] = False
    tokens = told(blocks(table, 1), q_len=6)
    assert tokens.k_real[0].tolist() == [False] * 4 + [True] * 36


def test_positions_out_of_order_are_told():
    assert not told(causal(), q_positions=torch.randperm(40)).regular


def test_a_mask_that_shows_no_token_itself_makes_all_queries_real():
    assert told(causal() & ~window(0, 0)).q_real.all()
