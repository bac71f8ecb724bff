#!/usr/bin/env bash
# Checks the project: lint, types and every test that needs no GPU (the GPU's too where there is one).
#
#     bash tests/run.sh                        # installs into .venv if needed; some minutes
#     bash tests/run.sh --all                  # and the long tests
#     bash tests/run.sh tests/unit -k rope     # further arguments go to pytest, which then runs in one process
#
# Without further arguments the unit tests run on two processes, and then those that start ranks, one after the other.
# PYTHON and TORCH_INDEX_URL choose what is installed, see tools/install.sh.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../tools/install.sh"

selection=(-m "not long")
arguments=()
for argument in "$@"; do
    case "$argument" in
        --all) selection=() ;;
        *) arguments+=("$argument") ;;
    esac
done

# check NAME COMMAND...: runs one check; what failed is told at the end.
failed=""
check() {
    local name="$1" started=$SECONDS status=0
    shift
    echo "== $name: $*"
    "$@" || status=$?
    echo "== $name: $([ "$status" -eq 0 ] && echo passed || echo "failed with status $status") in $((SECONDS - started)) s"
    [ "$status" -eq 0 ] || failed="${failed:+$failed, }$name"
}

echo "== installing into $VENV, if needed"
install dev
use_environment
cd "$ROOT"

# One thread a process: the tests run several ranks on few cores, and their sums must not depend on the machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=disabled # no test reaches the network

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy megatron_gemini tools
# An empty array is an unbound variable to the bash of macOS, hence the +.
if [ ${#arguments[@]} -gt 0 ]; then
    check "pytest" python -m pytest ${selection[@]+"${selection[@]}"} "${arguments[@]}"
else
    with_ranks=(tests/distributed tests/end_to_end tests/gpu)
    # By file, since a file's tests share what they have made. What starts ranks has the machine for itself.
    check "unit tests" python -m pytest -n 2 --dist loadfile ${selection[@]+"${selection[@]}"} "${with_ranks[@]/#/--ignore=}"
    check "tests with ranks" python -m pytest ${selection[@]+"${selection[@]}"} "${with_ranks[@]}"
fi

[ -z "$failed" ] || fail "$failed failed; the lines above say where"
