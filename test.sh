#!/bin/sh
# Every check of the project: `sh test.sh [arguments of pytest]`.
# Makes ./.venv on first use. All stages run, whichever fails; the exit code is 0 only if all passed.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$ROOT/scripts/setup_env.sh"
foveate_setup dev
cd "$ROOT"
PATH=$VENV/bin:$PATH
export PATH

failed=
stage() {
    name=$1
    shift
    echo "== $name"
    if ! "$@"; then failed="$failed $name"; fi
}

stage ruff-check ruff check .
stage ruff-format ruff format --check .
stage mypy mypy
stage lint-imports lint-imports --no-logo
stage pytest python -m pytest -n "${FOVEATE_TEST_WORKERS:-2}" --dist loadfile "$@"
# The GPU kernels in Triton's interpreter, which has to be asked for before Triton is imported.
if [ $# -eq 0 ] && python -c 'import triton' 2>/dev/null; then
    stage triton-interpreter env TRITON_INTERPRET=1 python -m pytest \
        -n "${FOVEATE_TEST_WORKERS:-2}" tests/ops/test_triton.py
fi

if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo "all stages passed"
