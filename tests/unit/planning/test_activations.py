"""Bytes of activations by formula against the tensors that autograd really saves, without parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.model import ImageTokenizerConfig, ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.connectors.linear.spec import LINEAR, LinearConnectorConfig
from megatron_gemini.contracts import Batch, Media, TokenLayout
from megatron_gemini.modalities.audio.encoder import AudioEncoder
from megatron_gemini.modalities.audio.spec import AUDIO_ENCODER
from megatron_gemini.modalities.image.encoder import VisionEncoder
from megatron_gemini.modalities.image.spec import VISION
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import DecoderStage, StageInput
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.planning.activations import (
    RowShare,
    layer_recomputed,
    layer_saved,
    loss_saved,
)

T = 256
LAYOUT = TokenLayout(200, (("image", 40),))
MODELS = {
    "multi-query": ModelConfig(width=64, layers=3, heads=4, kv_heads=1, head_width=16, mlp_width=192),
    "grouped, no norm of heads": ModelConfig(
        width=48, layers=2, heads=8, kv_heads=2, head_width=16, mlp_width=96, qk_norm=False, tie_embeddings=False
    ),
    "wide heads": ModelConfig(width=64, layers=2, heads=4, kv_heads=4, head_width=32, mlp_width=320),
}


def row(lengths: Sequence[int]) -> Batch:
    """Documents of these lengths, which fill a row; every token has a target."""
    assert sum(lengths) == T
    segment = torch.cat([torch.full((n,), i + 1, dtype=torch.int32) for i, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) for n in lengths])
    ids = torch.arange(T) % LAYOUT.size
    zeros = torch.zeros(T, dtype=torch.int32)
    return Batch(ids, ids, torch.ones(T), position, segment, zeros, zeros.to(torch.int8))


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the storages that autograd saves in `forward`, each once, without the module's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = forward()
    assert graph is not None
    return sum(storage.nbytes() for storage in storages.values())


def built(model: ModelConfig, precision: str, recompute: str, schedule: str = "1f1b") -> DecoderStage:
    config = RunConfig(
        model=model,
        data=DataConfig(row_tokens=T),
        image_tokenizer=ImageTokenizerConfig(codes=len(LAYOUT.code_range("image"))),
        engine=EngineConfig(precision=precision, recompute=recompute),
        parallel=ParallelConfig(schedule=schedule),
    )
    loss = NextTokenLoss(len(LAYOUT.targets), z_loss=1e-4, deferred=schedule == "breadth_first")
    stage = DecoderStage(config, LAYOUT, LayerFactory(Topology.serial()), loss=loss)
    initialize(stage, 0)
    return stage.to(torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(T,), (T // 2, T // 2), (100, 30, 90, 36)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_keeps_what_the_formula_says(name, lengths, precision, recompute, deferred):
    """deferred: with the loss of a breadth-first pipeline."""
    stage = built(MODELS[name], precision, recompute, "breadth_first" if deferred else "1f1b")
    found = saved_bytes(stage, lambda: stage(row=StageInput(row(lengths))))
    share = RowShare.of(stage.config, packed=len(set(lengths)) > 1)
    layers = stage.config.model.layers * layer_saved(MODELS[name], share, recompute)
    assert layers + loss_saved(MODELS[name], LAYOUT.size, share, deferred) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_a_layer_makes_what_was_not_kept(recompute):
    """One by one in the backward: what the layers keep then, with the inputs that were kept, is what was saved."""
    stage = built(MODELS["multi-query"], "fp32", recompute)
    loss = stage(row=StageInput(row((100, 30, 90, 36)))).loss
    found = saved_bytes(stage, lambda: loss.backward() or loss)
    model, share = stage.config.model, RowShare.of(stage.config)
    again = layer_recomputed(model, share, recompute) + layer_saved(model, share, "full")
    assert model.layers * again == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_vision_encoder_keeps_what_the_formula_says(dtype):
    vision, patches = VisionConfig(width=64, layers=3, heads=4, mlp_width=160, patch=4), 16 * 16
    encoder = VisionEncoder(vision)
    initialize(encoder, 0)
    encoder.to(dtype)
    media = Media(torch.ones(patches, 48), torch.tensor([[1, 16, 16]]), torch.zeros(1), torch.arange(patches))
    found = saved_bytes(encoder, lambda: encoder(media))
    assert VISION.saved_bytes(vision, patches, dtype.itemsize) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_audio_encoder_keeps_what_the_formula_says(dtype):
    audio, frames = AudioConfig(width=64, layers=3, heads=4, mlp_width=160, mels=32), 800
    encoder = AudioEncoder(audio)
    initialize(encoder, 0)
    encoder.to(dtype)
    media = Media(torch.ones(frames, 32), torch.tensor([[frames, 1, 1]]), torch.zeros(1), torch.arange(frames // 4))
    found = saved_bytes(encoder, lambda: encoder(media))
    assert AUDIO_ENCODER.saved_bytes(audio, frames, dtype.itemsize) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_linear_connector_keeps_what_the_formula_says(dtype):
    section, embeddings = LinearConnectorConfig(), 100
    connector = LINEAR.build(section, 64, 96)
    initialize(connector, 0)
    connector.to(dtype)
    e_XE = torch.ones(embeddings, 64, dtype=dtype, requires_grad=True)
    found = saved_bytes(connector, lambda: connector(e_XE, torch.tensor([embeddings])))
    assert LINEAR.saved_bytes(section, 64, 96, embeddings, dtype.itemsize) == found
