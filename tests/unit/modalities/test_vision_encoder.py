"""The ViT: the same numbers as SigLIP's block, and packed equals one image at a time."""

import math

import numpy as np
import pytest
import torch

from megatron_gemini.config.encoders import VisionConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Media
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.modalities.image.encoder import VisionEncoder
from megatron_gemini.modalities.image.preprocess import patchify
from megatron_gemini.modalities.transformer import Block, grid_positions, sinusoids
from megatron_gemini.models.encoders import dummy_media
from megatron_gemini.parallel.parameters import initialize
from tests.foreign_positions import foreign_sinusoids

CONFIG = VisionConfig(width=24, layers=2, heads=3, mlp_width=40, patch=2, max_side=16)
GRIDS = [(1, 2, 3), (3, 2, 2), (1, 1, 1), (2, 1, 4)]
SECONDS = [0.0, 0.5, 0.0, 1.25]


@pytest.fixture
def encoder() -> VisionEncoder:
    encoder = VisionEncoder(CONFIG)
    initialize(encoder, seed=3)
    return encoder


def _media(grids=GRIDS, seconds=SECONDS, seed=0) -> Media:
    patches = sum(f * h * w for f, h, w in grids)
    values = torch.rand(patches, 12, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Media(values, torch.tensor(grids), torch.tensor(seconds), torch.zeros(patches, dtype=torch.int64))


def _items(media: Media) -> list[Media]:
    parts = media.values_PC.split(media.grid_I3.prod(1).tolist())
    return [
        Media(part, media.grid_I3[i : i + 1], media.time_I[i : i + 1], media.token_O[: len(part)])
        for i, part in enumerate(parts)
    ]


QKV = ("q_proj", "k_proj", "v_proj")
NAMES = {
    "attention.out": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def _siglip_config(siglip, **sizes):
    config = siglip.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        **sizes,
    )
    config._attn_implementation = "eager"
    return config


def _block_state(source):
    """The state of our block, from that of theirs."""
    return {
        **{f"attention.qkv.{p}": torch.cat([source[f"self_attn.{n}.{p}"] for n in QKV]) for p in ("weight", "bias")},
        **{f"{mine}.{p}": source[f"{other}.{p}"] for mine, other in NAMES.items() for p in ("weight", "bias")},
    }


def test_block_equals_siglips():
    siglip = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    theirs = siglip.SiglipEncoderLayer(_siglip_config(siglip))
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Block(24, heads=3, mlp_width=40)
    ours.load_state_dict(_block_state(theirs.state_dict()))
    x_XD = torch.randn(7, 24)
    segment = torch.ones(7, dtype=torch.int32)
    expected = theirs(x_XD[None], attention_mask=None)
    expected = (expected[0] if isinstance(expected, tuple) else expected).view(7, 24)
    torch.testing.assert_close(ours(x_XD, plan_attention(segment, segment)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 8), (9, 1)])
def test_the_whole_encoder_equals_siglips_from_pixels_to_its_final_norm(rows, columns):
    """Its table of learned positions is set to the fixed ones, of somebody else: rows, then columns."""
    siglip = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    side = math.isqrt(rows * columns)  # it asks for as many positions as a square image has patches, of any shape
    sizes = {"num_hidden_layers": 2, "patch_size": CONFIG.patch, "image_size": side * CONFIG.patch}
    theirs = siglip.SiglipVisionModel(_siglip_config(siglip, vision_use_head=False, **sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    row_P, column_P = (torch.from_numpy(places.flatten()) for places in np.indices((rows, columns)))
    half_XD = foreign_sinusoids(max(rows, columns), CONFIG.width // 2)
    theirs.embeddings.position_embedding.weight.data = torch.cat([half_XD[row_P], half_XD[column_P]], dim=-1)

    ours, source = VisionEncoder(CONFIG), theirs.state_dict()
    state = {"time.weight": ours.time.weight, "patch.bias": source["embeddings.patch_embedding.bias"]}
    # A convolution's weight is [D, C, row, column], a patch's values are in the order row, column, channel.
    state["patch.weight"] = source["embeddings.patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1)
    for number in range(CONFIG.layers):
        begin = f"encoder.layers.{number}."
        layer = {name.removeprefix(begin): value for name, value in source.items() if name.startswith(begin)}
        state |= {f"transformer.blocks.{number}.{name}": value for name, value in _block_state(layer).items()}
    state |= {f"transformer.norm.{p}": source[f"post_layernorm.{p}"] for p in ("weight", "bias")}
    ours.load_state_dict(state)

    shape = (rows * CONFIG.patch, columns * CONFIG.patch, 3)
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    values_PC = patchify(pixels_HW3[None], CONFIG.patch)
    media = Media(values_PC, torch.tensor([[1, rows, columns]]), torch.zeros(1), torch.arange(rows * columns))
    signed_CHW = torch.from_numpy(pixels_HW3 / 127.5 - 1).float().permute(2, 0, 1)
    expected = theirs(signed_CHW[None]).last_hidden_state[0]
    torch.testing.assert_close(ours(media), expected, rtol=1e-5, atol=1e-5)


def test_packed_equals_one_item_at_a_time_forward_and_gradient(encoder):
    media = _media()
    direction = torch.randn(len(media.values_PC), CONFIG.width)
    packed = encoder(media)
    packed_grads = torch.autograd.grad((packed * direction).sum(), list(encoder.parameters()))
    alone = torch.cat([encoder(item) for item in _items(media)])
    alone_grads = torch.autograd.grad((alone * direction).sum(), list(encoder.parameters()))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(packed_grads, alone_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frames_of_a_clip_do_not_see_each_other(encoder):
    media = _media([(2, 2, 2)], [0.5])
    before = encoder(media)
    media.values_PC = media.values_PC.clone()
    media.values_PC[4:] += 1
    after = encoder(media)
    torch.testing.assert_close(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])


def test_time_tells_frames_apart_and_is_absent_from_still_images(encoder):
    same = torch.ones(2, 12)

    def encode(frames: int, seconds: float) -> torch.Tensor:
        media = Media(same[:frames], torch.tensor([[frames, 1, 1]]), torch.tensor([seconds]), torch.zeros(frames))
        return encoder(media)

    clip = encode(2, 0.5)
    assert not torch.allclose(clip[0], clip[1])
    assert not torch.allclose(clip[1], encode(2, 1.0)[1])
    still = encode(1, 0.0)
    encoder.time.weight.data.zero_()
    torch.testing.assert_close(encode(1, 0.0), still)
    torch.testing.assert_close(encode(2, 0.5)[:1], still)


def test_every_position_of_a_grid_is_different():
    row, column = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    positions = grid_positions(row.flatten(), column.flatten(), 24)
    assert positions.shape == (4096, 24)
    distance = torch.cdist(positions, positions) + torch.eye(4096) * 9
    assert distance.min() > 1e-2


def test_dummy_is_the_smallest_input_and_uses_every_parameter(encoder):
    media = dummy_media(RunConfig(encoders={"vision": CONFIG}), "vision", torch.device("cpu"))
    out = encoder(media)
    assert out.shape == (1, CONFIG.width)
    assert len(media.token_O) == 1
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_wrong_patch_count_is_refused(encoder):
    media = _media()
    media.values_PC = media.values_PC[:-1]
    with pytest.raises(ValueError, match="27 patches, but there are 26"):
        encoder(media)


def test_every_parameter_says_how_it_begins(encoder):
    for parameter in encoder.parameters():
        assert parameter.placement.sharded_dim is None
        assert parameter.placement.global_shape == tuple(parameter.shape)


def test_bfloat16_runs(encoder):
    assert encoder.to(torch.bfloat16)(_media()).dtype == torch.bfloat16


def test_positions_are_exact_however_late_they_are():
    place = torch.tensor([0, 7, 1_500, 100_000, 1_000_000])
    frequency = np.exp(np.arange(6, dtype=np.longdouble) * (-np.log(np.longdouble(10_000)) / 6))
    angle = place.numpy().astype(np.longdouble)[:, None] * frequency
    found = sinusoids(place, 13)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - np.concatenate([np.sin(angle), np.cos(angle), np.zeros((5, 1))], 1)).max() < 6.1e-8
