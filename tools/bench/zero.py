"""What ZeRO costs a step: the same training under several ZeRO stages, in turn, as ratios to stage 0.

    python tools/bench/zero.py --config examples/quickstart/pretrain.yaml --ranks 2

Runs the real trainer under the deepspeed launcher, `--rounds` times a stage, interleaved, and compares the seconds of a
step as its metrics.jsonl has them, without the first `WARM` steps of a run. Needs the data that the config names.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

STAGES = {
    "ZeRO-0": ["--engine.zero_stage", "0", "--engine.offload_optimizer", "none"],
    "ZeRO-1": ["--engine.zero_stage", "1", "--engine.offload_optimizer", "none"],
    "ZeRO-3": ["--engine.zero_stage", "3", "--engine.offload_optimizer", "none"],
    "ZeRO-3 offload": ["--engine.zero_stage", "3", "--engine.offload_optimizer", "cpu"],
}
WARM = 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run configuration whose data exists")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every stage (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.steps <= WARM:
        parser.error(f"--steps is {options.steps}; the first {WARM} are not counted, so give more")
    seconds: dict[str, list[float]] = {name: [] for name in STAGES}
    for number in range(options.rounds):
        for name, arguments in STAGES.items():
            steps = run(options.config, options.ranks, options.steps, arguments)
            seconds[name] += steps
            print(f"round {number + 1}, {name}: median step {statistics.median(steps) * 1e3:.1f} ms", flush=True)
    base = seconds["ZeRO-0"]
    for name, found in seconds.items():
        medians, minima = statistics.median(found) / statistics.median(base), min(found) / min(base)
        print(f"{name:<15} {medians:.2f} x ZeRO-0 by medians, {minima:.2f} x by minima")
    return 0


def run(config: str, ranks: int, steps: int, arguments: list[str]) -> list[float]:
    """Seconds of the steps of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        command += ["--master_port", str(port), "--module", "megatron_gemini.train", "--config", config, *arguments]
        command += ["--train.steps", str(steps), "--train.output_dir", folder, "--schedule.warmup_steps", "1"]
        command += ["--train.validation_every", "0", "--train.save_every", "0", "--logging.tensorboard", "False"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [record["step_seconds"] for record in records[WARM:]]


if __name__ == "__main__":
    sys.exit(main())
