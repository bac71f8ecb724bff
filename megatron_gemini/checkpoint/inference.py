"""A checkpoint as a model that answers: one process, weights only, no DeepSpeed.

Everything is read as safetensors, YAML, JSON or SentencePiece; nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_gemini.checkpoint.directory import resolve, verify
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.config.load import read_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.layers import Layers
from megatron_gemini.parallel.topology import Topology

SHOWN = 3  # mismatches that a message names


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
    layout = TokenLayout(text_tokenizer.size, config.image_tokenizer.codes)
    model = Gemini(config, layout, Layers(Topology.serial()))
    fill(model, PieceReader(directory), directory)
    return Loaded(config, model.eval(), layout, text_tokenizer, _image_tokenizer(directory), directory)


@torch.no_grad()
def fill(module: nn.Module, reader: PieceReader, directory: Path) -> None:
    """Copies every parameter in from the checkpoint, one at a time.

    Raises ValueError that names the first parameters that only one side has, or that differ in shape, with both.
    """
    wanted = dict(module.named_parameters())
    wrong = [f"{name} is not in the checkpoint" for name in wanted if name not in reader.names()]
    wrong += [f"{name} is not in the model" for name in reader.names() if name not in wanted]
    for name in wanted.keys() & set(reader.names()):
        ours, theirs = tuple(wanted[name].shape), reader.shape(name)
        if ours != theirs:
            wrong.append(f"{name} is {theirs} in the checkpoint and {ours} in the model of its config.yaml")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{directory} does not fit its own config.yaml: {'; '.join(sorted(wrong)[:SHOWN])}{more}")
    for name, tensor in reader.weights():
        wanted[name].copy_(tensor)
