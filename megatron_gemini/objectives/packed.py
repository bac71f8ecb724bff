"""Objectives on packed rows of documents: reading, exchange and figures, all but the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_gemini.checkpoint.inference import load_image_tokenizer, save_weights
from megatron_gemini.checkpoint.training_state import Asset
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.contracts import IMAGE, Batch, StepRows, TokenLayout
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
from megatron_gemini.models.flops import model_flops_per_token, utilization
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import LossOutput, StageLoss
from megatron_gemini.objectives.base import Objective, mean
from megatron_gemini.objectives.figures import MIXTURE, count_tokens, mixture_of, token_kinds, token_shares
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.registry import OBJECTIVES


class PackedObjective(Objective[StepRows, LossOutput]):
    """The decoder with its encoders and connectors, trained on packed rows.

    A subclass says what the loss is (`stage_loss`), and what figures it logs beside those of the rows (`loss_names`,
    `loss_record`).
    """

    engine: MultimodalEngine

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        super().__init__(config, topology, device)
        self.tokenizer = TextTokenizer(config.data.text_model)
        self.layout = TokenLayout(self.tokenizer.size, ((IMAGE, config.image_tokenizer.codes),))
        self.image_tokenizer = self._load_image_tokenizer()
        self.digest = config_digest(config)
        self.labels = source_labels(config.data.sources)
        rows = OBJECTIVES.get(config.objective.kind).rows
        assert rows is not None, config.objective.kind
        self.form = rows(config.objective)
        self.form.check(self.layout)
        self.loader = Loader(
            config, topology.rank, topology.world, self.layout, self.tokenizer, self.form, pin=device.type == "cuda"
        )
        preflight(self.digest, shards_digest(self.loader.sources), topology, device)
        self.exchange = BatchExchange(topology, device)
        self.engine = MultimodalEngine(config, self.layout, topology, device, self.stage_loss())

    def stage_loss(self) -> StageLoss:
        """The loss of the last stage: the next token's, by default. Its `sums` are figures that are added up."""
        return self.next_token_loss(z_loss=0.0)

    def next_token_loss(self, z_loss: float) -> NextTokenLoss:
        """`models.heads.NextTokenLoss` of this run's vocabulary and schedule."""
        deferred = self.config.parallel.schedule == "breadth_first"  # many rows then wait for their backward
        return NextTokenLoss(len(self.layout.targets), z_loss, deferred)

    def loss_names(self) -> list[str]:
        """Names of the figures that `loss_sums` gives, in order; the same on every rank."""
        return [f"{what}_{target}" for what in ("nll", "weight") for target in self.layout.targets]

    def loss_sums(self, outputs: Sequence[LossOutput]) -> list[float]:
        """The figures of the outputs of this rank, added up; zeros if there are none."""
        nothing = torch.zeros(len(self.layout.targets))
        sums = [
            torch.stack([nothing, *(output.sums[what].cpu() for output in outputs)]).double().sum(0)
            for what in ("nll", "weight")
        ]
        return torch.cat(sums).tolist()

    def loss_record(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to log of the loss, from the sums of all ranks; has "loss"."""
        targets = self.layout.targets
        nll, weight = ([sums[f"{what}_{target}"] for target in targets] for what in ("nll", "weight"))
        each = {f"loss_{t}": mean(n, w) for t, n, w in zip(targets, nll, weight, strict=True)}
        return {"loss": mean(sum(nll), sum(weight)), **each}

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

    def sums(self, outputs: Sequence[LossOutput], step: StepRows) -> dict[str, float]:
        mine = outputs if self.topology.tensor_rank == 0 else ()  # the others have the same losses
        sums = dict(zip(self.loss_names(), self.loss_sums(mine), strict=True))
        counts = self._counts(step.rows)
        return sums | (counts if self.topology.counts_row_once else dict.fromkeys(counts, 0.0))

    def _counts(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Figures of the rows, which all ranks that share them know."""
        counts: dict[str, float] = {f"tokens_{kind}": n for kind, n in count_tokens(batches, self.layout).items()}
        counts["row_tokens"] = sum(batch.token_T.numel() for batch in batches)
        counts["targets"] = sum(int((batch.weight_T > 0).sum()) for batch in batches)
        counts["documents"] = sum(len(batch.samples) for batch in batches)
        counts |= mixture_of(batches, self.labels)
        counts["visible_keys"] = sum(float((batch.position_T + 1)[batch.segment_T > 0].sum()) for batch in batches)
        return counts

    def record(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = self.loss_record(sums)
        record = {"loss": loss.pop("loss"), "encoder_balance": self.engine.encoder_engines.balance, **loss}
        record |= token_shares({kind: sums[f"tokens_{kind}"] for kind in token_kinds(self.layout)})
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

    def utilization(self, record: Mapping[str, float], seconds: float) -> dict[str, float]:
        rate = record["tokens"] / seconds
        share = utilization(self.config, record["flops_per_token"], rate, self.topology.world)
        return {} if share is None else {"mfu": share}

    def data_state(self) -> dict[str, Plain]:
        return self.loader.state()

    def load_data_state(self, state: Mapping[str, Plain]) -> None:
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
        totals = dict(zip(sums, self.engine.total(list(sums.values())), strict=True))
        return {f"validation_{name}": value for name, value in self.loss_record(totals).items()}

    def _validation_rows(self) -> StepRows:
        topology, given = self.topology, (self.layout, self.tokenizer, self.form)
        with Loader.validation(self.config, topology.rank, topology.world, *given) as loader:
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
