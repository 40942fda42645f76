"""Everything that can be wrong with the input, found before any work: the cheapest checks first.

Order: options, methods, the text's file, the output folder, the model's configuration (no weights),
lengths against its positions, the text's tokens. Only then the weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import catalog
from foveate.compare import audio
from foveate.compare.needle import PromptMaker, tokenise
from foveate.compare.options import (
    Options,
    check_numbers,
    parse_depths,
    parse_device,
    parse_dtype,
    parse_lengths,
)
from foveate.compare.plan import (
    DEFAULT_LENGTHS,
    DEFAULT_METHODS,
    ENCODER_METHODS,
    Entry,
    entries_of,
)
from foveate.hf.load import ModelInfo, load_tokenizer, locate
from foveate.methods import split
from foveate.ops.errors import InputError
from foveate.runs.records import writable_folder
from foveate.runs.text import Text, load_text

ENCODER_LENGTHS = (128, 256, 512)


@dataclass(frozen=True)
class Job:
    """Checked input: what the run needs but the weights."""

    options: Options
    device: torch.device
    dtype: torch.dtype
    entries: tuple[Entry, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    passes: int
    info: ModelInfo
    tokenizer: Any
    text: Text
    prompts: PromptMaker | None
    tokens: Tensor | None


def validate(options: Options, progress: Callable[[str], None] = lambda text: None) -> Job:
    """Check a run's input.

    Args:
        options: what was asked for.
        progress: told of slow steps (the first use of a model that must be converted).

    Raises:
        UnknownMethodError, InputError, MissingPackageError: the first thing that is wrong.
    """
    check_numbers(options)
    device = parse_device(options.device)
    dtype = parse_dtype(options.dtype, device)
    lengths = parse_lengths(options.lengths)
    depths = parse_depths(options.needle_depths)
    entries = _entries(options, DEFAULT_METHODS)
    sound = options.text is not None and options.text.lower().endswith(".wav")
    text = audio.describe(options.text) if sound else load_text(options.text)
    if lengths and not sound and len(text.content.encode()) < lengths[-1]:
        raise InputError(_too_short(text, f"{len(text.content):,} characters", lengths[-1]))
    writable_folder(options.folder)

    info = locate(options.model, progress=progress)
    lengths = _lengths(lengths, info)
    if info.kind != "causal-lm":
        entries = _both_ways(_entries(options, ENCODER_METHODS), info)
    passes = max(options.repeats, len(depths) if info.kind == "causal-lm" else 0)
    if info.kind == "audio-encoder":
        if options.text is None:
            text = audio.describe(None)
        elif not sound:
            raise InputError(f"{info.name} hears audio: give a .wav file as --text, or none.")
        return Job(
            options, device, dtype, entries, lengths, (), passes, info, None, text, None, None
        )
    if sound:
        raise InputError(f"{info.name} reads text: give a UTF-8 file as --text, not a .wav.")
    tokenizer = load_tokenizer(info)
    tokens = tokenise(tokenizer, text.content)
    if len(tokens) < lengths[-1]:
        raise InputError(_too_short(text, f"{len(tokens):,} tokens", lengths[-1]))
    hidden = depths if info.kind == "causal-lm" and options.decode_tokens else ()
    prompts = PromptMaker(
        tokenizer, tokens, seed=text.sha256, windows=passes * options.batch, depths=hidden
    )
    if hidden and lengths[0] < prompts.shortest():
        raise InputError(
            f"A length of {lengths[0]} has little room beside the pass key and its question; give "
            f"--lengths of {prompts.shortest()} or more, or --needle-depths none."
        )
    return Job(
        options, device, dtype, entries, lengths, hidden, passes, info, tokenizer, text, prompts,
        tokens,
    )  # fmt: skip


def _entries(options: Options, default: str) -> tuple[Entry, ...]:
    text = default if options.methods is None else options.methods
    return entries_of(split(text), sweep=options.sweep)


def _both_ways(entries: tuple[Entry, ...], info: ModelInfo) -> tuple[Entry, ...]:
    for entry in entries:
        can = catalog.get(entry.key).capabilities.bidirectional
        if not can.works:
            fit = [r.key for r in catalog.rows() if r.capabilities.bidirectional.works]
            raise InputError(
                f"{entry.key} is for causal attention ({can.note}), but {info.name} is an encoder; "
                f"take of {', '.join(fit)}."
            )
    return entries


def _lengths(asked: tuple[int, ...] | None, info: ModelInfo) -> tuple[int, ...]:
    most = info.max_positions
    if info.kind == "audio-encoder":
        if asked not in (None, (most,)):
            raise InputError(f"{info.name} always has {most} positions; leave --lengths out.")
        assert most is not None
        return (most,)
    if asked is None:
        usual = DEFAULT_LENGTHS if info.kind == "causal-lm" else ENCODER_LENGTHS
        if most is None:
            return usual
        fitting = tuple(n for n in usual if n <= most)
        return fitting or tuple(sorted({max(1, most // 4), max(1, most // 2), most}))
    if most is not None and asked[-1] > most:
        raise InputError(
            f"--lengths {asked[-1]} is beyond the {most} positions of {info.name}; the longest "
            f"length it can take is {most}."
        )
    return asked


def _too_short(text: Text, has: str, longest: int) -> str:
    return (
        f"The text ({text.title}) has {has}, too few for the longest length, {longest}; give a "
        "longer --text or shorter --lengths."
    )
