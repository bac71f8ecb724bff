"""Every preset is a model of the size its name says, and fits the configuration's own rules."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_gemini.config.load import config_from_dict
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.presets import PRESETS, TEXT_PIECES, preset
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology


def build_on_meta(name: str) -> Gemini:
    values = preset(name)
    assert set(values) == {"model", "encoders", "image_tokenizer"}
    assert set(values["encoders"]) == {"vision", "audio"}
    config = config_from_dict(values)
    layout = TokenLayout(TEXT_PIECES, (("image", config.image_tokenizer.codes),))
    with torch.device("meta"):
        return Gemini(config, layout, LayerFactory(Topology.serial()))


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_what_the_name_says(name):
    model = build_on_meta(name)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    named = float(name.removesuffix("b"))
    assert abs(billions / named - 1) < 0.1, f"{name} has {billions:.2f}B parameters"
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_use_multi_query_attention_and_divide_over_eight_ranks(name):
    model = preset(name)["model"]
    assert model["kv_heads"] == 1
    assert model["heads"] % 8 == 0
    assert model["mlp_width"] % 8 == 0


ENCODERS = {  # width, layers, heads, MLP width
    "1b": ((768, 12, 12, 3072), (512, 12, 8, 2048)),
    "8b": ((1152, 27, 16, 4304), (1024, 24, 16, 4096)),
    "70b": ((1408, 40, 16, 6144), (1536, 32, 16, 6144)),
}
DECODERS = {  # width, layers, heads, head width, MLP width
    "1b": (2048, 18, 8, 256, 4608),
    "8b": (4096, 32, 16, 256, 14336),
    "70b": (8192, 80, 64, 128, 28672),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_the_models_that_they_are_after(name):
    """ViT-B, So400m and ViT-g; the Conformers of USM; Parti's tokenizer. RoPE's base is Gemma's, then Llama 3's.

    A number that is off by one still has the right count of parameters, and fits no published weights.
    """
    config = config_from_dict(preset(name))
    model, tokenizer = config.model, config.image_tokenizer
    assert (model.width, model.layers, model.heads, model.head_width, model.mlp_width) == DECODERS[name]
    assert model.rope_theta == (10_000.0 if name == "1b" else 500_000.0)
    vision, audio = config.encoders["vision"], config.encoders["audio"]
    for encoder, shape in zip((vision, audio), ENCODERS[name], strict=True):
        assert (encoder.width, encoder.layers, encoder.heads, encoder.mlp_width) == shape
    assert (vision.patch, vision.max_side, vision.max_frames) == ((16, 512, 16) if name == "1b" else (14, 896, 32))
    assert (tokenizer.image_size, tokenizer.patch, tokenizer.codes, tokenizer.code_width) == (256, 8, 8192, 32)
    assert (tokenizer.width, tokenizer.layers, tokenizer.heads, tokenizer.mlp_width) == (512, 8, 8, 2048)
    assert tokenizer.codes_per_image == 1024


def test_changing_a_preset_that_was_asked_for_does_not_change_the_preset():
    preset("1b")["model"]["width"] = 1
    assert preset("1b")["model"]["width"] > 1


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset is '2b'; choose one of 1b, 8b, 70b"):
        preset("2b")


def test_importing_presets_imports_no_torch():
    code = "import sys, megatron_gemini.models.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
