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
stage docs env NO_MKDOCS_2_WARNING=1 mkdocs -q build --strict
workers=${FOVEATE_TEST_WORKERS:-2}
if [ $# -gt 0 ]; then
    stage pytest python -m pytest -n "$workers" --dist loadfile "$@"
else
    # Of the Triton tests the slow ones are for whoever changes kernels; see CONTRIBUTING.md.
    stage pytest python -m pytest -n "$workers" --dist loadfile -m 'not (triton and slow)'
    # The interpreter has to be asked for before Triton is imported: a run of its own.
    if python -c 'import triton' 2>/dev/null; then
        stage triton-interpreter env TRITON_INTERPRET=1 python -m pytest -n "$workers" \
            -m 'not slow' tests/ops/test_triton.py tests/ops/test_triton_paths.py
    fi
fi

if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo "all stages passed"
