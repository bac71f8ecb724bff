"""Trains the small model under several layouts on the ranks of one launch, and prints every curve as JSON.

    torchrun --nproc-per-node 2 -m tests.distributed.train_layouts OUT.json '[{"tensor": 2, "zero": 3}, ...]' [FROM]

All layouts of a launch have the same tensor size, since a process has one topology. FROM is a checkpoint of any layout,
from which every layout of the launch also goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_gemini.checkpoint import training_state
from megatron_gemini.engine.distributed import choose_device, join, leave
from megatron_gemini.engine.engine import Engine
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.layers import Layers
from megatron_gemini.parallel.topology import Topology, build_topology
from megatron_gemini.training.quiet import quiet_warnings
from tests.distributed.rows import LAYOUT, ROWS, rows, total_weight, with_layout

STEPS = 6


def build_engine(layout: dict, topology: Topology, device: torch.device) -> Engine:
    config = with_layout(**layout)
    return Engine(lambda: Gemini(config, LAYOUT, Layers(topology)), config, topology, device, ROWS)


def train(engine: Engine, first: int, last: int) -> list[list[float]]:
    """[loss, global norm] of steps first to last - 1."""
    topology, curve = engine.topology, []
    share = ROWS // topology.data_size
    for step in range(first, last):
        everything = rows(step)
        mine = everything[topology.data_rank * share : (topology.data_rank + 1) * share]
        losses: list[float] = []
        weight = total_weight(everything)
        engine.forward_backward(mine, weight, lambda output, to=losses: to.append(float(output.loss.detach())))
        result = engine.step(1e-2)
        curve.append([engine.sum_over_data([sum(losses)])[0] / weight, result.norm])
    return curve


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    elsewhere = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    quiet_warnings()
    device = choose_device()
    join(device)
    topology = build_topology(with_layout(**layouts[0]).parallel, "gloo")
    results = []
    for number, layout in enumerate(layouts):
        engine = build_engine(layout, topology, device)
        curve = train(engine, 0, STEPS)
        progress = training_state.Progress(step=STEPS, optimizer_steps=STEPS)
        path = training_state.save(engine, out.parent / f"{out.stem}-{number}", progress, {}, keep=1)
        onward = train(engine, STEPS, STEPS + 2)
        again = build_engine(layout, topology, device)
        training_state.load(again, path)
        moved = None
        if elsewhere is not None:
            other = build_engine(layout, topology, device)
            training_state.load(other, elsewhere)
            moved = train(other, STEPS, STEPS + 2)
        results.append(
            {
                "layout": layout,
                "curve": curve,
                "onward": onward,
                "resumed": train(again, STEPS, STEPS + 2),
                "checkpoint": str(path),
                "moved": moved,
            }
        )
    if topology.rank == 0:
        out.write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
