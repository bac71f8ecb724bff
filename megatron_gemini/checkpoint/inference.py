"""A checkpoint as a model that answers: one process, weights only, no DeepSpeed.

Everything is read as safetensors, YAML, JSON or SentencePiece; nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from megatron_gemini.checkpoint.directory import resolve, verify
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.config.load import dump_config, read_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

SHOWN = 3  # mismatches that a message names
WEIGHTS = "model.safetensors"  # whole weights by name, for inference only


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, on the CPU, in float32 and eval mode.

    image_tokenizer: None for a model that draws no images.
    directory: the step directory that was read.
    """

    config: RunConfig
    model: Gemini
    layout: TokenLayout
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer | None
    directory: Path


def load_for_inference(path: str | Path) -> Loaded:
    """The model of a step directory or of a run directory (its newest complete checkpoint).

    Raises ValueError, in one line, for a path without a complete checkpoint, a file whose hash differs from the
    index, a configuration that does not fit, or parameters of other names or shapes than the configuration's.
    """
    directory = resolve(Path(path))
    verify(directory)
    config = read_config(directory / "config.yaml")
    text_tokenizer = TextTokenizer(directory / "text.model")
    layout = TokenLayout(text_tokenizer.size, code_ranges(config))
    model = Gemini(config, layout, LayerFactory(Topology.serial()))
    fill(model, PieceReader(directory), directory)
    tokenizer = load_image_tokenizer(directory / "image_tokenizer") if config.image_tokenizer.codes else None
    if tokenizer is not None and tokenizer.config.codes != config.image_tokenizer.codes:
        raise ValueError(
            f"{directory}: the image tokenizer has {tokenizer.config.codes} codes, the model {config.image_tokenizer.codes}"
        )
    return Loaded(config, model.eval(), layout, text_tokenizer, tokenizer, directory)


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The image tokenizer, in eval mode.

    path: what `save_weights` wrote, a run or step directory of the tokenizer's own training, or one of a model that
    carries its tokenizer. Raises ValueError as `load_for_inference`.
    """
    directory, reader = _tokenizer_reader(Path(path))
    tokenizer = ImageTokenizer(read_config(directory / "config.yaml").image_tokenizer)
    fill(tokenizer, reader, directory)
    return tokenizer.eval()


def _tokenizer_reader(path: Path) -> tuple[Path, WeightReader]:
    if (path / WEIGHTS).is_file():
        return path, WholeReader(path / WEIGHTS)
    step = resolve(path)
    verify(step)
    carried = step / "image_tokenizer"
    if (carried / WEIGHTS).is_file():
        return carried, WholeReader(carried / WEIGHTS)
    return step, PieceReader(step)


def save_weights(module: nn.Module, config: RunConfig, directory: Path) -> None:
    """Writes whole float32 weights and the configuration: all that inference needs, and nothing of the optimizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in module.named_parameters()}
    save_file(tensors, directory / WEIGHTS)
    (directory / "config.yaml").write_text(dump_config(config))


class WeightReader(Protocol):
    """Whole parameters by name."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class WholeReader:
    """Parameters of one safetensors file. Raises ValueError that names the file where it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def names(self) -> list[str]:
        return sorted(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.names():
            yield name, self._file.get_tensor(name)


@torch.no_grad()
def fill(module: nn.Module, reader: WeightReader, directory: Path) -> None:
    """Copies every parameter in from the checkpoint, one at a time.

    Raises ValueError that names the first parameters that only one side has, or that differ in shape, with both.
    """
    wanted, there = dict(module.named_parameters()), set(reader.names())
    wrong = [f"{name} is not in the checkpoint" for name in wanted.keys() - there]
    wrong += [f"{name} is not in the model" for name in there - wanted.keys()]
    for name in wanted.keys() & there:
        ours, theirs = tuple(wanted[name].shape), reader.shape(name)
        if ours != theirs:
            wrong.append(f"{name} is {theirs} in the checkpoint and {ours} in the model of its config.yaml")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{directory} does not fit its own config.yaml: {'; '.join(sorted(wrong)[:SHOWN])}{more}")
    for name, tensor in reader.weights():
        wanted[name].copy_(tensor)
