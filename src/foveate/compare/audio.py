"""Input for Whisper's encoder: a WAV file, or a synthetic sound, as log-mel features.

No recording is shipped. The synthetic sound has speech's coarse shape (a pitch with harmonics under
moving formants, syllables, pauses, breath noise) and is the same each time; the report says so.
"""

from __future__ import annotations

import hashlib
import math
import wave
from pathlib import Path

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.runs.text import Text

RATE = 16_000
SECONDS = 30


def describe(path: str | None) -> Text:
    """What is heard, in the place of a text."""
    if path is None:
        made = f"synthetic sound, {SECONDS} s windows, 16 kHz"
        return Text(made, "", hashlib.sha256(b"synthetic-1").hexdigest())
    sound = read_wav(path)
    sha256 = hashlib.sha256(sound.numpy().tobytes()).hexdigest()
    return Text(f"file {Path(path).name}, {len(sound) / RATE:.1f} s", "", sha256)


def features(path: str | None, first: int, size: int) -> Tensor:
    """(size, 80, 3000) fp32 log-mel features of windows of 30 s, number `first` on."""
    from transformers import WhisperFeatureExtractor

    sound = read_wav(path) if path is not None else None
    clips = [_window(sound, first + i) for i in range(size)]
    extract = WhisperFeatureExtractor()
    arrays = [clip.numpy() for clip in clips]
    made: Tensor = extract(arrays, sampling_rate=RATE, return_tensors="pt").input_features
    return made


def read_wav(path: str) -> Tensor:
    """(n,) fp32 in -1 ... 1: a PCM WAV file as mono at 16 kHz."""
    try:
        with wave.open(str(Path(path).expanduser()), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except FileNotFoundError:
        raise InputError(f"--text {path}: there is no such file.") from None
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"--text {path} can't be read as PCM WAV: {error}.") from error
    if width != 2 or not raw:
        raise InputError(
            f"--text {path}: expected 16-bit PCM with sound in it, got {8 * width} bit."
        )
    sound = torch.frombuffer(bytearray(raw), dtype=torch.int16).float().reshape(-1, channels)
    mono = sound.mean(1) / 32768
    if rate == RATE:
        return mono
    size = round(len(mono) * RATE / rate)
    return torch.nn.functional.interpolate(mono[None, None], size=size, mode="linear")[0, 0]


def _window(sound: Tensor | None, number: int) -> Tensor:
    size = RATE * SECONDS
    if sound is None:
        return synthetic(number)
    start = number * size % max(1, len(sound))
    return sound[start : start + size]


def synthetic(number: int) -> Tensor:
    """(480000,) fp32: 30 s of a sound shaped like speech, the same for each number."""
    random = torch.Generator().manual_seed(1_000 + number)
    time = torch.arange(RATE * SECONDS) / RATE
    syllables = 4 * SECONDS
    knots = torch.rand(4, syllables + 1, generator=random)

    def curve(values: Tensor) -> Tensor:
        wide = torch.nn.functional.interpolate(
            values[None, None], size=len(time), mode="linear", align_corners=True
        )
        return wide[0, 0]

    pitch = 90 + 60 * curve(knots[0])
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / RATE
    formants = (curve(300 + 500 * knots[1]), curve(900 + 1500 * knots[2]))
    voice = torch.zeros_like(time)
    for harmonic in range(1, 25):
        tone = harmonic * pitch
        gain = sum(torch.exp(-(((tone - formant) / 180) ** 2)) for formant in formants)
        voice += gain * torch.sin(harmonic * phase)
    loud = torch.where(knots[3] > 0.25, knots[3], torch.zeros(()))
    noise = 0.02 * torch.randn(len(time), generator=random)
    sound = (voice * curve(loud) + noise) * 0.1
    return sound.clamp(-1, 1)
