"""Parameter counts by formula against the modules that really are built, on the meta device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.load import config_from_dict
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.presets import PRESETS, TEXT_PIECES
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.planning.parameters import connector_parameters, encoder_parameters, stages


def built(config: RunConfig, layout: TokenLayout) -> Gemini:
    with torch.device("meta"):
        return Gemini(config, layout, LayerFactory(Topology.serial()))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check(config: RunConfig, layout: TokenLayout) -> None:
    model = built(config, layout)
    (stage,) = stages(config, layout.size)
    assert stage.parameters == count(model.decoder)
    assert stage.largest == max(parameter.numel() for parameter in model.decoder.parameters())
    assert encoder_parameters(config) == {name: count(encoder) for name, encoder in model.encoders.items()}
    assert connector_parameters(config) == {name: count(connector) for name, connector in model.connectors.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_counted_exactly(name):
    config = config_from_dict(PRESETS[name])
    check(config, TokenLayout(TEXT_PIECES, (("image", config.image_tokenizer.codes),)))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_model_is_counted_exactly(data):
    small, even = st.integers(1, 5), st.sampled_from([2, 4, 6])
    kv_heads, head_width, width = data.draw(small), data.draw(even), 4 * data.draw(small)
    config = RunConfig(
        model=ModelConfig(
            width=data.draw(even),
            layers=data.draw(small),
            heads=kv_heads * data.draw(small),
            kv_heads=kv_heads,
            head_width=head_width,
            mlp_width=data.draw(small),
            qk_norm=data.draw(st.booleans()),
            tie_embeddings=data.draw(st.booleans()),
        ),
        encoders={
            "vision": VisionConfig(
                enabled=data.draw(st.booleans()),
                width=width,
                layers=data.draw(small),
                heads=2,
                mlp_width=data.draw(small),
            ),
            "audio": AudioConfig(
                enabled=data.draw(st.booleans()),
                width=width,
                layers=data.draw(small),
                heads=2,
                mlp_width=data.draw(small),
                kernel=data.draw(st.sampled_from([1, 3, 5])),
                mels=data.draw(small),
            ),
        },
    )
    check(config, TokenLayout(data.draw(small), (("image", data.draw(small)),)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cut", [(2, 1), (2, 3), (4, 1)])
def test_the_stages_together_are_the_model_and_a_second_copy_of_a_tied_embedding(tied, cut):
    model = ModelConfig(layers=7, tie_embeddings=tied)
    whole = sum(stage.parameters for stage in stages(RunConfig(model=model), 1000))
    parallel = ParallelConfig(pipeline=cut[0], virtual_stages=cut[1], schedule="breadth_first")
    parts = stages(RunConfig(model=model, parallel=parallel), 1000)
    assert len(parts) == cut[0] * cut[1]
    assert [number for part in parts for number in part.layers] == list(range(7))
    assert sum(part.parameters for part in parts) == whole + (1000 * model.width if tied else 0)


def test_tensor_ranks_share_all_but_norms_and_undivided_key_heads():
    config = RunConfig(model=ModelConfig(heads=4, kv_heads=1))
    model = config.model
    whole = stages(config, 1001)[0].parameters
    two = stages(dataclasses.replace(config, parallel=ParallelConfig(tensor=2)), 1001)[0].parameters
    same = model.layers * (2 * model.width + 2 * model.head_width + 2 * model.head_width * model.width) + model.width
    assert 2 * two == whole + same + model.width  # and one row of padding
