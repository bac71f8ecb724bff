"""Training of the image code tokenizer: images in, the same images out, through a row of discrete codes.

Shape suffixes: B images, S pixels of a side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.engine.engine import WholeModelEngine
from megatron_gemini.engine.synchronize import StepFingerprint, config_digest, preflight, raise_together, shards_digest
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer, TokenizerLoss, decibels
from megatron_gemini.objectives.base import Objective, mean
from megatron_gemini.objectives.image_tokenizer.images import ImageLoader
from megatron_gemini.parallel.topology import Topology

if TYPE_CHECKING:  # the spec, which is there without torch, imports this file when a run is built
    from megatron_gemini.objectives.image_tokenizer.spec import ImageTokenizerObjectiveConfig

PARTS = ("loss", "l2", "logit_laplace", "quantization", "perplexity")


class ImageTokenizerTraining(Objective[list[torch.Tensor], TokenizerLoss]):
    """Every rank takes its share of `objective.images_per_step` images as one microbatch."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        super().__init__(config, topology, device)
        if topology.tensor_size > 1:
            raise ValueError(
                f"parallel.tensor is {topology.tensor_size}; the image tokenizer is trained data parallel, set it to 1"
            )
        self.digest = config_digest(config)
        section = cast("ImageTokenizerObjectiveConfig", config.objective)
        self.loader = ImageLoader(config, section.images_per_step, topology.data_rank, topology.data_size)
        # Before the engine, whose building is collective: ranks with other settings would wait for each other there.
        preflight(self.digest, shards_digest(self.loader.seen()), topology, device)
        self.engine = WholeModelEngine(
            lambda: SummedLoss(ImageTokenizer(config.image_tokenizer, topology.data_group)),
            config,
            topology,
            device,
            topology.data_size,
        )

    def read(self) -> tuple[list[torch.Tensor], str]:
        return _read(self.loader.next)

    def weight(self, step: list[torch.Tensor]) -> float:
        return float(sum(len(images) for images in step))

    def fingerprint(self, number: int, step: list[torch.Tensor]) -> StepFingerprint:
        # Without a digest of rows: every rank has other images, so there is nothing to compare.
        return StepFingerprint(number, len(step), config=self.digest)

    def to_device(self, step: list[torch.Tensor]) -> list[torch.Tensor]:
        return [images.to(self.device, self.engine.dtype, non_blocking=True) for images in step]

    def sums(self, outputs: Sequence[TokenizerLoss], step: list[torch.Tensor]) -> dict[str, float]:
        sums = dict.fromkeys((*PARTS, "images"), 0.0)
        for output, images in zip(outputs, step, strict=True):
            sums["loss"] += float(output.loss.detach())
            sums["images"] += len(images)
            # The engine has made the loss a sum over images; the parts are still means over this rank's.
            for part in PARTS[1:]:
                sums[part] += float(getattr(output, part).detach()) * len(images)
        return sums

    def record(self, sums: Mapping[str, float]) -> dict[str, float]:
        record = {part: mean(sums[part], sums["images"]) for part in PARTS}
        # The codes of an image stand for the tokens of a row, so that rates and totals mean the same of every run.
        record["tokens"] = int(sums["images"]) * self.config.image_tokenizer.codes_per_image
        return record

    def data_state(self) -> dict[str, Plain]:
        return self.loader.state()

    def load_data_state(self, state: Mapping[str, Plain]) -> None:
        self.loader.load_state(state)

    def skipped(self) -> Counter[tuple[str, str]]:
        return Counter({("images", reason): count for reason, count in self.loader.skipped.items()})

    def validation(self) -> dict[str, float]:
        if not self.config.data.validation:
            return {}
        outputs: list[TokenizerLoss] = []
        read, problem = _read(self.loader.validation)
        raise_together(problem, self.topology, self.device)  # no collective begins a validation
        batches = self.to_device(read)
        self.engine.evaluate(batches, outputs.append)
        sums = self.sums(outputs, batches)
        # The mean of the ranks' decibels would be those of no image.
        pairs = zip(outputs, batches, strict=True)
        sums["errors"] = sum(float((o.reconstruction - b).double().square().sum()) for o, b in pairs)
        sums["values"] = sum(batch.numel() for batch in batches)
        totals = dict(zip(sums, self.engine.total(list(sums.values())), strict=True))
        quality = decibels(mean(totals["errors"], totals["values"]))
        return {"validation_loss": self.record(totals)["loss"], "validation_psnr": quality}


def _read(images: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], str]:
    """(the images as one microbatch, why there are none)."""
    try:
        return [images()], ""
    except ValueError as error:
        return [], str(error)


class SummedLoss(nn.Module):
    """The tokenizer with its loss as a sum over images, which is what an engine divides by the global batch.

    Its parameters keep the tokenizer's own names, so that a checkpoint is one of the tokenizer.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        for name, child in tokenizer.named_children():
            self.add_module(name, child)
        self.whole = (tokenizer,)  # in a tuple: as a module it would give every parameter a second name

    def forward(self, images_BSS3: torch.Tensor) -> TokenizerLoss:
        output = self.whole[0](images_BSS3)
        return output._replace(loss=output.loss * len(images_BSS3))
