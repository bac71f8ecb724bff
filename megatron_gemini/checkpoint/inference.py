"""A checkpoint as a model that answers: one process, weights only, no DeepSpeed.

Everything is read as safetensors, YAML, JSON or SentencePiece; nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_gemini.checkpoint.directory import read_newest, resolve, verify
from megatron_gemini.checkpoint.extensions import Extensions, read_checkpoint_config
from megatron_gemini.checkpoint.tensor_file import Outgoing, write_tensors
from megatron_gemini.checkpoint.weights import WEIGHTS, WeightReader, find_weights, open_weights, verify_weights
from megatron_gemini.config.load import dump_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

SHOWN = 3  # mismatches that a message names


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, on the CPU, in float32 and eval mode.

    image_tokenizer: None for a model that cannot draw: without image codes, or without the tokenizer of its codes.
    tokenizer_config: of its own training.
    directory: the step directory that was read; a run that goes on may have deleted it by now.
    """

    config: RunConfig
    model: Gemini
    layout: TokenLayout
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer | None
    tokenizer_config: RunConfig | None
    directory: Path


def load_for_inference(path: str | Path) -> Loaded:
    """The model of a step directory or of a run directory (its newest complete checkpoint).

    Raises ValueError, in one line, for

    - a path without a complete checkpoint, or a file whose hash differs from the index;
    - a plugin that is not loaded, or a control token that stands for something else now;
    - a configuration that does not fit, or parameters of other names or shapes than the configuration's.
    """
    return read_newest(Path(path), resolve, _load)


def _load(directory: Path) -> Loaded:
    verify(directory)
    config = read_checkpoint_config(directory)
    text_tokenizer = TextTokenizer(directory / "text.model")
    layout = TokenLayout(text_tokenizer.size, code_ranges(config))
    model = Gemini(config, layout, LayerFactory(Topology.serial()))
    fill(model, open_weights(directory), directory)
    # A run that was not given the tokenizer of its codes, such as one on texts alone, has none in its checkpoints. One
    # that was lost is in the index, and was missed above.
    carried = directory / "image_tokenizer"
    tokenizer = _fill_image_tokenizer(carried) if config.image_tokenizer.codes and carried.is_dir() else None
    tokenizer_config = read_checkpoint_config(carried) if carried.is_dir() else None
    # Two files say how many codes there are. Only a tokenizer that was put in later makes them differ.
    if tokenizer is not None and tokenizer.config.codes != config.image_tokenizer.codes:
        raise ValueError(
            f"{directory}: the image tokenizer has {tokenizer.config.codes} codes, "
            f"the model {config.image_tokenizer.codes}"
        )
    return Loaded(config, model.eval(), layout, text_tokenizer, tokenizer, tokenizer_config, directory)


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The image tokenizer, in eval mode.

    path: what `save_weights` wrote, a run or step directory of the tokenizer's own training, or one of a model that
    carries its tokenizer. Raises ValueError as `load_for_inference`.
    """
    return read_newest(Path(path), find_weights, _load_image_tokenizer)


def _load_image_tokenizer(directory: Path) -> ImageTokenizer:
    verify_weights(directory)
    carried = directory / "image_tokenizer"
    return _fill_image_tokenizer(carried if carried.is_dir() else directory)


def _fill_image_tokenizer(directory: Path) -> ImageTokenizer:
    tokenizer = ImageTokenizer(read_checkpoint_config(directory).image_tokenizer)
    fill(tokenizer, open_weights(directory), directory)
    return tokenizer.eval()


def save_weights(module: nn.Module, config: RunConfig, directory: Path) -> None:
    """Writes whole float32 weights, the configuration and the names in force: all that inference needs."""
    directory.mkdir(parents=True, exist_ok=True)
    named = module.named_parameters()
    tensors = [Outgoing(name, tuple(p.shape), torch.float32, p.detach) for name, p in named]
    write_tensors(directory / WEIGHTS, tensors)
    Extensions.of(config).write(directory)
    (directory / "config.yaml").write_text(dump_config(config))


@torch.no_grad()
def fill(module: nn.Module, reader: WeightReader, directory: Path) -> None:
    """Copies every parameter in from the checkpoint, one at a time.

    Raises ValueError that names the first parameters that only one side has, or that differ in shape, with both.
    """
    wanted, there = dict(module.named_parameters()), set(reader.names())
    # Both ways: a model without a layer that was trained would still answer, and badly.
    wrong = [f"{name} is not in the checkpoint" for name in wanted.keys() - there]
    wrong += [f"{name} is not in the model" for name in there - wanted.keys()]
    for name in wanted.keys() & there:
        ours, theirs = tuple(wanted[name].shape), reader.shape(name)
        if ours != theirs:
            wrong.append(f"{name} is {theirs} in the checkpoint and {ours} in the model of its config.yaml")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{directory} does not fit its own config.yaml: {'; '.join(sorted(wrong)[:SHOWN])}{more}")
    for name, parameter in wanted.items():  # one at a time: the largest is all that memory holds beside the model
        parameter.copy_(reader.weight(name))
