"""Decode requests with attention and experts on different ranks; one process for each rank.

    torchrun --nproc-per-node 3 -m foveate.parallel.disaggregate --attention 1 --ffn 2 \\
        --model FOLDER --requests requests.jsonl --out decoded

FOLDER holds a foveate model (`save_pretrained`); without it a small random model of Step-3's shape
runs, to see that the machines work. Each line of the requests is {"id": "a", "ids": [1, 2, 3],
"new": 16}. A finished sequence is written at once, to decoded/attention-<n>.jsonl, so that what is
finished outlives any rank; decoded/trace.json has the stages (chrome://tracing, ui.perfetto.dev).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from foveate.models import FoveateConfig, FoveateForCausalLM
from foveate.ops.errors import FoveateError, InputError
from foveate.parallel.disaggregate.batch import Request
from foveate.parallel.disaggregate.plan import DISPATCHES, Plan
from foveate.parallel.disaggregate.run import Served, serve
from foveate.parallel.disaggregate.stages import write_trace

LAST_WORDS = 5  # seconds from being told to end, by when a rank has said what it saw
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank; 0 if all is well, 1 if a rank was lost, 2 if what was asked makes no sense."""
    given = _parser().parse_args(arguments)
    try:
        plan = Plan(
            attention=given.attention,
            ffn=given.ffn,
            tp=given.tp,
            micro_batches=given.micro_batches,
            rows=given.rows,
            dispatch=given.dispatch,
            patience=given.patience,
        )
        requests = _requests(given.requests) if given.requests else _some(given.seed)
        model = _model(given.model, given.seed).to(DTYPES[given.dtype]).eval()
        return _run(model, requests, plan, given.out, given.end)
    except FoveateError as error:
        print(f"foveate.parallel.disaggregate: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1


def _run(
    model: FoveateForCausalLM, requests: list[Request], plan: Plan, out: Path, end: int | None
) -> int:
    try:
        store, rank, size = next(distributed.rendezvous("env://"))
    except ValueError as error:
        raise InputError(
            f"{error} Start it with torchrun: torchrun --nproc-per-node {plan.size} -m "
            "foveate.parallel.disaggregate ..."
        ) from error
    if size != plan.size:
        raise InputError(
            f"{size} processes for {plan.size} ranks ({', '.join(plan.names)}); give torchrun "
            f"--nproc-per-node {plan.size}, or change --attention, --ffn or --tp."
        )
    backend = "nccl" if torch.cuda.device_count() >= size else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        model = model.to("cuda")
    name = plan.name(rank)
    print(f"{name}: process {os.getpid()}", flush=True)
    finished = out / f"{name}.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if rank < plan.attention:
            finished.write_text("")
    except OSError as error:
        raise InputError(f"--out {out}: outputs can't be written there ({error}).") from error
    signal.signal(signal.SIGTERM, _say_why)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )

    def told(request: str, tokens: list[int]) -> None:
        with finished.open("a") as file:
            file.write(json.dumps({"id": request, "tokens": tokens}) + "\n")

    begun = time.monotonic()
    served = serve(
        model, requests, plan, store=store, end=end, told=told, traced=True, release=True
    )
    if rank == 0:
        write_trace(out / "trace.json", served.events)
    print(_summary(served, time.monotonic() - begun), flush=True)
    distributed.destroy_process_group()
    return 0


def _say_why(*_: object) -> None:
    """Live on for a moment: torchrun ends all ranks when one dies, before they know which."""
    signal.alarm(LAST_WORDS)


def _summary(served: Served, seconds: float) -> str:
    held = f"{served.name}: {served.parameters:,} parameters"
    if served.decoded is None:
        return held
    tokens = sum(len(t) for t in served.decoded.tokens.values())
    text = f"{held}, {len(served.decoded.tokens)} sequences, {tokens} tokens in {seconds:.2f} s"
    steps = sorted(served.decoded.seconds_per_token())
    if steps:
        text += f", {1e3 * steps[len(steps) // 2]:.2f} ms for each token of a sequence (median)"
    return f"{text}, cache at most {served.decoded.cache_bytes:,} bytes"


def _requests(path: Path) -> list[Request]:
    if not path.is_file():
        raise InputError(f"--requests {path}: there is no such file.")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            ids = tuple(int(i) for i in told["ids"])
            request = Request(str(told["id"]), ids, int(told["new"]), int(told.get("after", 0)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}, line {number}: expected {{"id": "a", "ids": [1, 2, 3], "new": 16}}, '
                f"got {line[:80]!r} ({error})."
            ) from error
        found.append(request)
    return found


def _some(seed: int) -> list[Request]:
    """Twelve prompts of random tokens, some of which come later."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(12):
        length, new = torch.randint(1, 25, (2,), generator=draw).tolist()
        ids = torch.randint(0, 256, (length,), generator=draw).tolist()
        made.append(Request(f"request-{i}", tuple(ids), new, after=4 * (i // 6)))
    return made


def _model(folder: Path | None, seed: int) -> FoveateForCausalLM:
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise InputError(f"--model {folder}: expected a folder with a saved foveate model.")
        return FoveateForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    return FoveateForCausalLM(step3_in_small())


def step3_in_small() -> FoveateConfig:
    """Step-3's composition at a small size: MFA, experts with a shared one, dense at both ends."""
    return FoveateConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=16,
        intermediate_size=256,
        projection="mfa(head_dim=16, query_rank=32)",
        moe_layers=[1, 2, 3, 4],
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )


def _parser() -> argparse.ArgumentParser:
    plan = Plan()
    made = argparse.ArgumentParser(
        prog="python -m foveate.parallel.disaggregate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", type=Path, help="folder of a saved foveate model")
    made.add_argument("--requests", type=Path, help="JSON lines; random prompts without it")
    made.add_argument("--out", type=Path, default=Path("decoded"), help="folder for what comes out")
    for name, text in (
        ("attention", "attention ranks"),
        ("ffn", "FFN instances: experts are dealt to them"),
        ("tp", "ranks of an FFN instance: each has a part of every expert's width"),
        ("micro-batches", "in flight on each attention rank"),
        ("rows", "most sequences of a micro-batch, and prompt tokens of it in a pass"),
    ):
        default = getattr(plan, name.replace("-", "_"))
        made.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    made.add_argument("--dispatch", choices=DISPATCHES, default="plain", help="how tokens travel")
    text = f"seconds until a rank counts as stalled ({plan.patience:g})"
    made.add_argument("--patience", type=float, default=plan.patience, help=text)
    made.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    made.add_argument("--end", type=int, help="a token that ends a sequence")
    made.add_argument("--seed", type=int, default=0, help="of the random model and prompts")
    return made


if __name__ == "__main__":
    sys.exit(main())
