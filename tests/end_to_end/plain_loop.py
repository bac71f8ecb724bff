"""A training run as a plain loop: one process, no engine, torch's AdamW. What the real command is compared with.

    python -m tests.end_to_end.plain_loop --config run.yaml

Reads the rows of the run and prints the loss of every step as a JSON list. For the objective of the plugin.
"""

from __future__ import annotations

import json
import sys

import torch

from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, RowFormat, TokenLayout
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.presets import preset
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training.schedule import learning_rate
from tests.extension import plugin  # noqa: F401 - registers
from tests.extension.scored import COLUMNS, ScoredConfig
from tests.extension.scored_training import ScoredLoss


def total_weight(row: Batch, sharpness: float) -> float:
    """The divisor, by documents, in float64: each target counts by its document's score."""
    total = 0.0
    for number, score in enumerate(row.columns["score"].tolist(), start=1):
        inside = row.segment_T == number
        total += float((row.weight_T * row.columns["emphasis"])[inside].double().sum()) * score**sharpness
    return total


def losses(config: RunConfig) -> list[float]:
    assert isinstance(config.objective, ScoredConfig)
    tokenizer = TextTokenizer(config.data.text_model)
    layout = TokenLayout(tokenizer.size, code_ranges(config))
    loss = ScoredLoss(NextTokenLoss(len(layout.targets)), config.objective.sharpness)
    model = Gemini(config, layout, LayerFactory(Topology.serial()), loss)
    initialize(model, config.train.seed)
    optimizer = torch.optim.AdamW(groups(model, config), betas=(config.optimizer.beta1, config.optimizer.beta2))
    found = []
    with Loader(config, 0, 1, layout, tokenizer, RowFormat(columns=COLUMNS)) as loader:
        for step in range(config.train.steps):
            rows = list(loader.next().values())
            weight = sum(total_weight(row, config.objective.sharpness) for row in rows)
            mean = sum(model(row).loss for row in rows) / weight
            optimizer.zero_grad()
            mean.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.engine.gradient_clipping)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.optimizer.lr, config.schedule, config.train.steps)
                group["lr"] *= group["scale"]
            optimizer.step()
            found.append(mean.item())
    return found


def groups(model: Gemini, config: RunConfig) -> list[dict]:
    """Matrices decay, embeddings and vectors do not; an encoder's and a connector's rates are multiples."""
    found = []
    for name, parameter in model.named_parameters():
        room, _, rest = name.partition(".")
        section = config.encoders.get(rest.split(".")[0]) if room in ("encoders", "connectors") else None
        scale = 1.0
        if section is not None:
            scale = section.lr_scale if room == "encoders" else section.connector.lr_scale
        decays = parameter.ndim >= 2 and "embedding" not in name
        decay = config.optimizer.weight_decay if decays else 0.0
        found.append({"params": [parameter], "weight_decay": decay, "eps": config.optimizer.eps, "scale": scale})
    return found


if __name__ == "__main__":
    print(json.dumps(losses(load_config(sys.argv[1:], presets=preset))))
