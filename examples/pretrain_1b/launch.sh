#!/usr/bin/env bash
# One node of 8 GPUs under DeepSpeed's launcher; run.yaml says what, and what to expect.
# Arguments of the launcher come first, ours behind `--`:
#     bash examples/pretrain_1b/launch.sh --include localhost:0,1,2,3 -- --train.steps 100
# Start it again after a stop: it goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"

launcher=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    launcher+=("$1")
    shift
done
[ $# -eq 0 ] || shift
exec deepspeed ${launcher[@]+"${launcher[@]}"} --module megatron_gemini.train --config examples/pretrain_1b/run.yaml "$@"
