"""The job of `foveate denoise`: a small video DiT on clips, saved, with samples as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from foveate.models.denoise import STEP, noised, sample, save
from foveate.models.dit import DiT
from foveate.ops.errors import InputError, MissingPackageError
from foveate.papers.training.denoising import error, fit
from foveate.papers.training.regime import Regime
from foveate.runs.clips import BRIGHT, Clips
from foveate.runs.records import writable_folder

HELD = 48
SHOWN = 4  # clips of a picture


@dataclass(frozen=True)
class Job:
    """A training of `foveate denoise`.

    Attributes:
        attention: of all blocks, as `DiT` takes it.
        sizes: frames, height, width of a clip.
        patch: of a token.
        dim, depth, heads: of the model.
        regime: of the training.
        sampling: steps of a sample.
        out: folder of the model, checkpoints, figures and pictures.
        device: to run on.
        resume: go on from the checkpoints in `out`.
    """

    attention: str
    sizes: tuple[int, int, int]
    patch: tuple[int, int, int]
    dim: int
    depth: int
    heads: int
    regime: Regime
    sampling: int
    out: Path
    device: torch.device
    resume: bool = False


def run(job: Job, tell: Callable[[float, str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Train, save, sample.

    Returns:
        What was trained, its error on held-out clips, the error of predicting the mean, the curve
        and the pictures' paths.

    Raises:
        FoveateError: bad input, before any work; or the training diverged.
    """
    clips = Clips(job.sizes, times=(0.02, 1.0))
    checkpoints = job.out / "checkpoints"
    if not job.resume and ((job.out / "model.json").exists() or any(checkpoints.glob("step-*"))):
        raise InputError(
            f"{job.out} holds a training already; give --resume to go on with it, or another --out."
        )
    about: dict[str, Any] = {
        "sizes": job.sizes, "patch": job.patch, "channels": clips.channels, "dim": job.dim,
        "depth": job.depth, "num_heads": job.heads, "attention": job.attention,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.regime.seed)
        model = DiT(**about)
    # A grid that the attention's blocks don't fit is refused here, not after an hour.
    with torch.no_grad():
        model(torch.zeros(1, clips.channels, *job.sizes), torch.zeros(1))
    writable_folder(job.out)
    model.to(job.device)
    began = perf_counter()
    curve = fit(model, clips, job.regime, folder=checkpoints, tell=tell)
    save(model, about, job.out)
    clean, _, _ = clips.held_out(HELD)
    facts = about | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(model.places),
        "data": clips.describe(),
        "regime": job.regime.as_dict(),
        "seconds": round(perf_counter() - began, 1),
        "error": error(model, clips, HELD, batch=job.regime.batch),
        "error of the mean": float((clean - clean.mean(0)).square().mean()),
        "curve": curve,
        "pictures": [],
    }
    try:
        facts["pictures"] = [str(path) for path in pictures(model, clips, job)]
    except MissingPackageError as problem:
        say(str(problem))
    new = job.out / ".training.new"
    new.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(job.out / "training.json")
    return facts


@torch.no_grad()
def pictures(model: DiT, clips: Clips, job: Job) -> list[Path]:
    """Write samples.png (drawn from noise) and denoised.png (clean, noised, predicted).

    A clip's frames stand side by side, clips below each other.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    random = torch.Generator().manual_seed(job.regime.seed)
    noise = torch.randn(SHOWN, clips.channels, *clips.sizes, generator=random)
    drawn = sample(model, noise.to(job.device), job.sampling).cpu()
    clean, t, more = (x[:2] for x in clips.held_out(HELD))
    seen = noised(clean, t, more)
    predicted = model(seen.to(job.device), t.to(job.device) * STEP).cpu()
    rows = torch.stack((clean, seen, predicted), 1).flatten(0, 1)
    return [
        _picture(drawn, job.out / "samples.png"),
        _picture(rows, job.out / "denoised.png"),
    ]


def _picture(clips: Tensor, path: Path) -> Path:
    """Clips (n, channels, T, H, W) as one picture."""
    try:
        from matplotlib.image import imsave
    except ImportError as problem:
        raise MissingPackageError(
            "The pictures need matplotlib: pip install 'foveate[report]'"
        ) from problem
    scale = max(1, 64 // clips.shape[-1])
    shown = (clips[:, :3] / BRIGHT).clamp(-1, 1) / 2 + 0.5
    big = shown.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    framed = torch.nn.functional.pad(big, (0, 2, 0, 2), value=1.0)
    sheet = framed.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    imsave(path, sheet.numpy())
    return path
