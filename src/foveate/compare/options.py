"""What a run of compare is asked for, parsed and checked one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from foveate.ops.errors import InputError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


@dataclass(frozen=True)
class Options:
    """The arguments of `foveate compare`.

    Attributes:
        model: folder, hub id or short name; None is SmolLM2-135M-Instruct.
        methods: comma-separated methods; None is plan.DEFAULT_METHODS.
        lengths: comma-separated tokens; None is 1024, 2048 and 4096, or what the model allows.
        text: UTF-8 file to measure on (for an audio encoder a WAV file); None is what is shipped.
        out: folder for results.jsonl, report.html and table.md.
        device: cpu, cuda, cuda:1 ...
        dtype: of the weights; None is float32 on a CPU, else bfloat16.
        batch: prompts per pass.
        threads: of the CPU; None is torch's own choice.
        repeats: paired passes at least; each is another window of the text.
        needle_depths: comma-separated shares of the length, or "none".
        decode_tokens: tokens to decode after each pass; at least 8 if a key is hidden.
        max_ppl_loss: of a method that may be recommended (encoders: 1 - mean cosine).
        max_needle_loss: likewise, of the share of keys found.
        sweep: each method at several budgets.
        fresh: put earlier results in `out` aside.
    """

    model: str | None = None
    methods: str | None = None
    lengths: str | None = None
    text: str | None = None
    out: str = "foveate-report"
    device: str = "cpu"
    dtype: str | None = None
    batch: int = 1
    threads: int | None = None
    repeats: int = 3
    needle_depths: str = "0.1,0.5,0.9"
    decode_tokens: int = 12
    max_ppl_loss: float = 0.01
    max_needle_loss: float = 0.0
    sweep: bool = False
    fresh: bool = False

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out).expanduser()


def parse_lengths(text: str | None) -> tuple[int, ...] | None:
    """Lengths in rising order, each once; None stays None."""
    if text is None:
        return None
    found = set()
    for part in text.split(","):
        word = part.strip().lower().replace("_", "")
        factor = 1024 if word.endswith("k") else 1
        word = word.removesuffix("k")
        if not word.isdecimal() or int(word) == 0:
            raise InputError(
                f"--lengths {text}: {part.strip()!r} is no number of tokens; expected something "
                "like 1024,2048,4096 (or 1k,2k,4k)."
            )
        found.add(int(word) * factor)
    return tuple(sorted(found))


def parse_depths(text: str) -> tuple[float, ...]:
    """Needle depths in the order given; empty for "none"."""
    if text.strip().lower() in ("none", ""):
        return ()
    depths = []
    for part in text.split(","):
        try:
            depth = float(part)
        except ValueError:
            depth = math.nan
        if not 0.0 <= depth <= 1.0:
            raise InputError(
                f"--needle-depths {text}: {part.strip()!r} is no share between 0 and 1; expected "
                "something like 0.1,0.5,0.9, or none."
            )
        depths.append(depth)
    return tuple(depths)


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; None is float32 on a CPU, else bfloat16."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    full = SHORT.get(name.lower(), name.lower().removeprefix("torch."))
    if full not in DTYPES:
        raise InputError(f"--dtype {name} is not known; {nearest(full, [*DTYPES, *SHORT])}")
    if full == "float16" and device.type == "cpu":
        raise InputError("--dtype float16 is for GPUs; on a CPU take float32 or bfloat16.")
    return DTYPES[full]


def parse_device(name: str) -> torch.device:
    """The device of a name, if it's there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is not known; expected cpu, cuda or cuda:N.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise InputError(f"--device {name}: foveate runs on cpu and cuda.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise InputError(
            f"--device {name}: torch sees {count} CUDA devices here; take cpu, or install a torch "
            "built for your GPU."
        )
    return torch.device("cuda", device.index or 0)


def check_numbers(options: Options) -> None:
    """The plain numbers in their ranges."""
    for name, least in (("batch", 1), ("repeats", 1), ("decode_tokens", 0)):
        value = getattr(options, name)
        if value < least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value}: expected {least} or more.")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: expected 1 or more.")
    for name in ("max_ppl_loss", "max_needle_loss"):
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value}: expected a share such as 0.01, 0 or more.")
    if parse_depths(options.needle_depths) and 0 < options.decode_tokens < 8:
        raise InputError(
            f"--decode-tokens {options.decode_tokens} is too few for an answer with the pass key; "
            "expected 8 or more, or --needle-depths none."
        )
