"""How a method is used: Python that runs as it stands, and the commands that take it.

Which line of Python shows a method best depends on what it is; the candidates are tried in turn,
and the first that runs is shown. So a page never shows a line that fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache

import torch

from foveate import papers
from foveate.catalog import Row
from foveate.ops.errors import FoveateError

LAYER = """
import torch
import foveate

layer = foveate.Attention(64, 4, {part}="{spec}")
y, _, _ = layer(torch.randn(2, 128, 64){mask})
"""
MODEL = """
from foveate.models import FoveateConfig, FoveateForCausalLM

config = FoveateConfig(hidden_size=64, num_hidden_layers=2, {part}="{spec}")
model = FoveateForCausalLM(config)
"""
EXPERTS = """
from foveate.models import FoveateConfig, FoveateForCausalLM

config = FoveateConfig(
    hidden_size=64, num_hidden_layers=2, moe_layers=[0, 1], num_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=64, router="{spec}",
)
model = FoveateForCausalLM(config)
"""
ENCODER = """
from foveate.models import FoveateEncoder, FoveateEncoderConfig

config = FoveateEncoderConfig(hidden_size=64, num_hidden_layers=2, pooling="{spec}")
model = FoveateEncoder(config)
"""
ALONE = """
from foveate.methods import make

method = make("{spec}")
"""
ADOPT = """
used = foveate.use(model, "{spec}")
"""
# What must be said of a method before it builds: in a new model nothing has been fitted.
SPECS = {"echoatt": "echoatt(followers=[1])"}
# Jobs that the parts of "Use it" show; what else a row names is listed.
SHOWN = {
    "Attention", "FoveateConfig(router=...)", "FoveateEncoderConfig(pooling=...)", "compare", "fit",
    "reproduce", "train", "use",
}  # fmt: skip
# Jobs that have a command of their own: what it does, and the command.
COMMANDS = {
    "classify": ("In an encoder that learns to classify texts:",
                 "foveate classify --pooling {key} --data banking77"),
    "recommend": ("In a recommender that is trained and judged:",
                  "foveate recommend train --model {key} --data ml-100k"),
    "index": ("Over documents of one's own, or those that are shipped:",
              "foveate index scifact --out sci"),
    "search": ("Asked:", 'foveate search sci "does smoking harm the heart?"'),
    "inspect": ("What makes its file, for a model:", "foveate inspect smollm2"),
    "circuits": ("On a model, with a task that tests what is found:",
                 "foveate circuits smollm2 --task ioi"),
    "compress": ("In a model that is made smaller by it:",
                 "foveate compress smollm2 --out smaller"),
}  # fmt: skip
# Subcommands, where a job has several.
MEASURED = {
    ("bench", "fna"): "bench neighborhood", ("bench", "gna"): "bench neighborhood",
    ("bench", "vmoba"): "bench video", ("bench", "rectified-spaattn"): "bench video",
    ("cost", "fna"): "cost tiles", ("cost", "gna"): "cost tiles",
}  # fmt: skip
IN_PYTHON = {
    "DiT": "foveate.models.DiT", "foveate.lens": "foveate.lens", "models": "foveate.models"
}  # fmt: skip


def use(row: Row) -> Iterator[str]:
    """The parts of a page's "Use it", as Markdown."""
    key = row.key
    if "use" in row.jobs:
        yield "In a transformers model, until it is undone:"
        yield fence("python", ADOPT.format(spec=key))
        if "fit" in row.jobs:
            yield "What it learns or searches on a model is made once, before:"
            yield fence("sh", f"foveate fit MODEL --method {key}")
    if "compare" in row.jobs:
        yield "Measured on a model, beside dense attention:"
        yield fence("sh", f"foveate compare MODEL --methods {key}")
    yield "In Python:"
    yield fence("python", snippet(row))
    if "train" in row.jobs:
        yield "In a small language model that is trained from scratch:"
        yield fence("sh", f"foveate train {composition(row)} --data book.txt")
    for job in row.jobs:
        if job in COMMANDS:
            what, command = COMMANDS[job]
            yield what
            yield fence("sh", command.format(key=key))
    if row.miniature in papers.available():
        yield "Its paper's claim, checked in small:"
        yield fence("sh", f"foveate reproduce {row.miniature}")
    others = [
        IN_PYTHON.get(job, f"foveate {MEASURED.get((job, key), job)}")
        for job in row.jobs
        if job not in SHOWN and job not in COMMANDS
    ]
    if others:
        yield f"It is also reached from {', '.join(f'`{name}`' for name in others)}."


def composition(row: Row) -> str:
    """The options by which `foveate train` builds a model with it."""
    spec = SPECS.get(row.key, row.key)
    if row.kind == "router":
        return f"--experts 8 --router {spec}"
    part = row.kind if row.kind in ("projection", "mixer") else "attention"
    return f"--{part} {spec if spec == row.key else repr(spec)}"


def fence(language: str, code: str) -> str:
    """A block of code."""
    return f"```{language}\n{code.strip()}\n```"


@cache
def snippet(row: Row) -> str:
    """The first of the candidates that runs.

    Raises:
        FoveateError: none does, not even making it by its key.
    """
    *better, last = candidates(row)
    for code in better:
        try:
            run(code)
        except FoveateError:  # this use isn't for it
            continue
        return code
    run(last)
    return last


def run(code: str) -> None:
    """Run it, and leave no trace."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        exec(code, {})


def candidates(row: Row) -> Iterator[str]:
    """Python that builds it, what shows the most first."""
    spec = SPECS.get(row.key, row.key)
    if row.kind == "mixer":
        yield MODEL.format(part="mixer", spec=spec)
    elif row.kind == "router":
        yield EXPERTS.format(spec=spec)
    elif row.kind == "pooler":
        yield ENCODER.format(spec=spec)
    elif spec != row.key:
        yield MODEL.format(part="attention", spec=spec)
    else:
        part = "projection" if row.kind == "projection" else "attention"
        if any(field.name == "shape" for field in fields(row.load())):  # it lives on a grid
            for shape in ((2, 8, 8), (8, 16)):
                yield LAYER.format(part=part, spec=f"{spec}(shape={shape})", mask="")
        yield LAYER.format(part=part, spec=spec, mask=", mask=foveate.causal()")
        yield LAYER.format(part=part, spec=spec, mask="")
    yield ALONE.format(spec=row.key)
