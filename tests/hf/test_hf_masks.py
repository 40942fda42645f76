"""Whatever transformers asks for, the mask that comes of it is the mask it would have made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import masking_utils as hf

from foveate.hf.errors import ModelError
from foveate.hf.masks import InCacheOffset, LazyMask, make_mask
from foveate.hf.view import View, view_of


def dense(view: View, q_len: int) -> Tensor:
    """A view as (B, H, q_len, kv_len)."""
    if view.mask is None:
        return torch.ones(1, 1, q_len, view.kv_len, dtype=torch.bool)
    return view.mask.dense(
        q_len, view.kv_len, q_positions=view.q_positions, kv_positions=view.kv_positions
    )


def view(mask: object, q_len: int, kv_len: int, causal: bool = True) -> View:
    return view_of(mask, q_len=q_len, kv_len=kv_len, is_causal=causal, sliding_window=None)


def odd(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A user's own mask function."""
    return (q * 7 + k * 3) % 5 != 0


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of the mask maker as models with their caches ask it."""
    batch, q_len = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    past = draw(st.integers(0, 12))
    causal = draw(st.booleans())
    if not causal:
        past = 0
    spare = draw(st.integers(0, 6)) if causal else 0
    kv_offset = draw(st.integers(0, past)) if causal and spare == 0 else 0
    total = past + q_len
    asked: dict[str, Any] = {
        "batch_size": batch,
        "q_length": q_len,
        "q_offset": draw(st.sampled_from([past, torch.tensor(past)])),
        "kv_length": total - kv_offset + spare,
        "kv_offset": kv_offset,
        "device": torch.device("cpu"),
    }
    starts = draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    functions: dict[str, Callable[[], Any]] = {
        "causal": lambda: hf.causal_mask_function,
        "window": lambda: hf.sliding_window_causal_mask_function(draw(st.integers(1, 9))),
        "chunks": lambda: hf.chunked_causal_mask_function(3, torch.tensor(starts)),
        "both": lambda: hf.or_masks(hf.causal_mask_function, odd),
        "less": lambda: hf.and_masks(hf.causal_mask_function, odd),
    }
    if not causal:
        functions = {
            "all": lambda: hf.bidirectional_mask_function,
            "band": lambda: hf.sliding_window_bidirectional_mask_function(draw(st.integers(1, 5))),
            "odd": lambda: odd,
        }
    asked["mask_function"] = functions[draw(st.sampled_from(sorted(functions)))]()
    padding = draw(st.sampled_from(["none", "ones", "left", "right", "both", "holes"]))
    if padding != "none":
        present = torch.ones(batch, total, dtype=torch.int64)
        for row in range(batch):
            if padding in ("left", "both"):
                present[row, : min(starts[row], total - 1)] = 0
            if padding in ("right", "both"):
                present[row, max(1, total - draw(st.integers(0, 3))) :] = 0
        if padding == "holes":
            present = torch.tensor(
                draw(
                    st.lists(
                        st.lists(st.integers(0, 1), min_size=total, max_size=total),
                        min_size=batch,
                        max_size=batch,
                    )
                )
            )
        asked["attention_mask"] = present
    return asked


@settings(max_examples=300, deadline=None)
@given(requests())
def test_every_request_is_answered_exactly(asked: dict[str, Any]) -> None:
    mask = make_mask(**asked)
    q_len, kv_len = asked["q_length"], asked["kv_length"]
    assert isinstance(mask, LazyMask)
    assert mask.shape == (asked["batch_size"], 1, q_len, kv_len)
    assert mask.dtype == torch.bool
    present = asked.pop("attention_mask", None)
    if present is not None:
        present = present.bool()
    expected = hf.sdpa_mask(**asked, attention_mask=present, allow_is_causal_skip=False).expand(
        asked["batch_size"], -1, -1, -1
    )
    seen = view(mask, q_len, kv_len)
    ours = dense(seen, q_len).expand(asked["batch_size"], -1, -1, -1)
    assert torch.equal(ours, expected[..., : seen.kv_len])
    assert not expected[..., seen.kv_len :].any()
    assert mask.contents is None
    # Looked into, it is that tensor, and stays right.
    assert torch.equal(mask & True, expected)
    again = view(mask, q_len, kv_len)
    ours = dense(again, q_len).expand(asked["batch_size"], -1, -1, -1)
    assert torch.equal(ours, expected[..., : again.kv_len])
    assert not expected[..., again.kv_len :].any()


def ask(**changes: Any) -> LazyMask:
    asked = {"batch_size": 2, "q_length": 6, "kv_length": 6, "device": "cpu"} | changes
    mask = make_mask(**asked)
    assert isinstance(mask, LazyMask)
    return mask


def test_what_is_known_stays_a_rule() -> None:
    """Nothing of size Lq x Lkv is made for the usual masks."""
    long = 10**6
    left = torch.ones(2, long, dtype=torch.bool)
    left[1, :1000] = False
    for changes, text in (
        ({}, "causal()"),
        (
            {"mask_function": hf.sliding_window_causal_mask_function(4096)},
            "(window(4095, -1) & causal())",
        ),
        ({"attention_mask": left}, f"(causal() & padding([{long}, {long - 1000}]))"),
    ):
        seen = view(ask(q_length=long, kv_length=long, **changes), long, long)
        assert repr(seen.mask) == text
        assert seen.table is None


def test_left_padding_counts_positions_from_the_first_real_token() -> None:
    present = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    seen = view(ask(attention_mask=present), 6, 6)
    assert seen.kv_positions is not None
    assert seen.kv_positions[1].tolist() == [-2, -1, 0, 1, 2, 3]
    assert seen.q_positions is not None
    assert seen.q_positions[0].tolist() == [0, 1, 2, 3, 4, 5]
    # Also where only a table can say it: the second row has a hole.
    present[1, 4] = 0
    seen = view(ask(attention_mask=present), 6, 6)
    assert seen.table is not None
    assert seen.kv_positions is not None
    assert seen.kv_positions[1].tolist() == [-2, -1, 0, 1, 2, 3]


def test_right_padding_needs_no_positions() -> None:
    present = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    seen = view(ask(attention_mask=present), 6, 6)
    assert seen.q_positions is None
    assert repr(seen.mask) == "(causal() & padding([6, 4]))"


def test_static_cache_is_cut_to_what_is_filled() -> None:
    seen = view(ask(q_length=1, q_offset=torch.tensor(9), kv_length=64), 1, 64)
    assert seen.kv_len == 10
    assert repr(seen.mask) == "causal()"
    assert seen.q_positions is None


def test_a_sliding_cache_keeps_the_positions_of_the_sequence() -> None:
    seen = view(ask(q_length=1, q_offset=20, kv_length=8, kv_offset=13), 1, 8)
    assert seen.kv_positions is not None
    assert seen.kv_positions[0].tolist() == list(range(13, 21))
    renumbered = view(ask(q_length=1, q_offset=20, kv_length=8, kv_offset=InCacheOffset(13)), 1, 8)
    assert renumbered.kv_positions is None


def test_packed_sequences_become_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    ids = hf.find_packed_sequence_indices(positions)
    function = hf.packed_sequence_compatibility_function(
        hf.sliding_window_causal_mask_function(3), positions, ids
    )
    seen = view(ask(batch_size=1, q_length=8, kv_length=8, mask_function=function), 8, 8)
    assert seen.documents is ids
    assert repr(seen.mask) == "(window(2, -1) & causal())"
    # With anything else about it, it's a table.
    function = hf.and_masks(function, odd)
    mask = ask(batch_size=1, q_length=8, kv_length=8, mask_function=function)
    seen = view(mask, 8, 8)
    assert seen.documents is None
    assert torch.equal(dense(seen, 8), mask & True)


def test_looking_inside_and_changing_it() -> None:
    for change in (
        lambda m: m[:, :, :, :2].fill_(False),
        lambda m: m.__setitem__((0, 0, 3), False),
        lambda m: m.logical_not_(),
    ):
        mask = ask()
        expected = mask.clone() & True
        change(mask)
        change(expected)
        assert not torch.equal(expected, ask() & True)
        assert torch.equal(dense(view(mask, 6, 6), 6).expand(2, -1, -1, -1), expected)


def test_copies_stay_lazy() -> None:
    mask = ask()
    for copy in (mask.clone(), mask.detach(), mask.contiguous(), mask.to("cpu"), mask.to("meta")):
        assert isinstance(copy, LazyMask)
        assert copy.contents is None
    assert "causal" in repr(mask)
    assert mask.to(torch.float32).sum() == 42
    assert "opened" in repr(mask)


def test_lengths_that_do_not_match_are_refused() -> None:
    with pytest.raises(ModelError, match="6 queries and 6 keys"):
        view(ask(), 6, 9)
    with pytest.raises(ModelError, match="3 queries and 5 keys"):
        view(torch.ones(1, 1, 3, 5, dtype=torch.bool), 4, 5)
    with pytest.raises(ModelError, match="shape"):
        view(torch.zeros(5), 4, 5)
    with pytest.raises(ModelError, match="int64"):
        view(torch.ones(1, 1, 4, 5, dtype=torch.int64), 4, 5)
    with pytest.raises(ModelError, match="type str"):
        view("causal", 4, 5)


def test_no_mask() -> None:
    assert repr(view(None, 4, 4).mask) == "causal()"
    assert view(None, 4, 4, causal=False).mask is None
    # SDPA's convention for a static cache that was empty.
    assert view(None, 4, 9).kv_len == 4
    windowed = view_of(None, q_len=4, kv_len=4, is_causal=True, sliding_window=3)
    assert repr(windowed.mask) == "(causal() & window(2, -1))"


def test_padding_and_broadcast_tensors() -> None:
    keys = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    both = view(keys, 4, 4)
    expected = keys.bool()[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(dense(both, 4), expected[..., : both.kv_len])
    one = view(keys.bool()[:, None, None, :], 4, 4, causal=False)
    assert torch.equal(dense(one, 4), keys.bool()[:, None, None, :].expand(2, 1, 4, 4))
    three = torch.rand(2, 4, 4) < 0.5
    three[:, -1, -1] = True
    assert torch.equal(dense(view(three, 4, 4), 4), three[:, None])


def test_flex_block_mask() -> None:
    block = create_block_mask(odd, None, None, 128, 128, device="cpu")
    q, k = torch.arange(128)[:, None], torch.arange(128)[None]
    assert torch.equal(dense(view(block, 128, 128), 128)[0, 0], odd(0, 0, q, k))
