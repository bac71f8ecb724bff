#!/usr/bin/env bash
# Installs the project and what it needs into .venv beside it; the other scripts source this file and call `install`.
#
#     bash tools/install.sh          # the package, with its `megatron-gemini` command
#     bash tools/install.sh dev      # and what the tests need
#
# A second call finds everything installed and returns at once. Choices, by environment variable:
#   PYTHON           interpreter of the environment, 3.11 or newer (default: a python3 that has torch, else python3.11,
#                    else python3). A torch that it already has, as in NVIDIA's images, is used and never replaced.
#   TORCH_INDEX_URL  package index to take torch from, for example one of PyTorch's for an older CUDA driver. Without it:
#                    on a machine with a GPU the build that pip finds; on one without, a CPU build if pip's own index or
#                    PyTorch's (download.pytorch.org) offers one, otherwise again the build that pip finds.
# pip's own settings (PIP_INDEX_URL, PIP_CACHE_DIR, ...) hold as always.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
TORCH_VERSION=2.13.0

# fail REASON [STATUS]: one line on stderr, then leave.
fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

# has_gpu: whether this machine has a CUDA device.
has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# version_of INTERPRETER PACKAGE: the installed version, nothing if it is not installed.
version_of() {
    "$1" -c 'import sys, importlib.metadata as m
try: print(m.version(sys.argv[1]))
except m.PackageNotFoundError: pass' "$2" 2>/dev/null || true
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# leave_environment: an activated .venv must not be made anew from itself, so choose as if it were not active.
leave_environment() {
    PATH=":$PATH:"
    PATH="${PATH//":$VENV/bin:"/:}"
    PATH="${PATH#:}"
    PATH="${PATH%:}"
    [ "${VIRTUAL_ENV:-}" != "$VENV" ] || unset VIRTUAL_ENV
    case "${PYTHON:-}" in
        "$VENV"/*) fail "PYTHON is $PYTHON, in the environment that it should make; give another Python 3.11 or newer" 2 ;;
    esac
}

# choose_python: sets INTERPRETER to the one that the environment is made with.
choose_python() {
    local candidate
    INTERPRETER=""
    leave_environment
    if [ -n "${PYTHON:-}" ]; then
        INTERPRETER="$(command -v "$PYTHON" || true)"
        [ -n "$INTERPRETER" ] || fail "PYTHON is $PYTHON, which is no command; give the path of a Python 3.11 or newer" 2
        is_new_enough "$INTERPRETER" ||
            fail "PYTHON is $PYTHON (version: $("$INTERPRETER" -V 2>&1 | head -n 1)); Python 3.11 or newer is needed" 2
        return
    fi
    if is_new_enough python3 && [ -n "$(version_of python3 torch)" ]; then
        INTERPRETER="$(command -v python3)"
        return
    fi
    for candidate in python3.11 python3 python3.12 python3.13 python; do
        if is_new_enough "$candidate"; then
            INTERPRETER="$(command -v "$candidate")"
            return
        fi
    done
    fail "no Python 3.11 or newer found; install one or give its path as PYTHON=..." 2
}

# fingerprint WHAT: changes when anything that decides the environment's content does.
fingerprint() {
    {
        echo "$1 $ROOT $INTERPRETER $HAD_TORCH ${TORCH_INDEX_URL:-}"
        has_gpu && echo gpu
        "$INTERPRETER" -V
        cat "$ROOT"/requirements.txt "$ROOT"/requirements-dev.txt "$ROOT"/constraints.txt "$ROOT"/pyproject.toml \
            "$ROOT"/tools/install.sh
    } | cksum
}

# logged STEP COMMAND...: runs a command with its output in the log; shows the reason when it fails.
logged() {
    local name="$1" status=0 reason
    shift
    echo "-- $name"
    echo "\$ $*" >>"$INSTALL_LOG"
    "$@" >>"$INSTALL_LOG" 2>&1 || status=$?
    [ "$status" -eq 0 ] && return
    reason="$(grep -iE '^ *[a-z]*error\b' "$INSTALL_LOG" | tail -n 1)"
    fail "$name failed (${reason:-$(tail -n 1 "$INSTALL_LOG")}); the whole log: $INSTALL_LOG" "$status"
}

make_environment() {
    local options="" home
    [ -z "$HAD_TORCH" ] || options=--system-site-packages
    # Debian's python3 has no ensurepip without a package of its own; the pip beside that torch does as well.
    [ -z "$HAD_TORCH" ] || "$INTERPRETER" -c 'import ensurepip' 2>/dev/null || options="$options --without-pip"
    logged "making $VENV with $("$INTERPRETER" -V 2>&1) ($INTERPRETER)" "$INTERPRETER" -m venv --clear $options "$VENV"
    # An interpreter that is itself a virtual environment does not pass its packages on: name their folder.
    if [ -n "$HAD_TORCH" ] && [ -z "$(version_of "$VENV/bin/python" torch)" ]; then
        home="$("$INTERPRETER" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        echo "import site; site.addsitedir('$home')" >"$("$VENV/bin/python" -c \
            'import sysconfig; print(sysconfig.get_path("purelib"))')/parent_environment.pth"
    fi
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
}

install_torch() {
    local cpu_index=https://download.pytorch.org/whl/cpu
    case "$(version_of "$VENV/bin/python" torch)" in
        "$TORCH_VERSION" | "$TORCH_VERSION"+*) return ;;
    esac
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        pip_install --no-deps --index-url "$TORCH_INDEX_URL" "torch==$TORCH_VERSION"
    elif has_gpu; then
        pip_install --no-deps "torch==$TORCH_VERSION"
    else
        pip_install --no-deps "torch==$TORCH_VERSION+cpu" ||
            pip_install --no-deps --retries 0 --timeout 10 --index-url "$cpu_index" "torch==$TORCH_VERSION+cpu" ||
            pip_install --no-deps "torch==$TORCH_VERSION"
    fi
}

# install_requirements WHAT: with a torch that was there, our ranges and its versions; otherwise our exact versions.
install_requirements() {
    local requirements="$VENV/requirements.txt" constraints="$ROOT/constraints.txt" name version
    if [ -n "$HAD_TORCH" ]; then
        grep -v '^torch[<>=]' "$ROOT/requirements.txt" >"$requirements" # whatever its version is, it stays
    else
        cp "$ROOT/requirements.txt" "$requirements"
    fi
    [ "$1" != dev ] || cat "$ROOT/requirements-dev.txt" >>"$requirements"
    if [ -n "$HAD_TORCH" ]; then
        constraints="$VENV/constraints.txt"
        : >"$constraints"
        for name in torch triton numpy flash-attn transformer-engine apex; do
            version="$(version_of "$INTERPRETER" "$name")"
            [ -z "$version" ] || echo "$name==$version" >>"$constraints"
        done
    fi
    pip_install -c "$constraints" -r "$requirements"
}

install_package() {
    pip_install --no-deps --no-build-isolation -e "$ROOT"
}

# install [dev]: .venv holds the package and what it needs.
install() {
    local what="${1:-run}" stamp torch started=$SECONDS
    choose_python
    HAD_TORCH="$(version_of "$INTERPRETER" torch)"
    if command -v flock >/dev/null 2>&1; then # one installation at a time
        exec 9<"$ROOT/requirements.txt"
        flock 9
    fi
    stamp="$(fingerprint dev)"
    [ -f "$VENV/installed-dev" ] && [ "$(cat "$VENV/installed-dev")" = "$stamp" ] && what=done
    if [ "$what" = run ]; then
        stamp="$(fingerprint run)"
        [ -f "$VENV/installed-run" ] && [ "$(cat "$VENV/installed-run")" = "$stamp" ] && what=done
    fi
    if [ "$what" != done ]; then
        install_now "$what" "$stamp"
        echo "-- installed in $((SECONDS - started)) s (log: $INSTALL_LOG)"
    fi
    exec 9<&-
    command -v gcc >/dev/null 2>&1 ||
        echo "warning: no gcc; only DeepSpeed's compiled operators (engine.adam: deepspeed) need it" >&2
}

# install_now WHAT STAMP: the same, without asking whether it is there.
install_now() {
    INSTALL_LOG="$(mktemp "${TMPDIR:-/tmp}/megatron-gemini-install.XXXXXX")"
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/interpreter" 2>/dev/null)" = "$ROOT $INTERPRETER $HAD_TORCH ${TORCH_INDEX_URL:-}" ]; then
        echo "-- using $VENV"
        rm -f "$VENV"/installed-*
    else
        make_environment
        echo "$ROOT $INTERPRETER $HAD_TORCH ${TORCH_INDEX_URL:-}" >"$VENV/interpreter"
    fi
    [ -n "$HAD_TORCH" ] || logged "installing torch $TORCH_VERSION" install_torch
    [ -z "$HAD_TORCH" ] || echo "-- keeping torch $HAD_TORCH of $INTERPRETER"
    logged "installing the requirements" install_requirements "$1"
    logged "installing the package" install_package
    torch="$(version_of "$VENV/bin/python" torch)"
    [ -z "$HAD_TORCH" ] || [ "$torch" = "$HAD_TORCH" ] ||
        fail "torch was $HAD_TORCH and is now $torch in $VENV; nothing may replace it (log: $INSTALL_LOG)"
    mv "$INSTALL_LOG" "$VENV/install.log"
    INSTALL_LOG="$VENV/install.log"
    echo "$2" >"$VENV/installed-$1"
}

# use_environment: the rest of the calling script runs in .venv, on the CPU where there is no GPU.
use_environment() {
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    unset PYTHONHOME
    has_gpu || export DS_ACCELERATOR=cpu
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    case "${1:-run}" in
        run | dev) install "${1:-run}" ;;
        *) fail "unknown argument $1; give nothing, or dev for what the tests need" 2 ;;
    esac
    echo "-- ready: source $VENV/bin/activate"
fi
