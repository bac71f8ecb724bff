"""Engines with several roles on the two ranks of one launch; writes what came of them.

    torchrun --nproc-per-node 2 -m tests.distributed.role_cases OUT

OUT/tiny: a small language model that prefers what its reference does not, beside a value model with a loss of its own.
OUT/pipeline...: the multimodal model with a frozen reference that is divided as the policy is. Gradients and weights
are written as pieces, in the format of checkpoints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from megatron_gemini.checkpoint.fragments import describe
from megatron_gemini.checkpoint.init_from import initialize
from megatron_gemini.checkpoint.load import load
from megatron_gemini.checkpoint.piece import WEIGHT
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.save import save
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch
from megatron_gemini.engine import engine as engine_module
from megatron_gemini.engine.distributed import choose_device, end_process, join, leave
from megatron_gemini.engine.engine import Engine, WholeModelEngine
from megatron_gemini.engine.multimodal import MultimodalEngine
from megatron_gemini.engine.roles import RoleSpec
from megatron_gemini.models.stage import DecoderStage, StageInput, parts
from megatron_gemini.parallel.parameters import new_parameter, normal
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.training.quiet import quiet_warnings
from tests.distributed.rows import LAYOUT, loss_of, rows, step_rows, total_weight, with_layout
from tests.distributed.train_layouts import topology_of

V, D, T, ROWS, STEPS, LR = 11, 8, 6, 4, 3, 1e-2
TINY = with_layout(zero_stage=1)
PIPELINES = {
    "pipeline": {"pipeline": 2, "zero_stage": 1},
    "pipeline, breadth first": {"pipeline": 2, "zero_stage": 2, "virtual_stages": 2, "schedule": "breadth_first"},
    "tensor": {"tensor": 2, "zero_stage": 1},
}


class Row(NamedTuple):
    """token_T, target_T: int64 [T]. reference_T: float32 [T], the reference's log-probabilities of the targets."""

    token_T: torch.Tensor
    target_T: torch.Tensor
    reference_T: torch.Tensor | None = None


class Loss(NamedTuple):
    loss: torch.Tensor


class Words(nn.Module):
    """Log-probabilities [T] of a row's targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = new_parameter(V, D, init=normal(0.5))
        self.hidden = new_parameter(D, D, init=normal(0.5))
        self.out = new_parameter(V, D, init=normal(0.5))

    def forward(self, row: Row) -> torch.Tensor:
        h_TD = F.gelu(F.embedding(row.token_T, self.embedding) @ self.hidden)
        return -F.cross_entropy(h_TD @ self.out.T, row.target_T, reduction="none")


class Policy(Words):
    """-log sigmoid(log p - log p of the reference), summed over the tokens."""

    def forward(self, row: Row) -> Loss:
        return Loss(-F.logsigmoid(super().forward(row) - row.reference_T).sum())


class Value(nn.Module):
    """A number for each token; its loss is the square of the distance to the target's id."""

    def __init__(self, size: int = V) -> None:
        super().__init__()
        self.of_token = new_parameter(size, 1, init=normal(0.5))

    def forward(self, row: Row | Batch) -> Loss:
        return Loss((F.embedding(row.token_T, self.of_token)[:, 0] - row.target_T).square().sum())


class Score(Value):
    """The same of the multimodal model's rows."""

    def forward(self, row: StageInput) -> Loss:
        return super().forward(row.batch)


def tiny_rows(step: int) -> list[Row]:
    """Of a global step."""
    random = torch.Generator().manual_seed(step)
    return [Row(*torch.randint(V, (2, T), generator=random).unbind()) for _ in range(ROWS)]


def write(engine: Engine, directory: Path, what: str) -> None:
    """Of every role, and of the policy: what: "gradient" or "weight"."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors, pieces = {}, []
    parts = [("", part) for part in engine.parts]
    parts += [(role.spec.name, part) for role in engine.roles.values() for part in role.engines]
    for role, part in parts:
        for fragment in part.owned():
            values = fragment.gradient() if what == "gradient" else fragment.master()
            if values is not None:
                piece = describe(fragment, role)
                tensors[f"{WEIGHT}/{piece.name}"] = values.narrow(0, 0, fragment.count).detach().float().clone()
                pieces.append(piece.to_json())
    stem = directory / f"rank-{engine.topology.rank:05d}"
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps({"pieces": pieces}))


def norm_of(engine: Engine, out: Path | None) -> float:
    """Of one step; out: where the gradients go that it is taken of."""
    true_norm = engine_module.global_norm

    def norm(*arguments: object) -> torch.Tensor:
        if out is not None:
            write(engine, out, "gradient")
        return true_norm(*arguments)

    engine_module.global_norm = norm
    try:
        return engine.step(LR).norm
    finally:
        engine_module.global_norm = true_norm


class TinyEngine:
    """The policy at ZeRO-1, its reference at ZeRO-3, a value model at ZeRO-2."""

    def __init__(self, config: RunConfig, *init_from: InitFromConfig, saved: bool = False) -> None:
        topology = topology_of({})
        self.engine = WholeModelEngine(Policy, config, topology, torch.device("cpu"), step=ROWS)
        spec = RoleSpec("reference", lambda number: Words(), zero_stage=3, init_from=init_from, saved=saved)
        self.reference = self.engine.add_role(spec)
        self.value = self.engine.add_role(
            RoleSpec("value", lambda number: Value(), place="last", trained=True, zero_stage=2, lr_scale=0.5)
        )

    def step(self, number: int, out: Path | None = None) -> float:
        """The norm."""
        topology, weight = self.engine.topology, ROWS * T
        mine = tiny_rows(number)[topology.data_rank :: topology.data_size]
        seen = zip(mine, self.reference.forward(mine), strict=True)
        self.engine.forward_backward([row._replace(reference_T=log_p) for row, log_p in seen], weight, lambda _: None)
        self.value.forward_backward(mine, topology.data_size / weight, lambda _: None)
        return norm_of(self.engine, out)


def tiny(out: Path) -> dict[str, object]:
    """Train, save, go on; once more from what was saved; and what a reference of other weights is told."""
    first = TinyEngine(TINY)
    write(first.engine, out / "begin", "weight")
    norms = [first.step(number, out / f"gradients-{number}") for number in range(STEPS)]
    write(first.engine, out / "end", "weight")
    progress = RunState(step=STEPS, optimizer_steps=STEPS)
    saved = save(first.engine, out, progress, {}, keep=1)
    found: dict[str, object] = {"norms": norms, "checkpoint": str(saved), "onward": first.step(STEPS)}
    again = TinyEngine(TINY)
    load(again.engine, saved)
    found["resumed"] = again.step(STEPS)
    another = TinyEngine(TINY, InitFromConfig(str(saved)))
    found["told"] = initialize(another.engine)
    write(another.engine, out / "from a checkpoint", "weight")
    try:
        load(another.engine, saved)
    except ValueError as error:
        found["another reference"] = str(error)
    return found


def multimodal(layout: dict[str, object], out: Path) -> dict[str, object]:
    """Two steps of the multimodal model beside its reference at ZeRO-3, which is saved, and a head at its end."""
    config, topology = with_layout(**layout), topology_of(layout)
    engine = MultimodalEngine(config, LAYOUT, topology, torch.device("cpu"), loss_of(config))
    stages = parts(config, LAYOUT, topology.pipeline_size * topology.virtual_stages)
    reference = engine.add_role(
        RoleSpec(
            "reference",
            lambda number: DecoderStage(config, LAYOUT, LayerFactory(topology), stages[number], loss_of(config)),
            zero_stage=3,
            saved=True,
        )
    )
    score = engine.add_role(RoleSpec("score", lambda number: Score(LAYOUT.size), place="last", trained=True))
    write(engine, out / "begin", "weight")
    losses: list[list[float]] = []

    def prepare(inputs: list[StageInput]) -> None:
        losses.append([float(output.loss) for output in reference.forward(inputs)])
        if torch.is_grad_enabled():
            score.forward_backward(inputs, 1e-3, lambda output: None)

    engine.prepare = prepare
    everything = rows(0)
    policy: list[float] = []
    engine.evaluate(step_rows(everything, topology), lambda output: policy.append(float(output.loss)))
    for _ in range(2):
        engine.forward_backward(step_rows(everything, topology), total_weight(everything), lambda output: None)
        engine.step(1e-3)
    write(engine, out / "end", "weight")
    saved = save(engine, out, RunState(step=2, optimizer_steps=2), {}, keep=1)
    return {
        "reference": losses,
        "policy": policy,
        "checkpoint": str(saved),
        "last": topology.last_stage_here,
        "score": len(score.engines),
    }


def main() -> None:
    out = Path(sys.argv[1])
    quiet_warnings()
    join(choose_device())
    found = {"tiny": tiny(out / "tiny")}
    found |= {name: multimodal(layout, out / name) for name, layout in PIPELINES.items()}
    rank = torch.distributed.get_rank()
    (out / f"found-{rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
    end_process()
