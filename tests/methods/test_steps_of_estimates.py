"""What Combiner and SEA refuse after a state, which couldn't tell it from what they define."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import causal, padding, window
from foveate.ops.errors import InputError

TEXTS = ("combiner(size=4)", "sea(k=4, width=8, divisor=1.0, max_length=32)")


@pytest.mark.parametrize("text", TEXTS)
def test_new_tokens_that_do_not_see_all_before_them_are_refused(text):
    made, x = (
        foveate.Attention(64, 4, attention=text, position="none").eval(),
        torch.randn(2, 14, 64),
    )
    cache = made.new_cache()
    made(x[:, :10], mask=causal(), cache=cache)
    for new, mask in ((1, causal() & window(3, 0)), (4, None)):
        with pytest.raises(InputError, match="sees all before it"):
            made(x[:, 10 : 10 + new], mask=mask, cache=cache)
    assert len(cache) == 10
    made(x[:, 10:], mask=causal(), cache=cache)
    with pytest.raises(InputError, match="padding on the left"):
        made(x, mask=causal() & padding([14, 9]), cache=made.new_cache())
