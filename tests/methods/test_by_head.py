"""A pattern for each head, from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

import foveate
from foveate import Context, causal
from foveate.compare.measure import Log, Recorder
from foveate.compare.plan import entries_of
from foveate.methods import make, spec
from foveate.methods.mminference.vertical_slash import VerticalSlash, VerticalSlashes
from foveate.ops import blocks, padding, window
from foveate.ops.errors import InputError, UnknownMethodError
from foveate.parts import Pattern, by_heads

WINDOW = "sink-window(sinks=1, window=5)"
FEW = "vertical-slash(verticals=9, slashes=50)"
MANY = "vertical-slash(verticals=40, slashes=90)"


def written(tmp_path, layers, default="full", name="plan.json"):
    path = tmp_path / name
    path.write_text(json.dumps({"foveate": 1, "default": default, "layers": layers}))
    return f"by-head(file={str(path)!r})"


def tiny():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def qkv(length=40):
    shapes = (2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8)
    return tuple(torch.randn(s, dtype=torch.float64) for s in shapes)


def test_each_head_runs_its_own_pattern(tmp_path):
    method = make(
        written(tmp_path, {"1": {"3,0": WINDOW, "1": "full", "2": "a-shape"}, "2": WINDOW})
    )
    q, k, v = qkv()
    b = torch.randn(4, dtype=torch.float64)
    bias = torch.randn(1, 4, 40, 40, dtype=torch.float64)
    ctx = Context(mask=causal(), layer=1, sink_logits=b, bias=bias)
    got = method(q, k, v, ctx)
    for heads, text in (((0, 3), WINDOW), ((1,), "full"), ((2,), "a-shape")):
        for h in heads:
            kv = slice(h // 2, h // 2 + 1)
            own = Context(mask=causal(), sink_logits=b[h : h + 1], bias=bias[:, h : h + 1])
            one = make(text)(q[:, h : h + 1], k[:, kv], v[:, kv], own)
            torch.testing.assert_close(got.out[:, h : h + 1], one.out)
            torch.testing.assert_close(got.lse[:, h : h + 1], one.lse)
    layer = method(q, k, v, Context(mask=causal(), layer=2)).out
    torch.testing.assert_close(layer, make(WINDOW)(q, k, v, Context(mask=causal())).out)
    assert spec(method).startswith("by-head(file=")


def test_a_model_runs_it_as_the_assignment_of_the_same_file(tmp_path):
    model = tiny()
    import foveate

    layers = {"0": {"0-1": WINDOW, "2,3": "full"}}
    text = written(tmp_path, layers, WINDOW.replace("5", "9"))
    ids = torch.randint(64, (2, 30))
    with torch.no_grad():
        with foveate.use(model, text):
            ours = model(ids).logits
        with foveate.use(model, tmp_path / "plan.json"):
            theirs = model(ids).logits
        dense = model(ids).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, dense, atol=1e-3)


def test_compare_knows_a_changed_file_from_the_one_before(tmp_path):
    text = written(tmp_path, {"0": WINDOW})
    (before,) = entries_of([text])
    written(tmp_path, {"0": "full"})
    (after,) = entries_of([text])
    assert before.name == after.name
    assert before.parameters["digest"] != after.parameters["digest"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"0": {"0,1-0": WINDOW}}, "backwards"),
        ({"0": {"x": WINDOW}}, "can't read the heads"),
        ({"0": {"0-2": WINDOW, "2": "full"}}, "twice"),
        ({"model.layers.0": WINDOW}, "foveate.use"),
        ({"0": {}}, "names no pattern"),
    ],
)
def test_bad_files_are_refused(tmp_path, layers, words):
    with pytest.raises(InputError, match=words):
        make(written(tmp_path, layers))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="foveate inspect"):
        make("by-head(file='nowhere.json')")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="no assignment"):
        make(f"by-head(file={str(tmp_path / 'other.json')!r})")
    with pytest.raises(UnknownMethodError):
        make(written(tmp_path, {"0": "sink-windw"}))
    for heads in ("0-2", "0-4"):
        method = make(written(tmp_path, {"0": {heads: WINDOW}}))
        with pytest.raises(InputError, match="heads 0 to 3"):
            method(*qkv(), Context(mask=causal()))


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_is_one_call_without_copies(tmp_path, padded, monkeypatch):
    layers = {"0": {"3,0": WINDOW, "1": "vertical-slash(verticals=9, slashes=50)", "2": "a-shape"}}
    method = make(written(tmp_path, layers))
    q, k, v = qkv(300)
    q = q[:, :, -1:]
    b = torch.randn(4, dtype=torch.float64)
    bias = torch.randn(1, 4, 1, 300, dtype=torch.float64)
    mask = causal() & padding(torch.tensor([300, 260])) if padded else causal()
    ctx = Context(mask=mask, phase="decode", sink_logits=b, bias=bias)
    got = method(q, k, v, ctx)
    assert by_heads.together(list(dict(method.split(0)).items()), q, k, ctx) is not None
    monkeypatch.setattr(by_heads, "together", lambda *_: None)
    want = method(q, k, v, Context(mask=mask, phase="decode", sink_logits=b, bias=bias))
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)
    assert not torch.allclose(got.out, make("full")(q, k, v, ctx).out)


@pytest.mark.parametrize("bias", [None, 1, "heads"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (24, 2), (20, 1)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # of blocks, of the engine
def test_decoding_reads_a_key_head_once_for_all_its_heads(
    dtype, padded, heads, kv_heads, bias, monkeypatch
):
    q = torch.randn(2, heads, 1, 16, dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, 2, kv_heads, 300, 16, dtype=dtype)
    mask = causal() & padding(torch.tensor([300, 260])) if padded else causal()
    if bias is not None:
        bias = torch.randn(2, heads if bias == "heads" else 1, 1, 300, dtype=dtype)
    ctx = Context(mask=mask, phase="decode", bias=bias, softcap=3.0, scale=0.7)
    every = range(heads)
    parts = [(every[::3], make(WINDOW)), (every[1::3], make("full")), (every[2::3], make(FEW))]
    asked = []
    real = by_heads.attention
    monkeypatch.setattr(by_heads, "attention", lambda *a, **k: asked.append(k) or real(*a, **k))
    got = by_heads.attend_by_heads(parts, q, k, v, ctx)
    shared = 1 < heads // kv_heads <= 16
    assert len(asked) == shared  # one list of tiles for each key head
    assert not shared or asked[0]["layout"].groups[1] == kv_heads
    (slope,) = torch.autograd.grad(got.out.square().sum() + got.lse.sum(), q)
    monkeypatch.setattr(by_heads, "together", lambda *_: None)
    want = by_heads.attend_by_heads(parts, q, k, v, replace(ctx, store={}))
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)
    (right,) = torch.autograd.grad(want.out.square().sum() + want.lse.sum(), q)
    torch.testing.assert_close(slope, right)


def test_heads_are_rows_of_a_tile_only_where_they_see_much_the_same():
    q, k = torch.randn(1, 6, 1, 8), torch.randn(1, 2, 640, 8)
    ctx = Context(mask=causal(), phase="decode")
    full, near = make("full"), make(WINDOW)

    def rows(parts, ctx=ctx, q=q):
        return by_heads.together(parts, q, k, ctx).rows

    # Ten tiles, of which the window has two. Of each key head's three heads see everything ...
    assert rows([((0, 1, 3, 4), full), ((2, 5), near)])  # two, two: 44 tiles one by one for 20
    assert not rows([((0, 1, 3), full), ((2, 4, 5), near)])  # two, one
    assert rows([((0, 1, 2), full), ((3, 4, 5), near)])  # all alike
    parts = [((0, 1, 3, 4), full), ((2, 5), near)]
    assert not rows(parts, replace(ctx, stats=lambda **_: None))
    assert not rows(parts, replace(ctx, sink_logits=torch.zeros(6)))
    for shape in ((1, 2, 1, 640), (1, 6, 3, 640), (1, 1, 3, 640), (6, 1, 640)):
        assert not rows(parts, replace(ctx, bias=torch.zeros(shape)))
    assert not rows(parts, q=q[:0])
    assert by_heads.attend_by_heads(parts, q[:0], k[:0], k[:0], ctx).out.shape == (0, 6, 1, 8)


def test_what_looks_at_keys_is_called_by_itself():
    q, k, _ = qkv(300)
    ctx = Context(mask=causal(), phase="prefill")
    full, chosen = make("full"), make("vertical-slash(verticals=9, slashes=50)")
    assert by_heads.together([((0, 1), full), ((2, 3), chosen)], q, k, ctx) is None
    one = by_heads.together([((0, 1), full), ((2, 3), full)], q, k, ctx)
    assert one is not None
    assert one.is_dense(q, k, ctx)
    evicting = make("h2o")
    assert by_heads.together([((0, 1), full), ((2, 3), evicting)], q, k, ctx) is None


LINES = {
    (3,): FEW,
    (0, 2): "vertical-slash(verticals=40, slashes=70, forced_slashes=3, forced_verticals=2)",
    (1,): WINDOW,
    (4,): "vertical-slash(fraction=0.2)",
    (5,): FEW,
}


@pytest.mark.parametrize("padded", [False, True])
def test_lines_are_chosen_for_all_heads_at_once(padded):
    parts = [(heads, make(text)) for heads, text in LINES.items()]
    found = by_heads.joined(parts)
    assert [tuple(heads) for heads, _ in found] == [(0, 2, 3, 4, 5), (1,)]
    q, k, v = (torch.randn(2, heads, 300, 8, dtype=torch.float64) for heads in (6, 3, 3))
    mask = causal() & padding(torch.tensor([300, 260])) if padded else causal()
    ctx = Context(mask=mask)
    got = by_heads.attend_by_heads(parts, q, k, v, ctx)
    for heads, method in parts:
        for h in heads:
            kv = slice(h // 2, h // 2 + 1)
            want = method(q[:, h : h + 1], k[:, kv], v[:, kv], ctx)
            torch.testing.assert_close(got.out[:, h : h + 1], want.out)
            torch.testing.assert_close(got.lse[:, h : h + 1], want.lse)
    merged = found[0][1].layout(q[:, found[0][0]], k[:, [0, 1, 1, 2, 2]], v, ctx).dense()
    for at, h in enumerate(found[0][0]):
        method = next(m for heads, m in parts if h in heads)
        one = method.layout(q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v, ctx).dense()
        assert merged[:, at].equal(one[:, 0])


def test_what_can_not_be_chosen_at_once_stays_apart():
    full, window_ = make("full"), make(WINDOW)
    few, many = make("vertical-slash(last=8)"), make("vertical-slash(last=64)")
    parts = [((0,), full), ((1,), few), ((2,), window_), ((3,), many), ((4,), full)]
    assert by_heads.joined(parts) == parts
    assert by_heads.joined([((0, 1), few)]) == [((0, 1), few)]


def test_a_head_that_keeps_all_keeps_what_the_mask_says():
    own = torch.arange(200) % 2 == 0  # every second token doesn't see itself
    table = torch.ones(200, 200).tril().bool() & (own | ~torch.eye(200, dtype=torch.bool))
    ctx = Context(mask=causal() & blocks(table, 1))
    q, k, v = (torch.randn(1, 2, 200, 8, dtype=torch.float64) for _ in "qkv")
    parts = [((0,), make("vertical-slash")), ((1,), make(FEW))]
    got = by_heads.attend_by_heads(parts, q, k, v, ctx)
    want = make("full")(q, k, v, ctx)
    torch.testing.assert_close(got.out[:, 0], want.out[:, 0])
    assert not torch.allclose(got.out[:, 1], want.out[:, 1])


def test_lines_chosen_at_once_have_the_same_gradients_sinks_and_bias():
    parts = [(heads, make(text)) for heads, text in LINES.items()]
    q, k, v = (
        torch.randn(1, heads, 300, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, 3, 3)
    )
    sinks = torch.randn(6, dtype=torch.float64)
    bias = torch.randn(1, 6, 300, 300, dtype=torch.float64)
    places = torch.arange(300)
    ctx = Context(
        mask=causal(), sink_logits=sinks, bias=bias, softcap=3.0, q_positions=places,
        kv_positions=places,
    )  # fmt: skip

    def found(parts):
        result = by_heads.attend_by_heads(parts, q, k, v, ctx)
        loss = result.out.square().sum() + result.lse.sum()
        return [result.out, result.lse, *torch.autograd.grad(loss, (q, k, v))]

    got = found(parts)
    apart = []
    for heads, method in parts:  # one head at a time is never joined
        for h in heads:
            own = replace(ctx, sink_logits=sinks[h : h + 1], bias=bias[:, h : h + 1])
            kv = slice(h // 2, h // 2 + 1)
            one = method(q[:, h : h + 1], k[:, kv], v[:, kv], own)
            apart.append((h, one.out, one.lse))
    out, lse = (torch.cat([x[i] for x in sorted(apart, key=lambda x: x[0])], 1) for i in (1, 2))
    loss = out.square().sum() + lse.sum()
    for a, b in zip(got, [out, lse, *torch.autograd.grad(loss, (q, k, v))]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_chooses_lines_for_all_heads_at_once(tmp_path, padded, monkeypatch):
    layers = {"0": {"0,2": FEW, "1,3": MANY}, "1": {"0": FEW, "1": WINDOW, "2,3": MANY}}
    model, ids = tiny(), torch.randint(64, (2, 200))
    there = torch.ones_like(ids)
    if padded:
        there[1, :70] = 0  # on the left
    calls, one = [], VerticalSlashes.layout

    def counted(self, q, *rest):
        calls.append(q.shape[1])
        return one(self, q, *rest)

    monkeypatch.setattr(VerticalSlashes, "layout", counted)
    with foveate.use(model, written(tmp_path, layers)), torch.no_grad():
        got = model(ids, attention_mask=there).logits
        assert calls == [4, 3]
        monkeypatch.setattr(VerticalSlash, "for_heads", classmethod(lambda cls, each: None))
        want = model(ids, attention_mask=there).logits
    assert calls == [4, 3]
    torch.testing.assert_close(got[there > 0], want[there > 0], rtol=1e-4, atol=1e-5)


def test_compare_records_heads_as_the_model_runs_them(tmp_path):
    layers = {"0": {"0,2": FEW, "1,3": MANY}, "1": {"0": FEW, "1": WINDOW, "2,3": MANY}, "2": FEW}
    recorder = Recorder(make(written(tmp_path, layers)), Log(), False)
    told = [
        [(heads, type(part.method).__name__, part._share) for heads, part in recorder.split(layer)]
        for layer in range(3)
    ]
    assert told == [
        [((0, 1, 2, 3), "VerticalSlashes", 1.0)],
        [((0, 2, 3), "VerticalSlashes", 0.75), ((1,), "SinkWindow", 0.25)],
        [(None, "VerticalSlash", 1.0)],
    ]


def test_only_the_class_itself_is_chosen_at_once():
    class Own(VerticalSlash):
        """Whose layout would be left out."""

    parts = [((0,), Own()), ((1,), Own(verticals=50))]
    assert by_heads.joined(parts) == parts
    q, k, v = qkv(300)
    with pytest.raises(InputError, match="2 methods for 4 query heads"):
        VerticalSlashes((make(FEW),) * 2)(q, k, v, Context(mask=causal()))


def test_heads_run_apart_in_a_whole_graph(tmp_path):
    method = make(written(tmp_path, {"0": {"0,1": WINDOW, "2,3": "full"}}))
    q, k, v = qkv(64)
    ctx = Context(mask=causal())
    want = method(q, k, v, ctx).out
    compiled = torch.compile(lambda *x: method(*x, ctx).out, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), want)


def test_key_heads_are_read_once_where_query_heads_share_them_evenly():
    assert by_heads.key_heads(range(9), 3) == [0, 1, 2]
    assert by_heads.key_heads((0, 3, 8), 3) == [0, 1, 2]
    assert by_heads.key_heads((6, 7, 0, 1), 3) == [2, 0]
    assert by_heads.key_heads((0, 1, 3), 3) == [0, 0, 1]
    assert by_heads.key_heads((0, 3, 1), 3) == [0, 1, 0]


def test_a_pattern_is_asked_once_in_a_forward():
    asked = []

    class Near(type(make("sink-window"))):
        """Tells when it is asked."""

        def rule(self, ctx):
            asked.append(ctx.layer)
            return super().rule(ctx)

    q, k, v = qkv(300)
    q = q[:, :, -1:]
    ctx = Context(mask=causal(), phase="decode")
    for layer in range(3):
        parts = [((0, 1), make("full")), ((2, 3), Near(window=9))]
        by_heads.attend_by_heads(parts, q, k, v, replace(ctx, layer=layer))
    assert asked == [0]


@pytest.mark.parametrize("mask", [None, causal()])
def test_a_choice_that_decoding_makes_is_not_taken_for_everything(mask):
    class Chosen(type(make("full"))):
        """Sees the last key alone; no rule says so."""

        def is_dense(self, q, k, ctx):
            return False

        def layout(self, q, k, v, ctx):
            return window(0, 0).layout(q.shape[2], k.shape[2], 64)

    q, k, v = qkv(300)
    q = q[:, :, -1:]
    ctx = Context(mask=mask, phase="decode")
    parts = [((0, 1), make("full")), ((2, 3), Chosen())]
    assert by_heads.together(parts, q, k, ctx) is None

    class Routed(Chosen, torch.nn.Module):
        """Its answer may depend on weights and on what q and k hold."""

        def is_dense(self, q, k, ctx):
            raise AssertionError("asked about other heads' numbers")

    assert by_heads.together([((0, 1, 2, 3), Routed())], q, k, ctx) is None
    assert by_heads.together([((0, 1, 2, 3), make("flux"))], q, k, ctx) is None
    got = by_heads.attend_by_heads(parts, q, k, v, ctx).out
    torch.testing.assert_close(got[:, 2:], v[:, 1:, -1:].expand(-1, 2, -1, -1))


def test_a_pattern_without_a_hash_is_asked_each_time():
    @dataclass
    class Near(Pattern):
        """The last keys; equal by its fields, so without a hash."""

        keys: int = 9

        def is_dense(self, q, k, ctx):
            return False

        def rule(self, ctx):
            return window(self.keys, 0)

        def layout(self, q, k, v, ctx):
            return self.rule(ctx).layout(q.shape[2], k.shape[2], 64)

    q, k, v = qkv(300)
    q = q[:, :, -1:]
    ctx = Context(mask=causal(), phase="decode")
    parts = [((0, 1), make("full")), ((2, 3), Near())]
    one = by_heads.together(parts, q, k, ctx)
    assert one is not None
    assert one.masks == (causal(), window(9, 0))
    got = one(q, k, v, ctx).out
    torch.testing.assert_close(got[:, 2:], Near()(q, k, v, ctx).out[:, 2:])


def test_a_model_decodes_by_heads_as_in_its_prefill(tmp_path):
    model = tiny()
    text = written(
        tmp_path, {"0": {"0,3": WINDOW, "1,2": "full"}, "1": {"0-2": "full", "3": WINDOW}}
    )
    ids = torch.randint(64, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad(), foveate.use(model, text):
        whole = model(ids, attention_mask=mask).logits
        cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-5)
