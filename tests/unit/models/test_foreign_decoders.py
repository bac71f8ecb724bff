"""The decoder equals decoders of transformers that use what Gemma leaves at its default or lacks.

Qwen3 and Gemma 3 (its post-norms made identities) for QK-norm, where it stands, and for a RoPE base and an eps that
show. PaliGemma for spans: its prefix sees itself in both directions. Their code was not written here.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.models.decoder import Decoder
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

transformers = pytest.importorskip("transformers")
VOCABULARY, TOKENS, LAYERS = 50, 14, 3
THETA, EPS = 30.0, 0.05  # far from both sides' defaults, so that one that is not read shows
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": EPS,
}
ROPE = {"rope_type": "default", "rope_theta": THETA}


def begun(model: nn.Module) -> nn.Module:
    """With weights of which none is small or the same as another: queries' and keys' norms differ."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def ours(theirs: nn.Module, activation: str, *, qk_norm: bool, scale_less_one: bool) -> Decoder:
    """Our decoder with the weights of `theirs`, a text model without a head.

    scale_less_one: whether its norms scale by 1 + weight, as ours do.
    """
    config = ModelConfig(
        width=24,
        layers=LAYERS,
        heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=40,
        activation=activation,
        qk_norm=qk_norm,
        rope_theta=THETA,
        norm_eps=EPS,
    )
    decoder, offset = Decoder(config, VOCABULARY, LayerFactory(Topology.serial())), 0.0 if scale_less_one else 1.0
    with torch.no_grad():
        decoder.embedding.weight.copy_(theirs.embed_tokens.weight)
        decoder.norm.weight.copy_(theirs.norm.weight - offset)
        for mine, other in zip(decoder.layers.values(), theirs.layers, strict=True):
            attention, before_mlp = other.self_attn, other.post_attention_layernorm
            mine.attention.input.norm.copy_(other.input_layernorm.weight - offset)
            mine.attention.input.query.copy_(attention.q_proj.weight)
            mine.attention.input.key_value.copy_(torch.stack([attention.k_proj.weight, attention.v_proj.weight]))
            mine.attention.output.weight.copy_(attention.o_proj.weight)
            if qk_norm:
                mine.attention.query_norm.weight.copy_(attention.q_norm.weight - offset)
                mine.attention.key_norm.weight.copy_(attention.k_norm.weight - offset)
            before_mlp = getattr(other, "pre_feedforward_layernorm", before_mlp)
            mine.mlp.norm.copy_(before_mlp.weight - offset)
            mine.mlp.gate_up.copy_(torch.stack([other.mlp.gate_proj.weight, other.mlp.up_proj.weight]))
            mine.mlp.down.copy_(other.mlp.down_proj.weight)
    return decoder


def assert_same(decoder: Decoder, theirs: nn.Module, forward, span_T: torch.Tensor | None = None) -> None:
    """The last hidden states and the gradients of some weights are those of `forward`, which takes embedded tokens."""
    token = torch.randint(1, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))  # 0 pads
    h_TD = decoder.embed(token).detach()
    span_T = torch.zeros(TOKENS, dtype=torch.int32) if span_T is None else span_T
    plan = plan_attention(torch.ones(TOKENS, dtype=torch.int32), span_T)
    found = decoder(h_TD, torch.arange(TOKENS), plan)
    wanted = forward(h_TD[None]).last_hidden_state[0]
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    found.backward(grad)
    wanted.backward(grad)
    for mine, other in zip(decoder.layers.values(), theirs.layers, strict=True):
        pairs = [(mine.attention.input.query, other.self_attn.q_proj)]
        if mine.attention.query_norm is not None:
            pairs.append((mine.attention.query_norm.weight, other.self_attn.q_norm))
            pairs.append((mine.attention.key_norm.weight, other.self_attn.k_norm))
        for parameter, module in pairs:
            largest = float(module.weight.grad.abs().max())
            torch.testing.assert_close(parameter.grad, module.weight.grad, rtol=0, atol=1e-5 * max(largest, 1.0))


def test_qwen3() -> None:
    config = transformers.Qwen3Config(**SIZES, rope_parameters=ROPE, hidden_act="silu", attn_implementation="eager")
    theirs = begun(transformers.Qwen3Model(config))
    decoder = ours(theirs, "silu", qk_norm=True, scale_less_one=False)
    assert_same(decoder, theirs, lambda h: theirs(inputs_embeds=h))


def test_gemma_3_without_its_post_norms() -> None:
    config = transformers.Gemma3TextConfig(
        **SIZES,
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE},
        layer_types=["full_attention"] * LAYERS,
        query_pre_attn_scalar=8,
        attn_implementation="eager",
    )
    theirs = transformers.Gemma3TextModel(config)
    for layer in theirs.layers:
        layer.post_attention_layernorm = layer.post_feedforward_layernorm = nn.Identity()
    begun(theirs)
    decoder = ours(theirs, "gelu", qk_norm=True, scale_less_one=True)
    assert_same(decoder, theirs, lambda h: theirs(inputs_embeds=h))


@pytest.mark.parametrize("prefix", [1, 5, TOKENS])
def test_a_span_sees_itself_as_paligemmas_prefix_does(prefix: int) -> None:
    text = transformers.GemmaConfig(**SIZES, rope_parameters=ROPE)
    vision = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=4
    )
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, attn_implementation="eager")
    whole = transformers.PaliGemmaModel(config)
    theirs = begun(whole.language_model)
    whole.eval()
    decoder = ours(theirs, "gelu", qk_norm=False, scale_less_one=True)
    inside_T = torch.arange(TOKENS) < prefix

    def forward(h_1TD: torch.Tensor):
        # Type 0 is its prefix. Embeddings that it is given it takes as they are.
        return whole(inputs_embeds=h_1TD, token_type_ids=(~inside_T).long()[None])

    assert_same(decoder, theirs, forward, inside_T.int() * 7)


@pytest.mark.parametrize("layers", [1, 8])
def test_the_end_of_a_branch_begins_smaller_the_deeper_the_decoder(layers: int) -> None:
    """GPT-2 (Radford et al., 2019): 1 / sqrt(residual branches), of which a layer has two."""
    config = ModelConfig(width=64, layers=layers, mlp_width=64, init_std=0.1)
    decoder = Decoder(config, VOCABULARY, LayerFactory(Topology.serial()))
    initialize(decoder, 0)
    smaller = 0.1 / (2 * layers) ** 0.5
    layer = decoder.layers["0"]
    for weight in (layer.attention.output.weight, layer.mlp.down):
        assert float(weight.std()) == pytest.approx(smaller, rel=0.05)
    for weight in (layer.attention.input.query, layer.attention.input.key_value, layer.mlp.gate_up):
        assert float(weight.std()) == pytest.approx(0.1, rel=0.05)
