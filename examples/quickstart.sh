#!/usr/bin/env bash
# The whole chain on real data: trains a small model that reads text, images, clips and speech and answers in text and
# pictures. On two CPU cores in a quarter of an hour; with a GPU the same commands use it.
#
#     bash examples/quickstart.sh                            # safe to run again: finished links are reused
#     bash examples/quickstart.sh --parallel.tensor 2        # options go to the pretraining
#     RUN_DIR=runs/other RANKS=1 bash examples/quickstart.sh
#
#   RUN_DIR   where everything is written (default: runs/quickstart in the project's folder)
#   RANKS     processes that train together (default: 2, and 1 on a machine with a single GPU)
#   PYTHON    interpreter for the environment, see tools/install.sh
#
# A training that was stopped goes on from its newest checkpoint. Options given now do not change a link that is finished:
# another RUN_DIR trains anew.

set -euo pipefail
CALLED_FROM="$PWD"
. "$(dirname "${BASH_SOURCE[0]}")/../tools/install.sh"
cd "$ROOT"

RUN_DIR="${RUN_DIR:-runs/quickstart}"
if [ "$RUN_DIR" != runs/quickstart ]; then
    case "$RUN_DIR" in
        /*) ;;
        *) RUN_DIR="$CALLED_FROM/$RUN_DIR" ;;
    esac
fi
CONFIGS=examples/quickstart
DONE="$RUN_DIR/.finished"

# link NAME COMMAND...: one link of the chain, with its time; not run again once it, and all before it, have ended well
# with these inputs.
INPUTS=""
link() {
    local name="$1" started=$SECONDS status=0
    shift
    INPUTS="$(printf '%s\n' "$INPUTS" "$@" | cat - "$CONFIGS"/*.yaml | cksum)"
    if [ "$(cat "$DONE/$name" 2>/dev/null)" = "$INPUTS" ]; then
        echo "== $name: finished before"
        return
    fi
    echo "== $name"
    [ "$1" = train ] || echo "   $*"
    "$@" || status=$?
    [ "$status" -eq 0 ] ||
        fail "$name ended with status $status after $((SECONDS - started)) s; its last lines above say why, and the same command goes on from here" "$status"
    echo "$INPUTS" >"$DONE/$name"
    echo "== $name: $((SECONDS - started)) s"
}

# train CONFIG [OPTION...]: one training under the deepspeed launcher, on a port of its own.
train() {
    local config="$1" port
    shift
    port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    echo "   deepspeed --num_accelerators $RANKS --module megatron_gemini.train --config $config $*"
    python -m deepspeed.launcher.runner --log_level error --num_accelerators "$RANKS" --master_port "$port" \
        --module megatron_gemini.train --config "$config" "$@"
}

# config NAME: the example's file; for another RUN_DIR a copy in it that names it.
config() {
    if [ "$RUN_DIR" = runs/quickstart ]; then
        echo "$CONFIGS/$1.yaml"
    else
        sed "s#runs/quickstart#${RUN_DIR//#/\\#}#g" "$CONFIGS/$1.yaml" >"$RUN_DIR/$1.yaml"
        echo "$RUN_DIR/$1.yaml"
    fi
}

default_ranks() {
    if has_gpu && [ "$(nvidia-smi -L | grep -c '^GPU')" -eq 1 ]; then echo 1; else echo 2; fi
}

echo "== install: into $VENV, if needed"
install
use_environment
mkdir -p "$DONE" || fail "cannot write into $RUN_DIR; choose another folder with RUN_DIR=..."

RANKS="${RANKS:-$(default_ranks)}"
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"

link digits python tools/build_digits.py --out "$RUN_DIR/data"
link speech python tools/build_speech.py --out "$RUN_DIR/data"
link text python tools/train_sentencepiece.py --shards "$RUN_DIR/data/train/*.tar" --out "$RUN_DIR/data/text.model"
link image_tokenizer train "$(config image_tokenizer)"
link image_codes python tools/encode_images.py --checkpoint "$RUN_DIR/image_tokenizer" --shards "$RUN_DIR/data/*/*.tar"
link pretrain train "$(config pretrain)" "$@"
# Says all that `megatron-gemini evaluate` says with these options, and judges the digits of the same drawings.
link evaluate python "$CONFIGS/judge_digits.py" --checkpoint "$RUN_DIR" --disjoint sklearn_index voice

shown="$(printf %q "$RUN_DIR")" # as a shell would need it
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at
    $shown/report.json   what it can do, on validation data
    $shown/samples.png   what it draws, sees and hears
    $shown/loss.png      how it learned
and ask it something:
    source .venv/bin/activate
    megatron-gemini generate --checkpoint $shown "draw a seven" --out seven.png
    megatron-gemini generate --checkpoint $shown --image seven.png "what is this?"
    megatron-gemini generate --checkpoint $shown "draw a three" --seed 1 --out three.png
END
