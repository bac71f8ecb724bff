"""A complete checkpoint of a tiny random model, for tests of what reads checkpoints."""

import json
from pathlib import Path

import sentencepiece
from safetensors.torch import save_file
from torch import nn

from megatron_gemini.checkpoint.directory import step_directory
from megatron_gemini.checkpoint.extensions import Extensions
from megatron_gemini.checkpoint.index import seal
from megatron_gemini.checkpoint.inference import save_weights
from megatron_gemini.checkpoint.piece import Piece
from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.load import dump_config
from megatron_gemini.config.model import ImageTokenizerConfig, ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

CONFIG = RunConfig(
    model=ModelConfig(width=32, layers=1, heads=2, head_width=16, mlp_width=64),
    encoders={
        "vision": VisionConfig(width=16, layers=1, heads=2, mlp_width=32),
        "audio": AudioConfig(width=16, layers=1, heads=2, mlp_width=32, mels=16),
    },
    image_tokenizer=ImageTokenizerConfig(image_size=8, width=16, layers=1, heads=2, mlp_width=32, codes=12),
)


def train_text_model(path: Path) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "draw", "what is this"]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(words * 20),
            model_writer=file,
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )


def write_pieces(module: nn.Module, directory: Path) -> None:
    """The weights as a single rank writes them."""
    tensors, pieces = {}, []
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        tensors[f"weight/{name}"] = parameter.detach().flatten().clone()
        pieces.append(Piece(name, 0, parameter.numel(), shape, None, 0, shape).to_json())
    save_file(tensors, directory / "rank-00000.safetensors")
    (directory / "rank-00000.json").write_text(json.dumps({"pieces": pieces, "data": {}}))


def write_checkpoint(run: Path, step: int, seed: int, config: RunConfig = CONFIG, draws: bool = True) -> Gemini:
    """A complete checkpoint of a random model; returns the model. draws: with its image tokenizer."""
    directory = step_directory(run, step)
    directory.mkdir(parents=True)
    train_text_model(directory / "text.model")
    size = sentencepiece.SentencePieceProcessor(str(directory / "text.model")).GetPieceSize()
    model = Gemini(
        config, TokenLayout(size, (("image", config.image_tokenizer.codes),)), LayerFactory(Topology.serial())
    )
    initialize(model, seed)
    write_pieces(model, directory)
    if draws:
        tokenizer = ImageTokenizer(config.image_tokenizer)
        initialize(tokenizer, seed)
        save_weights(tokenizer, config, directory / "image_tokenizer")
    (directory / "config.yaml").write_text(dump_config(config))
    Extensions.of(config).write(directory)
    seal(directory, serial=step)
    (directory.parent / "latest").write_text(directory.name + "\n")
    return model
