#!/bin/sh
# Builds the sdist and from it the wheel, installs the wheel in a fresh environment with torch alone, and tries it there:
#
#   sh scripts/check_wheel.sh [FOLDER FOR SDIST AND WHEEL, default dist]
#
# FOVEATE_PYTHON names the Python to use (with setuptools in it). Takes minutes where pip has to fetch torch.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${FOVEATE_PYTHON:-python3}
out=${1:-$ROOT/dist}
mkdir -p "$out"
out=$(CDPATH='' cd -- "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== sdist"
cd "$ROOT"
"$python" -c 'import sys
from setuptools import build_meta
print(build_meta.build_sdist(sys.argv[1]))' "$work" >"$work/log" || { cat "$work/log"; exit 1; }
sdist=$work/$(tail -n 1 "$work/log")

echo "== wheel, from the sdist"
"$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$work" "$sdist"
wheel=$(ls "$work"/foveate-*.whl)

echo "== a fresh environment with torch alone"
"$python" -m venv "$work/venv"
clean=$work/venv/bin/python
"$clean" -m pip install -q --disable-pip-version-check -c "$ROOT/constraints.txt" "$wheel"
"$clean" -m pip check --disable-pip-version-check

echo "== try it"
cd "$work" # not in the checkout: what is imported is what was installed
"$clean" -I - <<'EOF'
import importlib.metadata as metadata
import importlib.util
from importlib.resources import files

import torch

import foveate
from foveate import causal, sinks, window
from foveate.methods import make

assert metadata.version("foveate") == foveate.__version__
for extra in ("transformers", "typer", "rich", "matplotlib"):
    assert importlib.util.find_spec(extra) is None, f"{extra} is here: this isn't torch alone"

q, k = torch.randn(1, 4, 300, 32), torch.randn(1, 2, 300, 32)
mask = causal() & (window(63, 0) | sinks(4))
out, lse = foveate.attention(q, k, k, mask)
exact = foveate.attention(q, k, k, mask, backend="reference")
torch.testing.assert_close(out, exact.out)
torch.testing.assert_close(lse, exact.lse)

for row in foveate.catalog.rows():
    make(row.key)
y, _, _ = foveate.Attention(64, 4, projection="mla")(torch.randn(2, 50, 64), mask=causal())
assert y.shape == (2, 50, 64)

data = files("foveate") / "data"
for name in ("hardware.toml", "wikitext2/wiki.test.tokens.xz", "wikitext2/LICENSE.txt"):
    assert (data / name).is_file(), f"{name} isn't in the wheel"
print(f"foveate {foveate.__version__} works; the op runs on: {foveate.explain(q, k, k, mask).backend}")
EOF
if "$work/venv/bin/foveate" methods >"$work/log" 2>&1; then
    echo "the command line ran without its extra?"
    exit 1
fi
grep -q "foveate\[.*cli" "$work/log" || { echo "it doesn't say how to get the command line:"; cat "$work/log"; exit 1; }
cp "$sdist" "$wheel" "$out"
ls -l "$out"
