"""Counts ZeRO-3's gathers of weights in one step, for several schedules and numbers of microbatches, as JSON.

torchrun --nproc-per-node 4 -m tests.distributed.gather_counts OUT.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_gemini.engine.distributed import choose_device, end_process, join, leave
from megatron_gemini.engine.multimodal import MultimodalEngine
from megatron_gemini.training.quiet import quiet_warnings
from tests.distributed.process_groups import groups_left_at_the_end
from tests.distributed.rows import LAYOUT, loss_of, rows, step_rows, total_weight, with_layout
from tests.distributed.train_layouts import topology_of

CASES = [
    {"pipeline": 2, "zero_stage": 3, "schedule": schedule, "virtual_stages": virtual, "few_live": few_live}
    for schedule, virtual, few_live in (
        ("1f1b", 1, True),
        ("1f1b", 1, False),
        ("breadth_first", 1, True),
        ("breadth_first", 2, True),
    )
]


@groups_left_at_the_end()
def gathers(layout: dict, microbatches: int, device: Any) -> int:
    """Gathers of this rank in a step's pipeline, after two steps in which DeepSpeed learns the order of modules."""
    from deepspeed.runtime.zero import partition_parameters

    topology, counts = topology_of(layout), Counter[int]()
    config = with_layout(**layout)
    train = dataclasses.replace(config.train, rows_per_step=microbatches * topology.data_size)
    config = dataclasses.replace(config, train=train)
    engine = MultimodalEngine(config, LAYOUT, topology, device, loss_of(config))
    true_gather = partition_parameters._dist_allgather_fn
    true_run = engine.pipeline.run
    step = 0

    def gather(*arguments: Any, **named: Any) -> Any:
        counts[step] += 1
        return true_gather(*arguments, **named)

    def run(*arguments: Any) -> None:  # the encoders, which do not belong to the pipeline, are not counted
        partition_parameters._dist_allgather_fn = gather
        try:
            true_run(*arguments)
        finally:
            partition_parameters._dist_allgather_fn = true_gather

    engine.pipeline.run = run
    for step in range(3):
        everything = [*rows(2 * step), *rows(2 * step + 1)][: train.rows_per_step]
        mine = step_rows(everything, topology)
        engine.forward_backward(mine, total_weight(everything), lambda output: None)
        engine.step(1e-3)
    return counts[step]


def main() -> None:
    quiet_warnings()
    device = choose_device()
    join(device)
    found = [{"layout": layout} | {str(m): gathers(layout, m, device) for m in (4, 8)} for layout in CASES]
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
    end_process()
