"""`foveate fit --method mminference`: the search on a model, cut off, found by `use`, per head."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from test_fit import batches
from tiny_models import tiny, tokens
from transformers import AutoModelForCausalLM

import foveate
from foveate import Context, causal
from foveate.hf import AssignmentError, ModelError
from foveate.hf.fit.artefacts import load, place, save
from foveate.hf.fit.frozen import FrozenModel
from foveate.hf.fit.job import FileState
from foveate.methods import make
from foveate.methods.mminference import assigned, search
from foveate.ops.errors import InputError
from foveate.parts.fitting import Artefact, fitter_of

SMALL = (
    "a-shape(sinks=4, local=32)",
    "vertical-slash(verticals=20, slashes=50, forced_verticals=4, forced_slashes=10)",
)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(search.SPACES, "minference", SMALL)


class Cut(Exception):
    """The process ends here."""


def fit(model, text="mminference(sinks=2, local=60)", cut=None):
    frozen, told = FrozenModel(model), []
    path = place(frozen.fingerprint, "mminference", ".json")
    state = FileState(path.with_suffix(".fit"), frozen.fingerprint, "mminference")

    def tell(share, doing):
        told.append((share, doing))
        if len(told) == cut:
            raise Cut

    method = make(text)
    made = fitter_of(method)(method, frozen, batches(), tell, state)
    save(made, frozen.fingerprint, path)
    state.clear()
    return made, path, told


def test_the_search_is_json_that_use_finds_and_goes_with_the_weights(tmp_path):
    model, ids = tiny("llama"), tokens(1, 400)
    with pytest.raises(ModelError, match="foveate fit MODEL --method mminference"):
        foveate.use(model, "mminference")
    made, path, told = fit(model)
    assert [share for share, _ in told] == [1 / 3, 2 / 3, 1.0]
    plain = json.loads(path.read_text())
    assert plain["facts"]["layers"] == made.facts["layers"]
    assert load(path)[0].facts == made.facts
    for heads in made.facts["layers"].values():
        assert sorted(h for some in heads.values() for h in some) == [0, 1, 2, 3]
    assert made.facts["held_out"]["cost of the target"] <= 1.02
    with torch.no_grad(), foveate.use(model, "mminference") as used:
        ours = model(ids).logits
        used.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    path.unlink()
    with torch.no_grad():
        dense = model(ids).logits
        with foveate.use(again):
            torch.testing.assert_close(again(ids).logits, ours, atol=1e-5, rtol=1e-5)
        # As the same assignment would do it, head by head.
        plan = foveate.hf.Assignment(
            {int(layer): {",".join(map(str, own)): text for text, own in heads.items()}
             for layer, heads in made.facts["layers"].items()}
        )  # fmt: skip
        with foveate.use(model, plan):
            torch.testing.assert_close(model(ids).logits, ours)
    assert (ours - dense).abs().max() > 1e-3


def test_cut_off_it_goes_on_where_it_was():
    whole, _, _ = fit(tiny("llama"), "mminference(sinks=2, local=60, prompts=2)")
    place(FrozenModel(tiny("llama")).fingerprint, "mminference", ".json").unlink()
    calls = []
    with pytest.raises(Cut):
        fit(tiny("llama"), "mminference(sinks=2, local=60, prompts=2)", cut=4)
    real = search.search_head

    def counted(*given, **more):
        calls.append(given)
        return real(*given, **more)

    search.search_head = counted
    try:
        again, _, told = fit(tiny("llama"), "mminference(sinks=2, local=60, prompts=2)")
    finally:
        search.search_head = real
    assert len(calls) == 2 * 4
    assert [share for share, _ in told] == [5 / 6, 1.0]
    assert again.facts["layers"] == whole.facts["layers"]
    for place_, one in whole.facts["search"].items():
        assert again.facts["search"][place_] == pytest.approx(one)


def test_each_head_runs_its_own_pattern():
    artefact = Artefact(
        "mminference", {"layers": {"1": {"a-shape(sinks=2, local=8)": [0, 3], "full": [1, 2]}}}
    )
    method = make("mminference").with_artefact(artefact)
    q, k, v = (torch.randn(2, h, 90, 16).double() for h in (4, 2, 2))
    ctx = Context(mask=causal(), layer=1)
    got = method(q, k, v, ctx)
    for heads, text in (((0, 3), "a-shape(sinks=2, local=8)"), ((1, 2), "full")):
        want = make(text)(q, k, v, ctx)
        for h in heads:
            torch.testing.assert_close(got.out[:, h], want.out[:, h])
            torch.testing.assert_close(got.lse[:, h], want.lse[:, h])
    unseen = method(q, k, v, Context(mask=causal(), layer=0))
    torch.testing.assert_close(unseen.out, make("full")(q, k, v, ctx).out)
    with pytest.raises(InputError, match="fit on this model"):
        method(q[:, :2], k[:, :1], v[:, :1], ctx)


def test_a_sweep_scales_the_budgets_that_were_found():
    scaled = assigned.scaled(make("vertical-slash(verticals=100, slashes=400)"), 0.5)
    assert (scaled.verticals, scaled.slashes) == (50, 200)
    assert assigned.scaled(make("grid(stride=7)"), 0.5) == make("grid(stride=7)")
    both = assigned.scaled(make("2d-boundary(patterns=[['block-sparse(blocks=8)', 'grid']])"), 2.0)
    assert both.patterns == (("block-sparse(blocks=16)", "grid"),)


def test_what_doesnt_fit_is_refused():
    for text in ("mminference(sinks=4)", "mminference(space='all')", "mminference(budget=0)",
                 "mminference(prompts=0)"):  # fmt: skip
        with pytest.raises(InputError):
            make(text)
    model = tiny("llama")
    fit(model)
    with pytest.raises(AssignmentError, match="whole layers"):
        foveate.use(model, foveate.hf.Assignment({0: {"0-1": "mminference"}}))
