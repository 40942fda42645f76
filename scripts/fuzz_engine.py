"""A coverage-guided fuzzer on the C++ engine's entry points.

    python scripts/fuzz_engine.py --minutes 10
    python scripts/fuzz_engine.py --replay build/fuzz/failures/0123456789abcdef

Inputs are bytes that hypothesis reads as one call with its layout (`tests/ops/calls.py`). Each is
checked against attention in float64, forward and backward (`tests/ops/test_cpu_engine_fuzz.py`), on
an engine that is built with AddressSanitizer and UndefinedBehaviorSanitizer and tells which edges
of its code ran. An input that reaches a new edge, or one more often than any before, is kept and
mutated further. Kept inputs stay in --folder, so the next run goes on from them; failing ones stay
in failures/ until they are taken away, and as long as there are any the exit status is 1.

It takes g++ (any that knows -fsanitize-coverage=trace-pc) on Linux, and the test requirements.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EDGES = 1 << 16
CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DFOVEATE_WATCH_SCRATCH")
TRACE = ("-O1", "-g1", "-fsanitize-coverage=trace-pc")
RECORDER = f"""
#include <stdint.h>
unsigned char foveate_edges[{EDGES}];
static __thread uintptr_t before;
void __sanitizer_cov_trace_pc(void) {{
  uintptr_t here = (uintptr_t)__builtin_return_address(0);
  unsigned char* hit = &foveate_edges[((here ^ before) * 0x9E3779B97F4A7C15ull) >> 48];
  if (*hit != 255) ++*hit;
  before = here >> 1;
}}
"""


def main() -> int:
    """Build, and run in a process of its own, which a sanitizer may end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="what is kept")
    parser.add_argument("--isa", help="kernels, such as portable or avx2; all by turns otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--plain", action="store_true", help="without the sanitizers")
    parser.add_argument("--replay", type=Path, help="run this input once and show what it is")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return replay(given) if given.replay else fuzz(given)
    given.folder.mkdir(parents=True, exist_ok=True)
    preload = build(given)
    began, code, running = time.monotonic(), 1, given.folder / "running"
    while code and (left := given.minutes - (time.monotonic() - began) / 60) > 0:
        running.unlink(missing_ok=True)
        call = [sys.executable, *sys.argv, "--inside", "--minutes", str(left)]
        code = subprocess.run(call, env=environment(given, preload)).returncode
        if given.replay or code == 130 or (code and not running.exists()):
            return code
        if code:  # a sanitizer's report or a crash: kept, and on with other mutations
            keep(given.folder / "failures", running.read_bytes())
            sys.argv += ["--seed", str(random.randrange(1 << 30))]
    failures = list((given.folder / "failures").glob("*"))
    print(f"{len(failures)} failing inputs in {given.folder / 'failures'}")
    return 1 if failures else 0


def build(given: argparse.Namespace) -> str:
    """The engine that tells its edges, and the libraries to be loaded before it."""
    spec = importlib.util.spec_from_file_location("engine_build", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    if given.isa:
        every = made.levels()
        made.levels = lambda: {name: every[name] for name in {"portable", given.isa}}
    compiler = os.environ.get("CXX", "c++").split()
    source = given.folder / "recorder.c"
    source.write_text(RECORDER)
    recorder = given.folder / "recorder.so"
    subprocess.run(
        [*compiler, "-x", "c", "-O2", "-shared", "-fPIC", str(source), "-o", str(recorder)],
        check=True,
    )
    flags = TRACE if given.plain else (*CHECKS, *TRACE)
    sources = [path.read_bytes() for path in sorted((ROOT / made.SOURCES).iterdir())]
    sources.append((ROOT / "setup.py").read_bytes())
    what = repr((compiler, flags, sorted(made.levels()))).encode() + b"".join(sources)
    digest, known = hashlib.sha256(what).hexdigest(), given.folder / "engine.digest"
    if not known.exists() or known.read_text() != digest:
        made.compile_engine(given.folder / "engine.so", flags)
        known.write_text(digest)
    if given.plain:
        return str(recorder)
    asan = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return f"{asan.stdout.strip()} {recorder}"


def environment(given: argparse.Namespace, preload: str) -> dict[str, str]:
    """Where the fuzzing process finds engine, package and tests."""
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "FOVEATE_CPU_ENGINE": str((given.folder / "engine.so").resolve()),
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests' / 'ops'}",
        "OMP_NUM_THREADS": "1",
    }


class Target:
    """The checked call, and the edges that it runs."""

    def __init__(self, isa: str | None) -> None:
        from calls import cases
        from hypothesis import given, settings
        from test_cpu_engine_fuzz import SETS, check

        from foveate.ops import cpu

        self.sets, self.use = [isa] if isa else SETS, cpu.use

        @settings(database=None, deadline=None)
        @given(case=cases())
        def target(case: Any) -> None:
            check(case)

        self.run = target.hypothesis.fuzz_one_input
        self.edges = (ctypes.c_ubyte * EDGES).in_dll(ctypes.CDLL(None), "foveate_edges")

    def __call__(self, data: bytes) -> tuple[bytes | None, set[tuple[int, int]]]:
        """What was read of the input (None: it is no call), and (edge, how often, coarsely)."""
        ctypes.memset(self.edges, 0, EDGES)
        self.use(self.sets[data[0] % len(self.sets)])
        read = self.run(data[1:])
        hit = bytes(self.edges)
        found = {(i, 0 if n == 1 else 1 if n < 16 else 2) for i, n in enumerate(hit) if n}
        return (None if read is None else data[:1] + read), found


def fuzz(given: argparse.Namespace) -> int:
    """Mutate kept inputs until time is up, 0, or somebody stops it, 130."""
    target, dice = Target(given.isa), random.Random(given.seed)
    corpus, seen, runs, calls = [], set(), 0, 0
    folder, running = given.folder / "corpus", given.folder / "running"
    begun = told = time.monotonic()
    waiting = [path.read_bytes() for path in sorted(folder.glob("*"))]
    waiting += [dice.randbytes(400) for _ in range(20)]
    code = 0
    while (now := time.monotonic()) < begun + 60 * given.minutes and not code:
        data = waiting.pop() if waiting else mutated(corpus, dice)
        running.write_bytes(data)
        try:
            read, found = target(data)
        except KeyboardInterrupt:
            code = 130
            break
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            print(f"kept as {keep(given.folder / 'failures', data)}", file=sys.stderr)
            continue
        runs, calls = runs + 1, calls + (read is not None)
        if read is not None and found - seen and read not in corpus:
            seen |= found
            corpus.append(read)
            keep(folder, read)
        if now - told > 10:
            told = now
            print(f"{runs} runs, {len({e for e, _ in seen})} edges, {len(corpus)} kept", flush=True)
    facts = {
        "runs": runs, "calls": calls, "seconds": round(time.monotonic() - begun, 1),
        "edges": len({edge for edge, _ in seen}), "kept": len(corpus),
        "kernels": target.sets, "sanitizers": not given.plain,
        "failures": len(list((given.folder / "failures").glob("*"))),
    }  # fmt: skip
    (given.folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))
    return code


def mutated(corpus: list[bytes], dice: random.Random) -> bytes:
    """A kept input with a few bytes changed, cut out, copied, or taken from another one."""
    if not corpus:
        return dice.randbytes(400)
    data = bytearray(dice.choice(corpus[-50:] if dice.random() < 0.5 else corpus))
    for _ in range(1 << dice.randrange(5)):
        at, size = dice.randrange(len(data)), 1 << dice.randrange(5)
        how = dice.randrange(6)
        if how == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            data[at] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
        elif how == 2:
            data[at] = (data[at] + dice.choice((-2, -1, 1, 2))) % 256
        elif how == 3 and len(data) > size + 1:
            del data[at : at + size]
        elif how == 4:
            data[at:at] = dice.randbytes(size)
        else:
            other = dice.choice(corpus)
            start = dice.randrange(len(other))
            data[at : at + size] = other[start : start + size]
        if not data:
            data = bytearray(dice.randbytes(8))
    return bytes(data) + dice.randbytes(16)


def keep(folder: Path, data: bytes) -> Path:
    """Write an input under its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


def replay(given: argparse.Namespace) -> int:
    """Run one kept input."""
    read, found = Target(given.isa)(given.replay.read_bytes())
    print("no call" if read is None else f"passed, {len(found)} edges")
    return 0


if __name__ == "__main__":
    sys.exit(main())
