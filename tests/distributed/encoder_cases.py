"""One rank of the encoders' test: several layouts, one after the other, each trained for some steps.

    torchrun --nproc-per-node N -m tests.distributed.encoder_cases OUT CASE...

The decoder is stood in for by a function of each token's embedding, its place and its row, so that a wrong place, row
or gradient shows. Every rank writes what it saw of each step to OUT/CASE-RANK.safetensors. It knows nothing of the
oracle.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_gemini.config.encoders import EncoderEnginesConfig
from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch
from megatron_gemini.engine.batch_exchange import BatchExchange
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.distributed import choose_device, end_process, join, leave
from megatron_gemini.engine.encoder_engine import EncoderEngine
from megatron_gemini.engine.encoder_engines import EncoderEngines, groups_of_world
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.norm import global_norm
from megatron_gemini.engine.synchronize import StepFingerprint, preflight, synchronize_step
from megatron_gemini.models.encoding_plan import check_media
from megatron_gemini.models.placement import Embeddings, place
from megatron_gemini.parallel.context.positions import stream_positions
from megatron_gemini.parallel.encoders.assignment import rank_at
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training.quiet import quiet_warnings
from tests.distributed.process_groups import groups_left_at_the_end
from tests.distributed.rows import CONFIG, LAYOUT, T, rows, step_rows, with_frozen
from tests.distributed.train_layouts import topology_of

STEPS, ROWS, LR = 3, 4, 1e-2
PLAIN = {
    "parallel": {},
    "zero": 1,
    "own": -1,
    "offload": "none",
    "precision": "fp32",
    "recompute": True,
    "chunk": 20,
    "frozen": (),
    "frozen_connectors": (),
    "lr_scales": (),
}
CASES = {
    "1": {
        "zero-3": {"zero": 3, "offload": "cpu"},
        "zero-0": {"zero": 0, "recompute": False},
        "zero-1": {"offload": "cpu"},
        "zero-2": {"zero": 2, "recompute": False},
    },
    "2": {
        "zero-0": {"zero": 0},
        "zero-1-offload": {"offload": "cpu"},
        "zero-1-kept": {"recompute": False, "offload": "cpu"},
        "zero-2-kept": {"zero": 2, "recompute": False},
        "zero-2-offload": {"zero": 2, "offload": "cpu"},
        "zero-3": {"zero": 3},
        "zero-1-of-3": {"zero": 3, "offload": "cpu", "own": 1},
        "zero-3-of-0": {"own": 3, "zero": 0},
        "zero-3-kept": {"zero": 3, "recompute": False},
        "zero-3-offload": {"zero": 3, "offload": "cpu"},
        "one-forward": {"zero": 3, "chunk": 4096},
        "bf16-zero-1": {"precision": "bf16", "parallel": {"tensor": 2}},
        "bf16-zero-3": {"zero": 3, "offload": "cpu", "precision": "bf16", "frozen": ("audio",)},
        "frozen-vision": {"zero": 3, "frozen": ("vision",)},
        "frozen-audio": {"frozen": ("audio",)},
        "all-frozen": {"zero": 3, "frozen": ("vision", "audio"), "frozen_connectors": ("vision", "audio")},
        "frozen-encoders": {"zero": 3, "frozen": ("vision", "audio"), "recompute": False},
        "frozen-connectors": {"zero": 3, "offload": "cpu", "frozen_connectors": ("vision", "audio")},
        "mixed": {"zero": 2, "frozen": ("audio",), "frozen_connectors": ("vision",)},
        "lr-scales": {"zero": 3, "lr_scales": (("encoders.vision", 0.5), ("connectors.audio", 2.0))},
        "lr-scales-zero-1": {"offload": "cpu", "lr_scales": (("encoders.vision", 0.5), ("connectors.audio", 2.0))},
        "tensor": {"parallel": {"tensor": 2}},
        "pipeline": {"parallel": {"pipeline": 2}},
        "context": {"parallel": {"context": 2}},
    },
    "4": {
        "data": {},
        "data-zero-3": {"zero": 3},
        "tensor": {"parallel": {"tensor": 2}, "zero": 3},
        "sequence": {"parallel": {"tensor": 2, "sequence": True}},
        "pipeline": {"parallel": {"pipeline": 4}, "zero": 3, "offload": "cpu"},
        "context": {"parallel": {"context": 2}},
        "tensor-pipeline": {"parallel": {"tensor": 2, "pipeline": 2}},
        "sequence-context": {"parallel": {"tensor": 2, "sequence": True, "context": 2}, "zero": 3},
    },
}


def case_config(ranks: str, name: str) -> RunConfig:
    case = PLAIN | CASES[ranks][name]
    config = dataclasses.replace(
        CONFIG,
        parallel=ParallelConfig(**case["parallel"]),
        engine=dataclasses.replace(
            CONFIG.engine,
            zero_stage=case["zero"],
            offload_optimizer=case["offload"],
            precision=case["precision"],
        ),
        encoder_engines=EncoderEnginesConfig(
            zero_stage=case["own"], recompute=case["recompute"], chunk_tokens=case["chunk"]
        ),
    )
    encoders = with_frozen(case["frozen"], case["frozen_connectors"])
    for beginning, scale in case["lr_scales"]:
        kind, name = beginning.split(".")
        of_connector = dataclasses.replace(encoders[name].connector, lr_scale=scale)
        change = {"lr_scale": scale} if kind == "encoders" else {"connector": of_connector}
        encoders[name] = dataclasses.replace(encoders[name], **change)
    return dataclasses.replace(config, encoders=encoders)


def rows_of(step: int) -> list[Batch]:
    """The rows of a global step: the last row but one has text only, and in step 1 nobody has sound."""
    first, second = rows(step), rows(step + 100)
    return [first[0], first[3], first[1], first[2]] if step != 1 else [first[2], second[2], first[1], second[1]]


def pretend_loss(embeddings: Embeddings | None, row: int, positions: torch.Tensor) -> torch.Tensor:
    """Stands in for the decoder. row: in the global step; positions: of the row's tokens in this rank's stream."""
    random = torch.Generator().manual_seed(row)
    turn, weight = (torch.randn(T, CONFIG.model.width, generator=random) for _ in range(2))
    h_SD = torch.zeros(len(positions), CONFIG.model.width)  # float32, which `place` leads bf16 embeddings to
    if embeddings is not None:
        h_SD = place(h_SD, embeddings)
    return ((h_SD + turn[positions]).tanh() * weight[positions]).sum() / 50


def train(config: RunConfig, topology: Topology) -> dict[str, torch.Tensor]:
    device = torch.device("cpu")
    encoder_engines = EncoderEngines(config, topology, device, {})
    found: dict[str, torch.Tensor] = {}
    positions = stream_positions(T, topology)
    for step in range(STEPS):
        mine = step_rows(rows_of(step), topology)
        for batch in mine.rows:
            check_media(batch, LAYOUT, config)
        given = encoder_engines.forward(mine)
        assert topology.pipeline_rank == 0 or all(each.stream is None for each in given)
        if topology.pipeline_rank == 0:
            for place, embeddings in enumerate(each.stream for each in given):
                number = place * topology.data_size + topology.data_rank
                if embeddings is not None:
                    found[f"{step}/embeddings/{number}"] = embeddings.e_OD.detach().clone()
                    found[f"{step}/positions/{number}"] = positions[embeddings.position_O]
                loss = pretend_loss(embeddings, number, positions) * topology.shard_size
                if loss.requires_grad:
                    loss.backward()
        encoder_engines.backward()
        for part in encoder_engines.parts:
            part.wait()
        pieces = [piece for part in encoder_engines.parts for piece in part.owned()]
        for piece in pieces:
            gradient = piece.gradient()
            assert gradient is not None, f"{piece.name} has no gradient in step {step}"
            found[f"gradients{step}/{piece.start}/{piece.name}"] = gradient[: piece.count].clone()
        norm = global_norm(pieces, device)
        for part in encoder_engines.parts:
            part.step(LR, norm)
        found[f"{step}/norm"] = norm
        found[f"{step}/balance"] = torch.tensor(encoder_engines.balance)
    for part in [*encoder_engines.parts, *encoder_engines.frozen]:
        for fragment in part.owned():
            found[f"weights/{fragment.start}/{fragment.name}"] = fragment.master().detach().clone().contiguous()
    return found


def gradients_with_dummies(ranks: str, name: str) -> dict[str, torch.Tensor]:
    """The vision encoder's gradients of one forward, by itself and after the backwards of two dummies."""
    config = case_config(ranks, name)
    media, found = rows(0)[2].media["vision"], {}
    for forwards in (1, 3):
        encoder = EncoderEngine(
            config, "vision", EngineGroups(), deepspeed_config(config, ROWS, 1), torch.device("cpu")
        )
        (e_OD,) = encoder.forward([media], forwards, training=True)
        encoder.backward([torch.randn(e_OD.shape, generator=torch.Generator().manual_seed(1))])
        for piece in encoder.engine.fragments:
            found[f"{forwards}/{piece.name}"] = piece.gradient()[: piece.count].clone()
    return found


def gathers(topology: Topology) -> dict[str, torch.Tensor]:
    """How often a rank asks for weights under ZeRO-3, in the forward and the backward of 2 and of 4 chunks."""
    found = {}
    for forwards in (2, 4):
        config = case_config("2", "zero-3")
        settings = deepspeed_config(config, ROWS, 1)
        encoder = EncoderEngine(config, "vision", groups_of_world(topology), settings, torch.device("cpu"))
        count = 0

        def counting(gather):
            def gather_and_count(*arguments, **named):
                nonlocal count
                count += 1
                return gather(*arguments, **named)

            return gather_and_count

        for parameter in encoder.engine.module.parameters():
            parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)
        media = [rows(0)[2].media["vision"]] * forwards
        outputs = encoder.forward(media, forwards, training=True)
        forward, count = count, 0
        encoder.backward([torch.ones_like(e_OD) for e_OD in outputs])
        found |= {f"forward/{forwards}": torch.tensor(forward), f"backward/{forwards}": torch.tensor(count)}
    return found


def disagreements(topology: Topology) -> dict[str, str]:
    """What each rank is told where the last but one would run something else, and where it would not."""
    odd, rank = topology.world - 2, topology.rank
    usual = StepFingerprint(step=1, microbatches=4, row_tokens=T, encoders=("vision", "audio"), rows=topology.data_rank)
    cases: dict[str, dict[str, object]] = {
        "microbatches": {"microbatches": 3},
        "encoders": {"encoders": ("vision",)},
        "rows": {"rows": 77},
        "nothing": {},
    }
    found = {}
    for name, fields in cases.items():
        fingerprint = dataclasses.replace(usual, **fields) if rank == odd else usual
        try:
            found[name] = str(synchronize_step(1.0, 0, fingerprint, topology, torch.device("cpu")))
        except ValueError as error:
            found[name] = str(error)
    problem = "sample x cannot be read" if rank == odd else ""
    try:
        synchronize_step(1.0, 0, usual, topology, torch.device("cpu"), problem)
    except ValueError as error:
        found["problem"] = str(error)
    setups = {"settings": (7, int(rank == odd)), "shards": (7 + (rank == odd), 7), "same setup": (7, 7)}
    for name, (shards, settings) in setups.items():
        try:
            found[name] = str(preflight(settings, shards, topology, torch.device("cpu")))
        except ValueError as error:
            found[name] = str(error)
    return found


def missing_rows(topology: Topology) -> list[int]:
    """The readers of a step whose row 2 its reader could not read."""
    everything = rows_of(0)
    read = {number: row for number, row in enumerate(everything) if number % topology.world == topology.rank}
    read.pop(2, None)
    shared = BatchExchange(topology, torch.device("cpu")).share(read, len(everything))
    assert len(shared.rows) == ROWS // topology.data_size - (topology.data_rank == 2 % topology.data_size)
    return shared.readers


def one_case(ranks: str, name: str, out: Path) -> None:
    config = case_config(ranks, name)
    topology = topology_of(CASES[ranks][name].get("parallel", {}))
    here = (topology.pipeline_rank, topology.data_rank, topology.context_rank, topology.tensor_rank)
    assert rank_at(topology, *here) == topology.rank
    stem = out / f"{name}-{topology.rank}"
    save_file(train(config, topology), stem.with_suffix(".safetensors"))
    if ranks == "4":
        told = {**disagreements(topology), "readers": missing_rows(topology)}
        stem.with_suffix(".json").write_text(json.dumps(told))
    if ranks == "1":
        save_file(gradients_with_dummies(ranks, name), f"{stem}-dummies.safetensors")


def main() -> None:
    out, *names = sys.argv[1:]
    quiet_warnings()
    device = choose_device()
    join(device)
    ranks = str(torch.distributed.get_world_size())
    for name in names:
        with groups_left_at_the_end():
            one_case(ranks, name, Path(out))
    if ranks == "2":
        topology = topology_of({})
        save_file(gathers(topology), Path(out) / f"gathers-{topology.rank}.safetensors")
    leave()


if __name__ == "__main__":
    main()
    end_process()
