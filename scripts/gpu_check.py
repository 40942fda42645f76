"""Everything that a GPU is needed for, in one call: tests, tuning, both benchmarks, as JSON.

    PYTHONPATH=src python scripts/gpu_check.py OUT [--minutes 9] [--only tests,tune,kernels,decode]

Writes OUT/tests.txt, OUT/triton.json (tuned configurations), OUT/kernels/results.jsonl,
OUT/decode/results.jsonl, a text of each stage, and OUT/summary.json. It needs torch, Triton and
pytest, no installed foveate and no network. A stage that is stopped by the time has kept what it
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    # name: (share of the time, command)
    "tests": (0.3, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_triton.py",
              "tests/ops/test_triton_paths.py"]),
    "tune": (0.15, ["-m", "foveate.ops.triton.tune"]),
    "kernels": (
        0.4, ["-m", "foveate.cli", "bench", "kernels", "--device", "cuda", "--quick", "--out"],
    ),
    "decode": (
        0.15, ["-m", "foveate.cli", "bench", "decode", "--device", "cuda", "--quick", "--out"],
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, of " + ", ".join(STAGES))
    parser.add_argument("--full", action="store_true", help="the whole benchmark, not --quick")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in given.only.split(",") if name]
    if unknown := set(names) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; known are {', '.join(STAGES)}")
    environment = dict(os.environ)
    paths = (str(ROOT / "src"), str(ROOT / "tests" / "ops"), os.environ.get("PYTHONPATH", ""))
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths), "FOVEATE_CACHE": str(given.out.resolve())
    }  # fmt: skip
    end = time.monotonic() + 60 * given.minutes
    summary = {}
    for number, name in enumerate(names):
        shares = [STAGES[n][0] for n in names[number:]]
        limit = (end - time.monotonic()) * shares[0] / sum(shares)
        command = [sys.executable, *STAGES[name][1]]
        if given.full:
            command = [word for word in command if word != "--quick"]
        if command[-1] == "--out":
            command.append(str(given.out / name))
        summary[name] = run(command, given.out / f"{name}.txt", environment, limit)
        print(f"{name}: {summary[name]}", flush=True)
    (given.out / "summary.json").write_text(json.dumps(summary, indent=1))
    return int(any(stage["code"] not in (0, None) for stage in summary.values()))


def run(command: list[str], text: Path, environment: dict[str, str], limit: float) -> dict:
    """Run one stage with its output in a file; its exit code is None if the time ended it."""
    start = time.monotonic()
    with text.open("w") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=limit,
            )  # fmt: skip
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    sys.stdout.write("".join(text.read_text().splitlines(keepends=True)[-40:]))
    return {"code": code, "seconds": round(time.monotonic() - start, 1), "limit": round(limit, 1)}


if __name__ == "__main__":
    sys.exit(main())
