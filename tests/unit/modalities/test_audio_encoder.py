"""The audio encoder: the same numbers as a foreign Conformer, and no clip depends on its neighbors."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_gemini.config.encoders import AudioConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Media
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.modalities.audio.encoder import (
    AudioEncoder,
    ConformerBlock,
    ConvolutionModule,
    Gaps,
    Subsample,
)
from megatron_gemini.modalities.audio.spec import AUDIO_ENCODER
from megatron_gemini.models.encoders import dummy_media
from megatron_gemini.parallel.parameters import initialize
from tests.foreign_positions import foreign_sinusoids

CONFIG = AudioConfig(width=24, layers=2, heads=3, mlp_width=40, kernel=5, mels=16)


def embeddings(frames: int) -> int:
    """Of a clip of so many log-mel frames."""
    return int(AUDIO_ENCODER.spans(np.array([[frames, 1, 1]]))[1][0])


def _encoder() -> AudioEncoder:
    encoder = AudioEncoder(CONFIG)
    initialize(encoder, seed=3)
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():  # biases too, so that a leak of them into gaps would show
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return encoder


def _media(frames: list[int], seed: int = 0) -> Media:
    values = torch.rand(sum(frames), 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    grid = torch.tensor([[n, 1, 1] for n in frames])
    outputs = sum(embeddings(n) for n in frames)
    return Media(values, grid, torch.zeros(len(frames)), torch.zeros(outputs, dtype=torch.int64))


def _items(media: Media) -> list[Media]:
    parts = media.values_PC.split(media.grid_I3[:, 0].tolist())
    return [
        Media(part, media.grid_I3[i : i + 1], media.time_I[i : i + 1], media.token_O[:1])
        for i, part in enumerate(parts)
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 23), min_size=1, max_size=6))
def test_packed_equals_one_clip_at_a_time(frames):
    encoder, media = _encoder(), _media(frames)
    packed = encoder(media)
    assert packed.shape == (sum(embeddings(n) for n in frames), CONFIG.width)
    torch.testing.assert_close(packed, torch.cat([encoder(clip) for clip in _items(media)]), rtol=1e-4, atol=1e-5)


def test_packed_gradients_equal_one_clip_at_a_time():
    encoder, media = _encoder(), _media([9, 1, 14, 7])
    direction = torch.randn(len(media.token_O), CONFIG.width)
    packed = torch.autograd.grad((encoder(media) * direction).sum(), list(encoder.parameters()))
    alone = torch.cat([encoder(clip) for clip in _items(media)])
    for ours, theirs in zip(
        packed, torch.autograd.grad((alone * direction).sum(), list(encoder.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", range(1, 14))
def test_subsampling_equals_plain_convolutions_on_one_clip(frames):
    subsample = Subsample(16, 24)
    for parameter in subsample.parameters():
        nn.init.normal_(parameter, std=0.3)
    values_PM = torch.randn(frames, 16)
    ours, length_I = subsample(values_PM, torch.tensor([frames]))
    plain = nn.Sequential(subsample.first, nn.GELU(), subsample.second, nn.GELU())
    torch.testing.assert_close(ours, plain(values_PM.T[None])[0].T, rtol=1e-5, atol=1e-5)
    assert length_I.tolist() == [embeddings(frames)]


def _copied(ours: nn.Module, source: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Loads theirs into ours; `names` maps a module of ours to one or more (joined by +) of theirs."""
    state = {}
    for key, value in ours.state_dict().items():
        module, _, kind = key.rpartition(".")
        state[key] = torch.cat([source[f"{name}.{kind}"] for name in names[module].split("+")]).view_as(value)
    ours.load_state_dict(state)


def _foreign_config(wav2vec2_bert, kernel: int):
    return wav2vec2_bert.Wav2Vec2BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=40,
        hidden_act="swish",
        conv_depthwise_kernel_size=kernel,
        position_embeddings_type=None,
        layer_norm_eps=1e-6,
        conformer_conv_dropout=0.0,
    )


CONVOLUTION = {"gate": "pointwise_conv1", "depthwise": "depthwise_conv", "norm": "depthwise_layer_norm"}


def test_convolution_module_equals_a_foreign_one():
    """Theirs is causal: fed two masked steps at the end, its output is ours two steps later."""
    foreign = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    torch.manual_seed(0)
    theirs = foreign.Wav2Vec2BertConvolutionModule(_foreign_config(foreign, kernel=5)).eval()
    for name, parameter in theirs.named_parameters():
        if not name.startswith("layer_norm"):
            nn.init.normal_(parameter, std=0.4)
    theirs.depthwise_layer_norm.eps = 1e-6
    ours = ConvolutionModule(24, kernel=5)
    _copied(ours, theirs.state_dict(), {**CONVOLUTION, "out": "pointwise_conv2"})
    x_OD = torch.randn(11, 24)
    normed = theirs.layer_norm(x_OD)
    mask = torch.tensor([[True] * 11 + [False] * 2])
    expected = theirs(torch.cat([x_OD, torch.randn(2, 24)])[None], attention_mask=mask)[0, 2:]
    gaps = Gaps.between(torch.tensor([11]), 11, gap=2)
    torch.testing.assert_close(ours(normed, gaps), expected, rtol=1e-5, atol=1e-5)


BLOCK = {
    "mlp_1_norm": "ffn1_layer_norm",
    "mlp_1.up": "ffn1.intermediate_dense",
    "mlp_1.down": "ffn1.output_dense",
    "attention_norm": "self_attn_layer_norm",
    "attention.qkv": "self_attn.linear_q+self_attn.linear_k+self_attn.linear_v",
    "attention.out": "self_attn.linear_out",
    "convolution_norm": "conv_module.layer_norm",
    **{f"convolution.{mine}": f"conv_module.{other}" for mine, other in CONVOLUTION.items()},
    "convolution.out": "conv_module.pointwise_conv2",
    "mlp_2_norm": "ffn2_layer_norm",
    "mlp_2.up": "ffn2.intermediate_dense",
    "mlp_2.down": "ffn2.output_dense",
    "norm": "final_layer_norm",
}


def _foreign_block(foreign) -> nn.Module:
    """Without neighbors in its convolution, which is causal there; with weights of which none is small."""
    block = foreign.Wav2Vec2BertEncoderLayer(_foreign_config(foreign, kernel=1)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return block


def test_conformer_block_equals_a_foreign_one():
    foreign = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    torch.manual_seed(0)
    theirs = _foreign_block(foreign)
    ours = ConformerBlock(24, heads=3, mlp_width=40, kernel=1)
    _copied(ours, theirs.state_dict(), BLOCK)
    x_OD = torch.randn(9, 24)
    segment = torch.ones(9, dtype=torch.int32)
    actual = ours(x_OD, plan_attention(segment, segment), Gaps.between(torch.tensor([9]), 9, gap=0))
    torch.testing.assert_close(actual, theirs(x_OD[None])[0].view(9, 24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 38])
def test_the_whole_encoder_equals_plain_convolutions_foreign_positions_and_foreign_blocks(frames):
    """From log-mel frames to the last norm."""
    foreign = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    torch.manual_seed(0)
    ours = AudioEncoder(dataclasses.replace(CONFIG, kernel=1))
    blocks = [_foreign_block(foreign) for _ in range(CONFIG.layers)]
    for mine, theirs in zip(ours.blocks, blocks, strict=True):
        _copied(mine, theirs.state_dict(), BLOCK)
    for parameter in ours.subsample.parameters():
        nn.init.normal_(parameter, std=0.3)
    media = _media([frames])
    plain = nn.Sequential(ours.subsample.first, nn.GELU(), ours.subsample.second, nn.GELU())
    expected = plain(media.values_PC.T[None]).mT
    expected = expected + foreign_sinusoids(expected.shape[1], CONFIG.width)
    for theirs in blocks:
        expected = theirs(expected)[0].view(expected.shape)
    torch.testing.assert_close(ours(media), expected[0], rtol=1e-5, atol=1e-5)


def test_dummy_is_the_smallest_input_and_uses_every_parameter():
    encoder = _encoder()
    out = encoder(dummy_media(RunConfig(encoders={"audio": CONFIG}), "audio", torch.device("cpu")))
    assert out.shape == (1, CONFIG.width)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_wrong_frame_count_is_refused():
    media = _media([5, 6])
    media.values_PC = media.values_PC[:-2]
    with pytest.raises(ValueError, match="11 log-mel frames, but there are 9"):
        _encoder()(media)


def test_every_parameter_says_how_it_begins():
    for parameter in _encoder().parameters():
        assert parameter.placement.global_shape == tuple(parameter.shape)


def test_bfloat16_runs():
    assert _encoder().to(torch.bfloat16)(_media([5, 6])).dtype == torch.bfloat16
