"""Tiny records, and a tiny model that learns of them in this process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.training import TrainConfig
from megatron_gemini.contracts import Batch, RowFormat, TokenLayout
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from tools import train_sentencepiece


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_records(path: Path, records: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_pictures(folder: Path, count: int = 8) -> None:
    for number in range(count):
        Image.new("RGB", (64, 64), (30 * number, 100, 200)).save(folder / f"{number}.jpg")


def configure(folder: Path, shards: str, task: str = "chat", workers: int = 0) -> RunConfig:
    """A run on one set of shards, and its text model in the folder, trained by the tool."""
    model = folder / "text.model"
    settings = {"text_model": str(model), "sources": [{"task": task, "shards": shards}]}
    (folder / "run.yaml").write_text(json.dumps({"data": settings}))
    assert train_sentencepiece.main(["--config", str(folder / "run.yaml")]) == 0
    return RunConfig(
        model=ModelConfig(width=32, layers=1, heads=2, kv_heads=1, head_width=16, mlp_width=64),
        encoders={
            "vision": VisionConfig(width=32, layers=1, heads=2, mlp_width=64, patch=16, max_side=64),
            "audio": AudioConfig(enabled=False),
        },
        data=DataConfig(
            sources=(SourceConfig(shards=shards, task=task),),
            text_model=str(model),
            row_tokens=256,
            lanes=2,
            workers=workers,
        ),
        train=TrainConfig(rows_per_step=1, output_dir=str(folder / "run")),
    )


def learn(config: RunConfig, steps: int = 8) -> tuple[list[Batch], list[float], Counter[tuple[str, str]]]:
    """Rows of so many steps, the loss of each, and what was skipped, by (source, reason)."""
    tokenizer = TextTokenizer(config.data.text_model)
    layout = TokenLayout(tokenizer.size, (("image", 8),))
    model = Gemini(config, layout, LayerFactory(Topology.serial()), NextTokenLoss(len(layout.targets), 0.0))
    initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, losses = [], []
    with Loader(config, 0, 1, layout, tokenizer, RowFormat(target_weights={"text": 1.0, "image": 1.0})) as loader:
        for _ in range(steps):
            (row,) = loader.next().values()
            loss = model(row).loss / row.weight_T.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows.append(row)
            losses.append(float(loss.detach()))
        return rows, losses, loader.skipped


def texts_of(row: Batch, config: RunConfig) -> list[str]:
    """The text pieces of every document of a row."""
    tokenizer = TextTokenizer(config.data.text_model)
    documents = [row.token_T[row.segment_T == number].tolist() for number in range(1, len(row.samples) + 1)]
    return [tokenizer.decode([token for token in tokens if token < tokenizer.size]) for tokens in documents]
