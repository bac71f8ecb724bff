"""Pretraining: next-token loss over text and image codes on packed multimodal rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_gemini.checkpoint.inference import load_image_tokenizer, save_weights
from megatron_gemini.checkpoint.training_state import Asset
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import MODALITIES, Batch, StepRows, TokenLayout
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.loading.source import source_labels
from megatron_gemini.engine.batch_exchange import BatchExchange
from megatron_gemini.engine.multimodal import MultimodalEngine
from megatron_gemini.engine.synchronize import (
    StepFingerprint,
    config_digest,
    preflight,
    raise_together,
    shards_digest,
    step_fingerprint,
)
from megatron_gemini.kernels.attention.api import attention_backend
from megatron_gemini.kernels.losses.dispatch import loss_backend
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.encoding_plan import check_media
from megatron_gemini.models.flops import model_flops_per_token
from megatron_gemini.models.stage import LossOutput
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training.loop import Task, mean
from megatron_gemini.training.metrics import MIXTURE, TOKEN_KINDS, count_tokens, mixture_of, token_shares
from megatron_gemini.training.throughput import utilization


class Pretraining(Task):
    """The decoder and its encoders, trained jointly."""

    engine: MultimodalEngine

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        super().__init__(config, topology, device)
        self.tokenizer = TextTokenizer(config.data.text_model)
        self.layout = TokenLayout(self.tokenizer.size, config.image_tokenizer.codes)
        self.image_tokenizer = self._load_image_tokenizer()
        self.digest = config_digest(config)
        self.labels = source_labels(config.data.sources)
        self.loader = Loader(
            config, topology.rank, topology.world, self.layout, self.tokenizer, pin=device.type == "cuda"
        )
        preflight(self.digest, shards_digest(self.loader.sources), topology, device)
        self.exchange = BatchExchange(topology, device)
        self.engine = MultimodalEngine(config, self.layout, topology, device)

    def _load_image_tokenizer(self) -> ImageTokenizer | None:
        """The tokenizer whose codes the model learns; it travels with every checkpoint."""
        path, section = self.config.train.image_tokenizer, self.config.image_tokenizer
        if not path or not section.codes:
            return None
        tokenizer = load_image_tokenizer(path)
        if tokenizer.config != section:
            raise ValueError(
                f"train.image_tokenizer {path} was trained as {tokenizer.config}, the image_tokenizer section says "
                f"{section}; make them equal"
            )
        return tokenizer

    def read(self) -> tuple[StepRows, str]:
        return self._shared(self.loader, self.config.train.rows_per_step)

    def _shared(self, loader: Loader, rows: int) -> tuple[StepRows, str]:
        """The loader's next rows where they belong. A rank that cannot read takes part, or the others would wait."""
        problem, read = "", {}
        try:
            read = loader.next()
        except ValueError as error:
            problem = str(error)
        step = self.exchange.share(read, rows)
        try:
            for batch in step.rows:
                check_media(batch, self.layout, self.config)
        except ValueError as error:
            problem = problem or str(error)
        return step, problem

    def weight(self, step: StepRows) -> float:
        return sum(float(batch.weight_T.sum()) for batch in step.rows)

    def fingerprint(self, number: int, step: StepRows) -> StepFingerprint:
        return step_fingerprint(number, step.rows, self.config, self.digest)

    def to_device(self, step: StepRows) -> StepRows:
        return step  # the engine takes to the device what this rank needs of it

    def sums(self, outputs: list[LossOutput], step: StepRows) -> dict[str, float]:
        if self.topology.tensor_rank != 0:  # the same losses as the first one's
            outputs = []
        nothing = torch.zeros(len(MODALITIES))
        nll = torch.stack([nothing, *(output.nll_by_modality.cpu() for output in outputs)]).double().sum(0).tolist()
        weight = (
            torch.stack([nothing, *(output.weight_by_modality.cpu() for output in outputs)]).double().sum(0).tolist()
        )
        sums = {f"nll_{name}": value for name, value in zip(MODALITIES, nll, strict=True)}
        sums |= {f"weight_{name}": value for name, value in zip(MODALITIES, weight, strict=True)}
        counts = self._counts(step.rows)
        return sums | (counts if self.topology.counts_row_once else dict.fromkeys(counts, 0.0))

    def _counts(self, batches: list[Batch]) -> dict[str, float]:
        """Figures of the rows, which all ranks that share them know."""
        counts = dict(zip(TOKEN_KINDS, count_tokens(batches, self.layout).tolist(), strict=True))
        counts["row_tokens"] = sum(batch.token_T.numel() for batch in batches)
        counts["targets"] = sum(int((batch.weight_T > 0).sum()) for batch in batches)
        counts["documents"] = sum(len(batch.samples) for batch in batches)
        counts |= mixture_of(batches, self.labels)
        counts["visible_keys"] = sum(float((batch.position_T + 1)[batch.segment_T > 0].sum()) for batch in batches)
        return counts

    def record(self, sums: dict[str, float]) -> dict[str, float]:
        weights = [sums[f"weight_{name}"] for name in MODALITIES]
        losses = [sums[f"nll_{name}"] for name in MODALITIES]
        record = {"loss": mean(sum(losses), sum(weights)), "encoder_balance": self.engine.encoder_engines.balance}
        for name, loss, weight in zip(MODALITIES, losses, weights, strict=True):
            record[f"loss_{name}"] = mean(loss, weight)
        record |= token_shares(torch.tensor([int(sums[kind]) for kind in TOKEN_KINDS]))
        record["documents"] = int(sums["documents"])
        record |= {name: int(count) for name, count in sums.items() if name.startswith(MIXTURE)}
        record["fill"] = mean(record["tokens"], sums["row_tokens"])
        record["flops_per_token"] = model_flops_per_token(
            self.config.model,
            self.layout.size,
            visible_keys=mean(sums["visible_keys"], record["tokens"]),
            loss_share=mean(sums["targets"], record["tokens"]),
        )
        return record

    def utilization(self, record: dict[str, float], seconds: float) -> dict[str, float]:
        rate = record["tokens"] / seconds
        share = utilization(self.config, record["flops_per_token"], rate, self.topology.world)
        return {} if share is None else {"mfu": share}

    def data_state(self) -> dict[str, Any]:
        return self.loader.state()

    def load_data_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)

    def skipped(self) -> Counter[tuple[str, str]]:
        return self.loader.skipped

    def validation(self) -> dict[str, float]:
        if not self.config.data.validation:
            return {}
        outputs: list[LossOutput] = []
        step = self._validation_rows()
        self.engine.evaluate(step, outputs.append)
        sums = self.sums(outputs, step)
        totals = self.record(dict(zip(sums, self.engine.total(list(sums.values())), strict=True)))
        return {f"validation_{key}": totals[key] for key in ("loss", "loss_text", "loss_image")}

    def _validation_rows(self) -> StepRows:
        topology = self.topology
        with Loader.validation(self.config, topology.rank, topology.world, self.layout, self.tokenizer) as loader:
            step, problem = self._shared(loader, self.config.train.validation_rows)
        raise_together(problem, topology, self.device)
        return step

    def backends(self) -> list[str]:
        chosen = {"attention": attention_backend(self.device), "loss": loss_backend(self.device)}
        return [*(f"{what}: {name} ({why})" for what, (name, why) in chosen.items()), *super().backends()]

    def assets(self) -> dict[str, Asset]:
        assets: dict[str, Asset] = {"text.model": Path(self.config.data.text_model)}
        tokenizer, config = self.image_tokenizer, self.config
        if tokenizer is not None:
            assets["image_tokenizer"] = lambda target: save_weights(tokenizer, config, target)
        return assets

    def close(self) -> None:
        self.loader.close()
