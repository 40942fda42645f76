#!/bin/sh
# The main job on a fresh machine: `sh demo.sh [arguments of foveate compare]`.
# Makes ./.venv and installs into it on first use, then measures.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$ROOT/scripts/setup_env.sh"
foveate_setup demo
exec "$VENV/bin/foveate" compare "$@"
