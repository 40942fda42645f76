"""Methods from text and back; whatever can't be read is refused with what would do."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate import catalog
from foveate.methods import make, make_all, make_attention, spec, split
from foveate.methods.attention_sink import SinkWindow
from foveate.methods.full import Full
from foveate.methods.mminference import AShape, BlockSparse, VerticalSlash
from foveate.ops.errors import InputError, UnknownMethodError


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("full", Full()),
        ("full()", Full()),
        (" sink-window ( window = 256 ) ", SinkWindow(window=256)),
        ("sink-window(sinks=1, window=7)", SinkWindow(1, 7)),
        ("a-shape(local=2048)", AShape(128, 2048)),
        ("vertical-slash(fraction=0.2, last=32)", VerticalSlash(fraction=0.2, last=32)),
        ("block-sparse(blocks=4,\n tile=32)", BlockSparse(4, 32)),
    ],
)
def test_texts_are_read(text, method):
    assert make(text) == method


@pytest.mark.parametrize("key", catalog.keys())
def test_every_key_is_made_and_told_back(key):
    method = make(key)
    assert spec(method) == key
    assert all(getattr(method, f.name) == f.default for f in dataclasses.fields(method) if f.init)


@given(
    st.builds(SinkWindow, st.integers(0, 99), st.integers(1, 9999))
    | st.builds(AShape, st.integers(0, 99), st.integers(1, 9999))
    | st.builds(BlockSparse, st.integers(1, 99), fraction=st.none() | st.floats(0.001, 1))
)
def test_there_and_back(method):
    assert make(spec(method)) == method


def test_only_what_differs_is_told():
    assert spec(SinkWindow(sinks=2)) == "sink-window(sinks=2)"


def test_a_method_outside_the_catalog_has_no_text():
    class SinkWindow:
        """Same name, another class."""

    with pytest.raises(InputError, match="isn't in the catalog"):
        spec(SinkWindow())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sink-windw", "sink-window"),
        ("verticalslash", "vertical-slash"),
        ("xyzzy", "known are .*full"),
    ],
)
def test_unknown_keys_offer_the_nearest(text, message):
    with pytest.raises(UnknownMethodError, match=message):
        make(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sink-window(windw=3)", "'window'.*It has sinks, window"),
        ("sink-window(zzz=3)", "'zzz'; it has sinks, window"),
        ("full(window=3)", "it has none"),
        ("sink-window(window='x')", "window='x'.*integer"),
        ("sink-window(window=1.5)", "integer"),
        ("sink-window(window=True)", "integer"),
        ("sink-window(window=0)", "at least 1"),
        ("a-shape(local=-3)", "at least 1"),
        ("block-sparse(tile=12)", "multiple of 8"),
        ("block-sparse(fraction=0)", "share"),
        ("vertical-slash(fraction='half')", "share"),
        ("vertical-slash(forced_slashes=0)", "at least 1"),
        ("sink-window(1024)", "window=1024"),
        ("sink-window(window=4", "can't be read"),
        ("sink-window(window=4))", "can't be read"),
        ("sink-window(window=4)(sinks=1)", "one pair"),
        ("sink-window(window=4, window=5)", "given twice"),
        ("sink-window(**{'window': 3})", r"\*\*"),
        ("sink-window(window=__import__('os').getpid())", "no plain value"),
        ("sink-window(window=[1 for _ in 'a'])", "no plain value"),
        ("sink window", "can't be read"),
        ("", "can't be read"),
        (3, "int"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        make(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("full", ["full"]),
        ("sink-window(sinks=1,window=1024), full", ["sink-window(sinks=1,window=1024)", "full"]),
        ("a(b=(1, 2), c=[3, {4: ','}]),d", ["a(b=(1, 2), c=[3, {4: ','}])", "d"]),
        ("a(b='(,'),c", ["a(b='(,')", "c"]),
    ],
)
def test_lists_are_split_outside_parentheses_and_quotes(text, parts):
    assert split(text) == parts


@pytest.mark.parametrize("text", ["", "full,", ",full", "a(b,c", "a),b", "a(],b", "a(b='c"])
def test_lists_that_do_not_close_are_refused(text):
    with pytest.raises(InputError, match="missing|closes nothing"):
        split(text)


def test_a_list_is_made():
    assert make_all("full,sink-window(window=3)") == [Full(), SinkWindow(window=3)]


def test_a_projection_is_no_attention_for_a_model_in_use():
    assert make_attention("sink-window") == SinkWindow()
    with pytest.raises(InputError, match="is a projection.*projection="):
        make_attention("mfa(head_dim=16)")
    with pytest.raises(InputError, match="is a study.*circuits"):
        make_attention("talking-heads")
