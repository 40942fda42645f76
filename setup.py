"""The C++ engine's build: plain files, no torch headers, one source for several instruction sets.

Everything else about the package is in pyproject.toml. The extension is optional: without a
compiler the install succeeds, and attention on the CPU runs in pure torch.
"""

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = "src/foveate/ops/cpu/csrc"
HOST = ("dispatch.cpp", "gradients.cpp", "items.cpp")
COMMON = ["-std=gnu++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
          "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]  # fmt: skip
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c",
        "-mbmi2", "-mprefer-vector-width=512"]  # fmt: skip
LEVELS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": WIDE,
    "avx512bf16": [*WIDE, "-mavx512bf16"],
    "amx": [*WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def levels() -> dict[str, list[str]]:
    """Instruction sets to build for, with their flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return LEVELS if x86 else {"portable": []}


def compile_engine(target: Path, extra: Sequence[str] = ()) -> None:
    """Compile and link the engine to `target`; an instruction set that the compiler doesn't know
    is left out.

    Raises:
        subprocess.CalledProcessError, OSError: no compiler, or none that builds the portable code.
    """
    compiler = [*os.environ.get("CXX", "c++").split(), *COMMON, *extra]
    root = Path(__file__).resolve().parent / SOURCES
    with tempfile.TemporaryDirectory() as folder:

        def start(source: str, name: str, flags: Sequence[str]) -> Any:
            out = f"{folder}/{name}.o"
            call = [*compiler, *flags, "-c", str(root / source), "-o", out]
            return call, out, subprocess.Popen(call)

        jobs = {
            name: start("kernels.cpp", name, [*flags, f"-DFOVEATE_ISA={name}"])
            for name, flags in levels().items()
        }
        have = {name for name, (_, _, job) in jobs.items() if job.wait() == 0}
        if "portable" not in have:
            raise subprocess.CalledProcessError(1, jobs["portable"][0])
        objects = [out for name, (_, out, _) in jobs.items() if name in have]
        host = ["-fexceptions", "-frtti", *(f"-DFOVEATE_{name.upper()}" for name in have)]
        for source in HOST:
            call, out, job = start(source, source, [*host, "-fopenmp"])
            if job.wait():  # a compiler without OpenMP: one thread
                call, out, job = start(source, source, host)
                if job.wait():
                    raise subprocess.CalledProcessError(1, call)
            objects.append(out)
        # Not linked with -fopenmp: the runtime that torch has loaded is the one to use.
        link = ["-shared"]
        if sys.platform == "darwin":
            link = ["-bundle", "-undefined", "dynamic_lookup"]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*compiler, *link, *objects, "-o", str(target)], check=True)


class BuildEngine(build_ext):
    """Compiles the engine instead of a Python extension module."""

    def build_extension(self, ext: Extension) -> None:
        try:
            compile_engine(Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.SubprocessError) as error:
            raise CompileError(f"the C++ engine was not built: {error}") from error

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dll" if os.name == "nt" else ".so")


if __name__ == "__main__":
    sources, headers = ([str(p) for p in sorted(Path(SOURCES).glob(x))] for x in ("*.cpp", "*.h"))
    engine = Extension("foveate.ops.cpu._engine", sources, depends=headers, optional=True)
    setup(
        ext_modules=[engine],
        cmdclass={"build_ext": BuildEngine},
    )
