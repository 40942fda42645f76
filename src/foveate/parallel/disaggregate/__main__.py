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

from foveate.models import FoveateForCausalLM, step3_config
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
        if given.resume:  # all ranks read this before they meet, and write after it
            requests = unfinished(requests, given.out)
        model = _model(given.model, given.seed).to(DTYPES[given.dtype]).eval()
        return _run(model, requests, plan, given.out, given.end, given.resume)
    except FoveateError as error:
        print(f"foveate.parallel.disaggregate: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1


def _run(
    model: FoveateForCausalLM,
    requests: list[Request],
    plan: Plan,
    out: Path,
    end: int | None,
    resume: bool,
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
    gpu = own_gpu()
    backend = "gloo" if gpu is None else "nccl"
    if gpu is not None:
        torch.cuda.set_device(gpu)
        model = model.to("cuda")
    name = plan.name(rank)
    print(f"{name}: process {os.getpid()}", flush=True)
    finished = out / f"{name}.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if rank < plan.attention:
            with finished.open("a" if resume else "w") as file:
                file.write("\n" if resume and file.tell() else "")  # behind a line cut short
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


def own_gpu() -> int | None:
    """This rank's GPU, if its machine has one for each of its own ranks; torchrun tells of them."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if torch.cuda.device_count() < here:
        return None
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


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


def unfinished(requests: list[Request], out: Path) -> list[Request]:
    """Those whose outputs an earlier run hasn't left in the folder, by their ids."""
    done = set()
    for path in sorted(out.glob("attention-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                done.add(str(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError):  # empty, or cut short when a rank was killed
                continue
    return [request for request in requests if request.id not in done]


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
    return FoveateForCausalLM(step3_config())


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
    text = "keep what an earlier run left in --out, and decode only requests whose ids aren't there"
    made.add_argument("--resume", action="store_true", help=text)
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
