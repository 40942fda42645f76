"""The C++ engine's tests once more, on a build that watches every access (ASan) and every
undefined operation (UBSan), with buffers full of NaN."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"),
    "-DFOVEATE_WATCH_SCRATCH",  # inside the engine's own scratch no sanitizer looks
)


def runtime() -> str | None:
    """The sanitizer's library, to be loaded before anything else."""
    compiler = os.environ.get("CXX", "c++").split()
    if sys.platform != "linux" or shutil.which(compiler[0]) is None:
        return None
    call = [*compiler, "-print-file-name=libasan.so"]
    name = subprocess.run(call, capture_output=True, text=True).stdout.strip()
    return name if Path(name).is_absolute() and Path(name).exists() else None


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
@pytest.mark.skipif(runtime() is None, reason="no compiler with AddressSanitizer")
def test_no_access_outside_and_nothing_undefined(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("engine_build", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    engine = tmp_path / "engine.so"
    build.compile_engine(engine, CHECKS)
    files = ("test_cpu_engine.py", "test_cpu_engine_backward.py")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"),
            *(str(ROOT / "tests" / "ops" / name) for name in files),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": str(runtime()),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "FOVEATE_CPU_ENGINE": str(engine),
            "PYTHONPATH": str(ROOT / "src"),
        },
    )
    report = done.stdout + done.stderr
    at = max(0, *(report.find(word) for word in ("runtime error", "ERROR: Address")))
    assert done.returncode == 0, report[max(0, at - 200) :][:6000]
    assert " passed" in done.stdout
