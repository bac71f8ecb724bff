"""Objectives on packed rows of documents: reading, exchange and figures, all but the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_gemini.checkpoint.inference import load_image_tokenizer, save_weights
from megatron_gemini.checkpoint.save import Asset
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.contracts import StepRows, TokenLayout
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
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.encoding_plan import check_media
from megatron_gemini.models.flops import model_flops_per_token, utilization
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import LossOutput, StageLoss
from megatron_gemini.objectives.base import Objective, mean
from megatron_gemini.objectives.codes import check_codes
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
        self.layout = TokenLayout(self.tokenizer.size, code_ranges(config))
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
        check_codes(self.loader, self.image_tokenizer)
        # Before the engine, whose building is collective: ranks with other settings would wait for each other there.
        seen = [(source.label, len(source), source.shards.paths) for source in self.loader.sources]
        preflight(self.digest, shards_digest(seen), topology, device)
        self.exchange = BatchExchange(topology, device)
        self.engine = MultimodalEngine(config, self.layout, topology, device, self.stage_loss())

    def stage_loss(self) -> StageLoss:
        """The loss of the last stage: the next token's, by default. Its `sums` are figures that are added up."""
        return self.next_token_loss(z_loss=0.0)

    def next_token_loss(self, z_loss: float) -> NextTokenLoss:
        """`models.heads.NextTokenLoss` of this run's vocabulary and schedule."""
        # Breadth-first, many rows wait for their backward, and each would hold a gradient of the head's size. The price
        # is a fourth product: 1.17 of torch's time on a CPU, against 0.86 (docs/performance.md).
        deferred = self.config.parallel.schedule == "breadth_first"
        return NextTokenLoss(len(self.layout.targets), z_loss, deferred)

    def loss_names(self) -> list[str]:
        """Names of the figures that `loss_sums` gives, in order; the same on every rank."""
        return [f"{what}_{target}" for what in ("nll", "weight") for target in self.layout.targets]

    def loss_sums(self, outputs: Sequence[LossOutput]) -> list[float]:
        """The figures of the outputs of this rank, added up; zeros if there are none."""
        # A rank without the loss, such as one of an earlier pipeline stage, adds as many zeros: the sum is collective.
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
        # The section decides how many codes the vocabulary and a drawing have: another tokenizer could not draw them.
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
        # Behind the exchange, on rows that several ranks have: a wrong one is reported by all that would train on it.
        try:
            for batch in step.rows:
                check_media(batch, self.layout, self.config)
        except ValueError as error:
            problem = problem or str(error)  # what could not be read is the cause; the rows are short because of it
        return step, problem

    def weight(self, step: StepRows) -> float:
        return sum(float(batch.weight_T.sum()) for batch in step.rows)

    def fingerprint(self, number: int, step: StepRows) -> StepFingerprint:
        return step_fingerprint(number, step.rows, self.config, self.digest)

    def sums(self, outputs: Sequence[LossOutput], step: StepRows) -> dict[str, float]:
        mine = outputs if self.topology.tensor_rank == 0 else ()  # the others have the same losses
        sums = dict(zip(self.loss_names(), self.loss_sums(mine), strict=True))
        counts: dict[str, float] = {f"tokens_{kind}": n for kind, n in count_tokens(step.rows, self.layout).items()}
        counts["row_tokens"] = sum(batch.token_T.numel() for batch in step.rows)
        counts["targets"] = sum(int((batch.weight_T > 0).sum()) for batch in step.rows)
        counts["documents"] = sum(len(batch.samples) for batch in step.rows)
        counts |= mixture_of(step.rows, self.labels)
        # Position p of a document sees p + 1 keys. A span sees more, so that FLOPs from this are a lower bound.
        counts["visible_keys"] = sum(float((batch.position_T + 1)[batch.segment_T > 0].sum()) for batch in step.rows)
        # All ranks of a data-parallel rank know these figures; one of them counts them.
        return sums | (counts if self.topology.counts_row_once else dict.fromkeys(counts, 0.0))

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
        topology, given = self.topology, (self.layout, self.tokenizer, self.form)
        # A loader of its own each time, which begins at the same rows.
        with Loader.validation(self.config, topology.rank, topology.world, *given) as loader:
            step, problem = self._shared(loader, self.config.train.validation_rows)
            try:
                check_codes(loader, self.image_tokenizer)
            except ValueError as error:
                problem = problem or str(error)
        # No collective begins a validation, so what one rank found wrong with its rows is told here.
        raise_together(problem, topology, self.device)
        outputs: list[LossOutput] = []
        self.engine.evaluate(step, outputs.append)
        sums = self.sums(outputs, step)
        totals = dict(zip(sums, self.engine.total(list(sums.values())), strict=True))
        return {f"validation_{name}": value for name, value in self.loss_record(totals).items()}

    def backends(self) -> list[str]:
        chosen = {"attention": attention_backend(self.device), "loss": loss_backend(self.device)}
        return [*(f"{what}: {name} ({why})" for what, (name, why) in chosen.items()), *super().backends()]

    def assets(self) -> dict[str, Asset]:
        # So that a checkpoint generates, and draws, without the files that the run was given.
        assets: dict[str, Asset] = {"text.model": Path(self.config.data.text_model)}
        tokenizer, config = self.image_tokenizer, self.config
        if tokenizer is not None:
            assets["image_tokenizer"] = lambda target: save_weights(tokenizer, config, target)
        return assets

    def close(self) -> None:
        self.loader.close()
