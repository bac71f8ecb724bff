"""Trains the small model under several layouts on the ranks of one launch, and writes what came of it.

    torchrun --nproc-per-node 4 -m tests.distributed.train_layouts OUT.json '[{"tensor": 2, "zero_stage": 3}, ...]'
    [FROM]

OUT.json has a result a layout. Beside it lie, for every layout and step, the gradients of the whole model before
clipping as pieces, in the format of checkpoints. FROM is a checkpoint of any layout, from which every layout also
goes on.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_gemini.checkpoint.fragments import describe
from megatron_gemini.checkpoint.init_from import initialize
from megatron_gemini.checkpoint.load import load
from megatron_gemini.checkpoint.piece import WEIGHT
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.save import save
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.engine import engine as engine_module
from megatron_gemini.engine.distributed import choose_device, end_process, join, leave
from megatron_gemini.engine.multimodal import MultimodalEngine
from megatron_gemini.models.stage import LossOutput
from megatron_gemini.parallel.topology import Topology, build_topology
from megatron_gemini.training.quiet import quiet_warnings
from tests.distributed.layout_roles import add_roles, train_roles
from tests.distributed.process_groups import groups_left_at_the_end
from tests.distributed.rows import LAYOUT, loss_of, rows, step_rows, total_weight, with_layout

STEPS = 6
MORE = 2
NOT_PLAIN = {"tied", "frozen", "frozen_connectors", "toy_connectors", "roles"}
"""Of a layout that trains another model than the plain one."""


def topology_of(layout: dict) -> Topology:
    """The topology of a layout, also after another one in the same process."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return build_topology(with_layout(**layout).parallel, "gloo")


def on_disk(layout: dict, out: Path) -> dict:
    """The layout with a place for what it keeps on disk."""
    return layout | {"nvme_path": str(out / "nvme")} if "nvme" in layout.values() else layout


def keep_gradients(engine: MultimodalEngine, directory: Path) -> None:
    """Write the gradients that the norm of this step is taken of."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = [("", part) for part in engine.parts]
    parts += [(role.spec.name, part) for role in engine.roles.values() for part in role.trained]
    owned = [(describe(fragment, role), fragment) for role, part in parts for fragment in part.owned()]
    stem = directory / f"rank-{engine.topology.rank:05d}"
    tensors = {f"{WEIGHT}/{p.name}": f.gradient().narrow(0, 0, f.count).float().clone() for p, f in owned}
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps({"pieces": [piece.to_json() for piece, _ in owned]}))


def train(engine: MultimodalEngine, first: int, last: int, keep: Path | None = None) -> list[list[float]]:
    """[loss, global norm] of steps first to last - 1. keep: where the gradients go."""
    topology, curve = engine.topology, []
    true_norm = engine_module.global_norm
    for step in range(first, last):
        everything = rows(step, engine.config.encoders)
        mine = step_rows(everything, topology)
        losses: list[float] = []
        weight = total_weight(everything)

        def collect(output: LossOutput, to: list[float] = losses) -> None:
            to.append(float(output.loss.detach()))

        if engine.roles:
            train_roles(engine, weight, collect)
        engine.forward_backward(mine, weight, collect)

        def norm(*arguments: Any, step: int = step) -> torch.Tensor:
            if keep is not None:
                keep_gradients(engine, keep / f"gradients-{step}")
            return true_norm(*arguments)

        engine_module.global_norm = norm
        result = engine.step(engine.config.optimizer.lr)
        engine_module.global_norm = true_norm
        curve.append([engine.total([sum(losses) if topology.tensor_rank == 0 else 0.0])[0] / weight, result.norm])
    return curve


def begins(layout: dict) -> bool:
    """Whether a run of the layout also begins by `init_from`. Not all do: the groups of every engine leave threads that
    poll, which slow down the layouts that follow."""
    if {"tied", "toy_connectors", "roles", "recompute"} & set(layout):
        return False
    return "frozen" in layout or (layout["zero_stage"] == 3 and layout.get("tensor") == layout.get("pipeline") == 2)


def one_layout(layout: dict, out: Path, elsewhere: Path | None, device: torch.device) -> dict[str, Any]:
    """Train, save, go on; once more from what was saved; and from `elsewhere`, its state and its weights alone."""
    config, topology = with_layout(**on_disk(layout, out)), topology_of(on_disk(layout, out))

    def build() -> MultimodalEngine:
        engine = MultimodalEngine(config, LAYOUT, topology, device, loss_of(config))
        if "roles" in layout:
            add_roles(engine, config)
        return engine

    @groups_left_at_the_end()  # those of four engines at once would be hundreds of threads
    def resumed(checkpoint: Path) -> list[list[float]]:
        again = build()
        load(again, checkpoint)
        return train(again, STEPS, STEPS + MORE)

    @groups_left_at_the_end()
    def begun(checkpoint: Path) -> list[list[float]]:
        nonlocal config
        config = dataclasses.replace(config, init_from=(InitFromConfig(str(checkpoint)),))
        engine = build()
        initialize(engine)
        return train(engine, STEPS, STEPS + 1)

    with groups_left_at_the_end():
        engine = build()
        curve = train(engine, 0, STEPS, out)
        progress = RunState(step=STEPS, optimizer_steps=STEPS)
        path = save(engine, out, progress, {}, keep=1)
        result = {"curve": curve, "onward": train(engine, STEPS, STEPS + MORE), "checkpoint": str(path)}
        del engine
    result["resumed"] = resumed(path)
    if elsewhere is not None and not NOT_PLAIN & set(layout):
        result["moved"] = resumed(elsewhere)
    if elsewhere is not None and begins(layout):
        result["begun"] = begun(elsewhere)
    return result


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    elsewhere = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    quiet_warnings()
    device = choose_device()
    join(device)
    results = []
    for number, layout in enumerate(layouts):
        try:
            with groups_left_at_the_end():
                results.append(one_layout(layout, out.parent / f"{out.stem}-{number}", elsewhere, device))
        except Exception:
            print(f"the layout was {layout}", file=sys.stderr)
            traceback.print_exc()
            sys.exit(1)
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
    end_process()
