"""Small multimodal rows for layout tests: the same global steps for every layout, made from the step's number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.encoders import AudioConfig, EncoderConfig, EncoderEnginesConfig, VisionConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.model import ImageTokenizerConfig, ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.training import OptimizerConfig, TrainConfig
from megatron_gemini.contracts import Batch, RowFormat, StepRows, TokenLayout
from megatron_gemini.data.packing.pack import pack
from megatron_gemini.data.samples.document import Document, build_document
from megatron_gemini.data.samples.items import Codes, Text
from megatron_gemini.engine.batch_exchange import BatchExchange
from megatron_gemini.modalities.audio.item import Audio
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.modalities.video.item import Video
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.objectives.pretrain.spec import PretrainConfig
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.registry import CONNECTORS
from tests.extension.halving import HALVING, HalvingConfig
from tests.extension.reading import READING, ReadingConfig

ROWS, T = 8, 96
LAYOUT = TokenLayout(24, (("image", 9),))  # 49 ids: tensor ranks must pad
CONFIG = RunConfig(
    model=ModelConfig(width=32, layers=4, heads=4, kv_heads=1, head_width=8, mlp_width=48),
    encoders={
        "vision": VisionConfig(width=16, layers=1, heads=2, mlp_width=24, patch=4, max_side=16, max_frames=2),
        "audio": AudioConfig(width=16, layers=1, heads=2, mlp_width=24, mels=16, max_seconds=1.0),
    },
    image_tokenizer=ImageTokenizerConfig(codes=9),
    data=DataConfig(row_tokens=T),
    optimizer=OptimizerConfig(lr=1e-3, eps=1e-4),
    objective=PretrainConfig(weights={"text": 1.0, "image": 0.5}, z_loss=1e-3),
    train=TrainConfig(rows_per_step=ROWS, seed=3),
    engine=EngineConfig(zero_stage=0, offload_optimizer="none", gradient_clipping=0.5),
    encoder_engines=EncoderEnginesConfig(chunk_tokens=24),  # more than one chunk an encoder
)


FORM = RowFormat(target_weights={"text": 1.0, "image": 0.5})


class Letters:
    """A text tokenizer of single letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % LAYOUT.text_size for letter in text]


def with_layout(**layout: Any) -> RunConfig:
    """CONFIG with settings of `parallel` and `engine` by name, and tied, frozen (encoders), frozen_connectors,
    toy_connectors (see `with_toys`), encoder_engines_zero. few_live: no engine keeps its weights gathered through a
    step, however small it is, as those of a large model. roles are none of it."""
    given = dict(layout)
    if given.pop("few_live", False):
        given["deepspeed_config"] = str(Path(__file__).with_name("few_live.json"))
    given.pop("roles", None)  # `layout_roles` makes them, and no setting
    tied, frozen = given.pop("tied", True), given.pop("frozen", "")
    sizes = {"mlp_width": given.pop("mlp_width", CONFIG.model.mlp_width)}
    encoder_engines = dataclasses.replace(CONFIG.encoder_engines, zero_stage=given.pop("encoder_engines_zero", -1))
    encoders = with_frozen(frozen.split(), given.pop("frozen_connectors", "").split())
    encoders = with_toys(encoders) if given.pop("toy_connectors", False) else encoders
    parallel = {f.name for f in dataclasses.fields(ParallelConfig)}
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, tie_embeddings=tied, **sizes),
        encoders=encoders,
        encoder_engines=encoder_engines,
        parallel=ParallelConfig(**{key: value for key, value in given.items() if key in parallel}),
        engine=dataclasses.replace(CONFIG.engine, **{k: v for k, v in given.items() if k not in parallel}),
    )


def with_frozen(encoders: Sequence[str], connectors: Sequence[str]) -> dict[str, EncoderConfig]:
    """The encoders' settings, with some of them and some of their connectors not trained."""
    found = {}
    for name, section in CONFIG.encoders.items():
        connector = dataclasses.replace(section.connector, frozen=name in connectors)
        found[name] = dataclasses.replace(section, frozen=name in encoders, connector=connector)
    return found


def with_toys(encoders: Mapping[str, EncoderConfig]) -> dict[str, EncoderConfig]:
    """Layers read what the vision encoder gives as a memory, and the audio encoder's embeddings are halved."""
    for name, spec in {"reading": READING, "halving": HALVING}.items():
        if name not in CONNECTORS:
            CONNECTORS.register(name, spec)
    chosen = {"vision": ReadingConfig(), "audio": HalvingConfig()}
    return {name: dataclasses.replace(section, connector=chosen[name]) for name, section in encoders.items()}


def loss_of(config: RunConfig) -> NextTokenLoss:
    """The loss of the last stage, as the pretraining objective makes it."""
    return NextTokenLoss(len(LAYOUT.targets), z_loss=1e-3, deferred=config.parallel.schedule == "breadth_first")


def rows(step: int, encoders: Mapping[str, EncoderConfig] = CONFIG.encoders) -> list[Batch]:
    """The ROWS rows of a global step. Row 1 has text only, and every row another number of targets."""
    random = np.random.default_rng(step)
    return [pack(_documents(random, row, encoders), T, FORM) for row in range(ROWS)]


def step_rows(everything: list[Batch], topology: Topology) -> StepRows:
    """What a rank has of a global step, each of whose rows another rank has read than the one that trains on it."""
    world = topology.world
    read = {number: row for number, row in enumerate(everything) if (3 * number + 1) % world == topology.rank}
    return BatchExchange(topology, torch.device("cpu")).share(read, len(everything))


def _documents(random: np.random.Generator, row: int, encoders: Mapping[str, EncoderConfig]) -> list[Document]:
    words = "".join(random.choice(list("abcdefgh"), size=3 + row))
    documents = [([Text(words)], [Text(words[::-1])])]
    if row != 1:
        picture = Image(random.integers(0, 256, (8, 12, 3), dtype=np.uint8))
        clip = Video(random.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8), 0.25)
        sound = Audio(random.standard_normal(6400).astype(np.float32) * 0.1)
        codes = Codes("image", tuple(int(code) for code in random.integers(0, 9, 4)))
        documents += [([picture, Text("a")], [Text(words)]), ([Text("b")], [codes])]
        documents += [([clip], [Text("c")])] if row % 3 == 2 else [([sound], [codes])]
    return [
        build_document(
            prompt,
            answer,
            layout=LAYOUT,
            text_tokenizer=Letters(),
            encoders=encoders,
            key=f"{row}/{number}",
        )
        for number, (prompt, answer) in enumerate(documents)
    ]


def total_weight(step_rows: list[Batch]) -> float:
    return float(torch.stack([row.weight_T.sum() for row in step_rows]).sum())
