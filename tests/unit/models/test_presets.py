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


def test_changing_a_preset_that_was_asked_for_does_not_change_the_preset():
    preset("1b")["model"]["width"] = 1
    assert preset("1b")["model"]["width"] > 1


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset is '2b'; choose one of 1b, 8b, 70b"):
        preset("2b")


def test_importing_presets_imports_no_torch():
    code = "import sys, megatron_gemini.models.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
