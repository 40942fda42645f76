"""`use` leaves no trace: configs, registries, modules, also after errors and in any order."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, padded, tiny, tokens
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import foveate
from foveate.hf import Assignment, AssignmentError, InUseError, ModelError, Use, sites
from foveate.methods.attention_sink import SinkWindow
from foveate.ops.errors import BackendError, InputError, UnknownMethodError

PATTERN = "sink-window(sinks=2, window=5)"


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def registered() -> set[str]:
    return set(AttentionInterface._global_mapping) | set(AttentionMaskInterface._global_mapping)


BEFORE = frozenset(registered())


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    assert registered() == BEFORE
    yield
    assert registered() == BEFORE


def test_import_registers_nothing() -> None:
    code = (
        "import sys, foveate, foveate.hf; assert 'transformers' not in sys.modules;"
        "from foveate.hf import use, sites, streaming_cache; assert callable(foveate.use);"
        "import foveate.hf.using; assert foveate.hf.use is foveate.use is use;"
        "from transformers import AttentionInterface as A, AttentionMaskInterface as M;"
        "assert not [k for k in [*A._global_mapping, *M._global_mapping] if 'foveate' in k]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_as_a_call_and_as_a_block(before: str) -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    model.set_attn_implementation(before)
    plain = logits(model, ids)
    forwards = {name: m.forward.__func__ for name, m in model.named_modules()}
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    run = foveate.use(model, PATTERN)
    assert isinstance(run, Use)
    assert run.active
    sparse = logits(model, ids)
    assert (sparse - plain).abs().max() > 1e-3
    assert {name: m.forward.__func__ for name, m in model.named_modules()} == forwards
    assert "forward" not in vars(model.model.layers[0].self_attn)
    run.undo()
    run.undo()
    assert not run.active
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, ids), plain)
    with foveate.use(model, PATTERN) as again:
        assert torch.equal(logits(model, ids), sparse)
        again.undo()
        assert torch.equal(logits(model, ids), plain)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    with pytest.raises(InUseError, match="undone"), again:
        pass


def test_an_exception_inside_is_undone() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    plain = logits(model, ids)
    with pytest.raises(ZeroDivisionError), foveate.use(model, PATTERN):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), plain)
    with pytest.raises(ModelError), foveate.use(model, PATTERN):
        model(input_ids=ids, output_attentions=True)
    assert torch.equal(logits(model, ids), plain)


def test_two_models_at_once() -> None:
    one, two = tiny("llama", seed=1), tiny("qwen3", seed=2)
    ids = tokens(1, 20)
    alone = []
    for model, pattern in ((one, PATTERN), (two, "full")):
        with foveate.use(model, pattern):
            alone.append(logits(model, ids))
    plain = logits(one, ids)
    first = foveate.use(one, PATTERN)
    second = foveate.use(two, "full")
    assert torch.equal(logits(one, ids), alone[0])
    assert torch.equal(logits(two, ids), alone[1])
    first.undo()
    assert torch.equal(logits(one, ids), plain)
    assert torch.equal(logits(two, ids), alone[1])
    second.undo()


def test_two_models_with_one_config() -> None:
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    one, two = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert one.config is two.config
    ids = tokens(1, 20)
    plain = logits(one, ids), logits(two, ids)
    first = foveate.use(one, PATTERN)
    assert (logits(one, ids) - plain[0]).abs().max() > 1e-5
    assert (logits(two, ids) - plain[1]).abs().max() <= 1e-5
    second = foveate.use(two, PATTERN)
    first.undo()
    assert (logits(one, ids) - plain[0]).abs().max() <= 1e-5
    assert (logits(two, ids) - plain[1]).abs().max() > 1e-5
    second.undo()
    assert config._attn_implementation == "eager"


def test_nested_uses_are_refused() -> None:
    model = tiny("llama")
    with foveate.use(model, PATTERN) as run:
        for inner in (model, model.model):
            with pytest.raises(InUseError, match="undo"):
                foveate.use(inner, "full")
        assert run.active
        logits(model, tokens(1, 5))
    assert model.config._attn_implementation == "eager"
    with foveate.use(model.model, PATTERN), pytest.raises(InUseError):
        foveate.use(model, "full")


def test_every_config_gets_its_own_back() -> None:
    """A composite model with one implementation for each part."""
    text = SIZES | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    config = Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    own = [c._attn_implementation for c in (config, config.text_config, config.vision_config)]
    run = foveate.use(model, "full")
    now = {c._attn_implementation for c in (config, config.text_config, config.vision_config)}
    assert len(now) == 1
    assert "foveate" in now.pop()
    run.undo()
    back = [c._attn_implementation for c in (config, config.text_config, config.vision_config)]
    assert back == own == ["sdpa", "eager", "sdpa"]


def test_image_tokens_see_each_other() -> None:
    """Gemma-3's mask for images: a table, because no rule tells it."""
    config = Gemma3Config(
        text_config=SIZES
        | {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(3)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    ids, kinds = tokens(2, 20), torch.zeros(2, 20, dtype=torch.int64)
    kinds[:, 4:10] = 1
    mask = padded(2, 20, "left")
    kinds[1, :8] = 0
    with torch.no_grad():
        inputs = {"input_ids": ids, "token_type_ids": kinds, "attention_mask": mask}
        eager = model(**inputs).logits
        causal = model(**inputs | {"token_type_ids": torch.zeros_like(kinds)}).logits
        with foveate.use(model, "full"):
            ours = model(**inputs).logits
    assert (eager - ours)[mask.bool()].abs().max() <= 1e-5
    assert (eager - causal)[mask.bool()].abs().max() > 1e-4


@pytest.mark.parametrize("kept", [False, True])
def test_modules_are_held_weakly(kept: bool) -> None:
    """A model that goes away takes its use with it, undone or not, even if the Use is kept."""
    model = tiny("llama")
    run = foveate.use(model, PATTERN)
    logits(model, tokens(1, 20))
    gone = [weakref.ref(m) for m in model.modules()]
    config = model.config
    if not kept:
        del run
    del model
    gc.collect()
    assert not [ref() for ref in gone if ref() is not None]
    assert registered() == BEFORE
    assert config._attn_implementation == "eager"
    assert not kept or not run.active


def test_a_part_that_lives_on_stays_in_use() -> None:
    model = tiny("llama")
    ids = tokens(1, 20)
    foveate.use(model, PATTERN)
    with torch.no_grad():
        before = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        part = model.model
        del model
        gc.collect()
        assert torch.equal(part(input_ids=ids).last_hidden_state, before)
    del part
    gc.collect()


def test_a_copy_says_what_is_wrong() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    plain = logits(model, ids)
    run = foveate.use(model, PATTERN)
    sparse = logits(model, ids)
    copied, other = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.raises(ModelError, match=r"foveate\.use\(copy"):
        logits(copied, ids)
    run.undo()
    with pytest.raises(ModelError, match=r"foveate\.use\(copy"):
        logits(copied, ids)
    assert torch.equal(logits(model, ids), plain)
    with foveate.use(copied, PATTERN):
        assert torch.equal(logits(copied, ids), sparse)
    assert copied.config._attn_implementation == "eager"
    assert torch.equal(logits(copied, ids), plain)
    other.set_attn_implementation("eager")
    assert torch.equal(logits(other, ids), plain)


def test_a_pickled_model_knows_nothing_of_it() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    plain = logits(model, ids)
    with foveate.use(model, PATTERN):
        again = pickle.loads(pickle.dumps(model))
    assert type(again.config._attn_implementation) is str
    assert torch.equal(logits(again, ids), plain)


def test_the_users_own_choice_stays() -> None:
    model = tiny("llama")
    run = foveate.use(model, PATTERN)
    model.set_attn_implementation("sdpa")
    assert not run.active
    run.undo()
    assert model.config._attn_implementation == "sdpa"
    with foveate.use(model, PATTERN) as run:
        assert run.active


def test_inference_mode_leaves_nothing_that_training_trips_over() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    with foveate.use(model, "sink-window(window=16)"):
        with torch.inference_mode():
            model(input_ids=ids)
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_inference_mode_then_training_on_a_padded_batch() -> None:
    model, ids = tiny("llama"), tokens(2, 90)
    mask = padded(2, 90, "left")
    for pattern in ("block-sparse(blocks=2, tile=8)", "a-shape(sinks=2, local=5)"):
        with foveate.use(model, pattern):
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=mask)
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()


def test_an_instance_is_a_pattern() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    with foveate.use(model, PATTERN):
        named = logits(model, ids)
    with foveate.use(model, SinkWindow(sinks=2, window=5)):
        assert torch.equal(logits(model, ids), named)


def test_backend_is_passed_on() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    with foveate.use(model, PATTERN):
        auto = logits(model, ids)
    for backend in ("reference", "blocks"):
        with foveate.use(model, PATTERN, backend=backend):
            assert (logits(model, ids) - auto).abs().max() <= 1e-4
    with foveate.use(model, PATTERN, backend="abacus"), pytest.raises(BackendError, match="abacus"):
        logits(model, ids)


@pytest.mark.parametrize(
    ("pattern", "error", "text"),
    [
        ("sink-windo", UnknownMethodError, "sink-window"),
        ("sink-window(windw=3)", InputError, "window"),
        (7, InputError, "int"),
        (Assignment({3: "full"}), AssignmentError, "no layer 3; it attends in layers 0-2"),
        (Assignment({0: {"2-4": "full"}}), AssignmentError, "heads 0 to 3"),
    ],
)
def test_bad_patterns_change_nothing(pattern: Any, error: type[Exception], text: str) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=text):
        foveate.use(model, pattern)
    assert model.config._attn_implementation == "eager"
    with foveate.use(model, "full"):
        pass


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(ModelError, match="transformers model"):
        foveate.use(nn.Linear(2, 2), "full")
    model = tiny("llama")
    model.config.output_attentions = True
    with pytest.raises(ModelError, match="output_attentions"):
        foveate.use(model, "full")


def test_a_saved_model_knows_nothing_of_it(tmp_path: Path) -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    layers = {1: {"0-1": PATTERN}, 2: "a-shape(sinks=2, local=4)"}
    assignment = Assignment(layers)
    with foveate.use(model, assignment):
        ours = logits(model, ids)
        model.save_pretrained(tmp_path)
    file = assignment.save(tmp_path)
    assert file == tmp_path / "foveate.json"
    assert "foveate" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    read = Assignment.load(tmp_path)
    assert read == assignment
    with foveate.use(again, read):
        assert (logits(again, ids) - ours).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "pattern",
    [
        Assignment({1: {"0-1": PATTERN}}, "a-shape(sinks=2, local=4)"),
        PATTERN,
        SinkWindow(2, 5),
    ],
    ids=["assignment", "text", "instance"],
)
def test_a_model_is_saved_and_loaded_with_its_assignment(tmp_path: Path, pattern: Any) -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    folder = tmp_path / "new" / "model"
    with foveate.use(model, pattern) as run:
        ours = logits(model, ids)
        assert run.save_pretrained(folder) == folder / "foveate.json"
    again = AutoModelForCausalLM.from_pretrained(folder)
    for where in ([], [folder], [str(folder)], [folder / "foveate.json"]):
        with foveate.use(again, *where):
            assert (logits(again, ids) - ours).abs().max() <= 1e-5


def test_a_saved_pattern_for_cross_attention_comes_back(tmp_path: Path) -> None:
    model = tiny("whisper")
    with foveate.use(model, PATTERN, cross=True) as run:
        run.save_pretrained(tmp_path)
    crossing = {site.name for site in sites(model).values() if site.cross}
    assert set(Assignment.load(tmp_path).layers) == crossing
    assert crossing


def test_where_there_is_no_assignment_it_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    Assignment().save(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")  # isn't where the model is from
    with pytest.raises(AssignmentError, match=r"foveate\.json in the folder"):
        foveate.use(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(AssignmentError, match=str(tmp_path)):
        foveate.use(again)
    with pytest.raises(AssignmentError, match="no assignment at"):
        foveate.use(again, tmp_path)

    class Own(SinkWindow):
        """A method that no text names."""

    run = foveate.use(model, Own(2, 5))
    with run, pytest.raises(InputError, match="isn't in the catalog"):
        run.save_pretrained(tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_assignments_as_files(tmp_path: Path) -> None:
    one = Assignment({0: "full", 2: {"0-1,3": SinkWindow(2, 5)}}, default="a-shape")
    assert one == Assignment({"0": "full", "2": {"0-1,3": PATTERN}}, "a-shape")
    for place in (tmp_path / "new" / "folder", tmp_path / "mine.json"):
        if place.suffix:
            place.parent.mkdir(exist_ok=True)
        assert Assignment.load(one.save(place)) == one
    with pytest.raises(AssignmentError, match="no assignment at"):
        Assignment.load(tmp_path)
    bad = tmp_path / "foveate.json"
    for text, message in (
        ("{", "JSON"),
        ("[]", "version"),
        (json.dumps({"foveate": 2}), "version"),
        (json.dumps({"foveate": 1, "layers": []}), "layers"),
        (json.dumps({"foveate": 1, "layers": {"0": 5}}), "layer 0"),
        (json.dumps({"foveate": 1, "layers": {"0": {"x": "full"}}}), "heads 'x'"),
        (json.dumps({"foveate": 1, "layers": {"0": {"3-1": "full"}}}), "backwards"),
        (json.dumps({"foveate": 1, "layers": {"0": {"0-2": "full", "2": "full"}}}), "two"),
    ):
        bad.write_text(text)
        with pytest.raises(AssignmentError, match=message):
            Assignment.load(tmp_path)
    bad.write_text(json.dumps({"foveate": 1, "layers": {"0": "ful"}}))
    with pytest.raises(UnknownMethodError, match="full"):
        Assignment.load(tmp_path)


def test_layers_of_several_stacks_are_named_by_path() -> None:
    model = tiny("whisper")
    with pytest.raises(AssignmentError, match="ambiguous"):
        foveate.use(model, Assignment({0: "full"}))
    with pytest.raises(AssignmentError, match="no layer model.encoder.layers.7"):
        foveate.use(model, Assignment({"model.encoder.layers.7": "full"}))
    names = [site.name for site in sites(model).values()]
    assert "model.decoder.layers.1.encoder_attn" in names
    assignment = Assignment(
        {"model.decoder.layers.1.encoder_attn": PATTERN, "model.encoder.layers.0": PATTERN}
    )
    with foveate.use(model, assignment) as run:
        assert len(run.sites) == 6
