"""Pretraining: next-token loss over text and image codes on packed multimodal rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_gemini.checkpoint.image_tokenizer import image_tokenizer_path
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import MODALITIES, Batch, TokenLayout
from megatron_gemini.data.loader import Loader
from megatron_gemini.engine.engine import Engine
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.gemini import Gemini, LossOutput
from megatron_gemini.parallel.layers import Layers
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training.loop import Task, mean

COUNTS = ("tokens", "filled", "documents", "vision_items", "audio_items")


class Pretraining(Task):
    """The decoder and its encoders, trained jointly."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        super().__init__(config, topology, device)
        self.tokenizer = TextTokenizer(config.data.text_model)
        self.layout = TokenLayout(self.tokenizer.size, config.image_tokenizer.codes)
        self.loader = Loader(config, topology.data_rank, topology.data_size, self.layout, self.tokenizer)
        self.engine = Engine(
            lambda: Gemini(config, self.layout, Layers(topology)), config, topology, device, config.train.rows_per_step
        )

    def next_batches(self) -> list[Batch]:
        return self.loader.next()

    def weight(self, batches: list[Batch]) -> float:
        return sum(float(batch.weight_T.sum()) for batch in batches)

    def to_device(self, batches: list[Batch]) -> list[Batch]:
        return [batch.to(self.device) for batch in batches]

    def sums(self, outputs: list[LossOutput], batches: list[Batch]) -> dict[str, float]:
        sums: dict[str, float] = dict.fromkeys(COUNTS, 0.0)
        nll = torch.stack([output.nll_by_modality for output in outputs]).double().sum(0).tolist()
        weight = torch.stack([output.weight_by_modality for output in outputs]).double().sum(0).tolist()
        for index, name in enumerate(MODALITIES):
            sums[f"nll_{name}"], sums[f"weight_{name}"] = nll[index], weight[index]
        for batch in batches:
            sums["tokens"] += batch.token_T.numel()
            sums["filled"] += int((batch.segment_T > 0).sum())
            sums["documents"] += len(batch.samples)
            for name, media in batch.media.items():
                sums[f"{name}_items"] += media.items
        return sums

    def record(self, sums: dict[str, float]) -> dict[str, float]:
        weights = [sums[f"weight_{name}"] for name in MODALITIES]
        losses = [sums[f"nll_{name}"] for name in MODALITIES]
        record = {"loss": mean(sum(losses), sum(weights)), **{name: sums[name] for name in COUNTS}}
        for name, loss, weight in zip(MODALITIES, losses, weights, strict=True):
            record[f"loss_{name}"] = mean(loss, weight)
            record[f"share_{name}"] = mean(weight, sum(weights))
        record["fill"] = mean(sums["filled"], sums["tokens"])
        return record

    def data_state(self) -> dict[str, Any]:
        return self.loader.state()

    def load_data_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)

    def held_out(self) -> dict[str, float]:
        if not self.config.data.held_out:
            return {}
        outputs: list[LossOutput] = []
        batches = self.to_device(self.loader.held_out())
        self.engine.evaluate(batches, outputs.append)
        sums = self.sums(outputs, batches)
        totals = self.record(dict(zip(sums, self.engine.sum_over_data(list(sums.values())), strict=True)))
        return {f"held_out_{key}": totals[key] for key in ("loss", "loss_text", "loss_image")}

    def assets(self) -> dict[str, Path | str]:
        assets: dict[str, Path | str] = {"text.model": Path(self.config.data.text_model)}
        if self.config.train.image_tokenizer:
            assets["image_tokenizer"] = image_tokenizer_path(Path(self.config.train.image_tokenizer))
        return assets

    def close(self) -> None:
        self.loader.close()
