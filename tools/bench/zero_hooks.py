"""What DeepSpeed's ZeRO-3 takes of the host for each module with parameters, forward or backward.

    python tools/bench/zero_hooks.py [--rounds 20]

One process, so that nothing is gathered from anyone: a decoder of many tiny layers under ZeRO-0, ZeRO-3, and ZeRO-3
that keeps its weights gathered through a step, by turns. The difference in CPU time to ZeRO-0, divided
by its modules and by two passes. `planning.hardware.HOOK` and `KEPT` are these figures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.engine import EngineConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.distributed import choose_device, end_process, join, leave
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import DecoderStage, StageInput
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training.quiet import quiet_warnings

TOKENS, LAYOUT = 16, TokenLayout(64)
MICROBATCHES = 4
MODEL = ModelConfig(width=64, layers=32, heads=4, kv_heads=1, head_width=16, mlp_width=128)


def engine_of(stage: int) -> ZeroEngine:
    """Under ZeRO-3 with its weights offloaded, since one rank that has them whole would run without the hooks."""
    offload: dict[str, Any] = {"offload_optimizer": "cpu", "offload_parameters": "cpu"} if stage else {}
    config = RunConfig(
        model=MODEL,
        data=DataConfig(row_tokens=TOKENS),
        engine=EngineConfig(**{"zero_stage": stage, "offload_optimizer": "none", "adam": "torch", **offload}),
    )
    return ZeroEngine(
        lambda: DecoderStage(config, LAYOUT, LayerFactory(Topology.serial()), loss=NextTokenLoss(len(LAYOUT.targets))),
        config,
        EngineGroups(),
        deepspeed_config(config, microbatches=2, ranks=1),
        torch.device("cpu"),
    )


def row() -> StageInput:
    """One document."""
    ids, ones = torch.arange(TOKENS), torch.ones(TOKENS, dtype=torch.int32)
    zeros = torch.zeros(TOKENS, dtype=torch.int8)
    return StageInput(Batch(ids, ids, torch.ones(TOKENS), ids, ones, ones * 0, zeros))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each (default: %(default)s)")
    options = parser.parse_args(argv)
    quiet_warnings()
    join(choose_device())
    engines, sample = {"ZeRO-0": engine_of(0), "hooks": engine_of(3), "kept": engine_of(3)}, row()
    engines["kept"].keeps = True
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(options.rounds + 3):
        for name, engine in engines.items():
            started = time.process_time()
            with engine.kept():
                for _ in range(MICROBATCHES):
                    engine.backward(engine.forward(row=sample).loss, boundary=False)
            if number >= 3:  # the first ones record the order of modules
                seconds[name].append((time.process_time() - started) / MICROBATCHES)
    modules = sum(any(True for _ in m.parameters(recurse=False)) for m in engines["ZeRO-0"].module.modules())
    for what, of in (("median", statistics.median), ("minimum", min)):
        plain = of(seconds["ZeRO-0"])
        each = [f"{name} {(of(seconds[name]) - plain) / modules / 2 * 1e6:.0f} us" for name in ("hooks", "kept")]
        print(f"{what}: ZeRO-0 {plain * 1e3:.1f} ms, {modules} modules, for each and pass {', '.join(each)}")
    leave()
    return 0


if __name__ == "__main__":
    end_process(main())
