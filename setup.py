"""The C++ engine's build: plain files, no torch headers, one source for several instruction sets.

Everything else about the package is in pyproject.toml. The extension is optional: without a
compiler the install succeeds, and attention on the CPU runs in pure torch.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "src/foveate/ops/cpu/csrc"
COMMON = ["-std=gnu++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
          "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]  # fmt: skip
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c",
        "-mbmi2", "-mprefer-vector-width=512"]  # fmt: skip
LEVELS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": WIDE,
    "avx512bf16": [*WIDE, "-mavx512bf16"],
}


def levels() -> dict[str, list[str]]:
    """Instruction sets to build for, with their flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return LEVELS if x86 else {"portable": []}


def compile_engine(target: Path, extra: list[str] = (), work: str | None = None) -> None:
    """Compile and link the engine to `target`."""
    compiler = os.environ.get("CXX", "c++").split()
    root = Path(__file__).resolve().parent / SOURCES
    with tempfile.TemporaryDirectory(dir=work) as folder:
        objects, have = [], []
        for name, flags in levels().items():
            out = Path(folder) / f"{name}.o"
            call = [*compiler, *COMMON, *flags, f"-DFOVEATE_ISA={name}", *extra, "-c"]
            done = subprocess.run(
                [*call, str(root / "kernels.cpp"), "-o", str(out)], check=name == "portable"
            )
            if done.returncode == 0:
                objects.append(str(out))
                have.append(f"-DFOVEATE_{name.upper()}")
        out = Path(folder) / "dispatch.o"
        call = [
            *compiler,
            *COMMON,
            "-fexceptions",
            "-frtti",
            *have,
            *extra,
            "-c",
            str(root / "dispatch.cpp"),
        ]
        if subprocess.run([*call, "-fopenmp", "-o", str(out)]).returncode:
            subprocess.run([*call, "-o", str(out)], check=True)
        # Not linked with -fopenmp: the runtime that torch has loaded is the one to use.
        link = (
            ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        sanitizer = [f for f in extra if f.startswith("-fsanitize")]
        subprocess.run(
            [*compiler, *link, *sanitizer, str(out), *objects, "-o", str(target)], check=True
        )


class BuildEngine(build_ext):
    """Compiles the engine instead of a Python extension module."""

    def build_extension(self, ext: Extension) -> None:
        compile_engine(Path(self.get_ext_fullpath(ext.name)))

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dll" if os.name == "nt" else ".so")


if __name__ == "__main__":
    sources = [str(p) for p in sorted(Path(SOURCES).glob("*.cpp"))]
    setup(
        ext_modules=[Extension("foveate.ops.cpu._engine", sources, optional=True)],
        cmdclass={"build_ext": BuildEngine},
    )
