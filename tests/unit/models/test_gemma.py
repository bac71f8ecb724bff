"""The decoder equals transformers' Gemma: its weights in, its logits out.

transformers' code was not written here, so every convention (norms, RoPE, scales, order of gate and up, tied head) is
checked by somebody else's reading of the architecture.
"""

from __future__ import annotations

import pytest
import torch

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.models.decoder import Decoder
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

transformers = pytest.importorskip("transformers")
VOCABULARY, TOKENS = 50, 12


def gemma(heads, kv_heads):
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    model = transformers.GemmaForCausalLM(config).eval()
    for parameter in model.parameters():
        # As they come, norms are zero, so that one that forgets its weight would pass, and matrices so small that the
        # branches hardly show in the logits.
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def with_weights_of(model, heads, kv_heads):
    config = ModelConfig(width=24, layers=3, heads=heads, kv_heads=kv_heads, head_width=8, mlp_width=40, qk_norm=False)
    decoder = Decoder(config, VOCABULARY, LayerFactory(Topology.serial()))
    decoder.embedding.weight.copy_(model.model.embed_tokens.weight)
    decoder.norm.weight.copy_(model.model.norm.weight)
    for ours, theirs in zip(decoder.layers.values(), model.model.layers, strict=True):
        ours.attention.input.norm.copy_(theirs.input_layernorm.weight)
        ours.attention.input.query.copy_(theirs.self_attn.q_proj.weight)
        ours.attention.input.key_value[0] = theirs.self_attn.k_proj.weight
        ours.attention.input.key_value[1] = theirs.self_attn.v_proj.weight
        ours.attention.output.weight.copy_(theirs.self_attn.o_proj.weight)
        ours.mlp.norm.copy_(theirs.post_attention_layernorm.weight)
        ours.mlp.gate_up[0] = theirs.mlp.gate_proj.weight
        ours.mlp.gate_up[1] = theirs.mlp.up_proj.weight
        ours.mlp.down.copy_(theirs.mlp.down_proj.weight)
    return decoder


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (3, 3)])
def test_logits_and_embedding_gradient_equal_those_of_transformers(heads, kv_heads):
    model = gemma(heads, kv_heads)
    decoder = with_weights_of(model, heads, kv_heads)
    token = torch.randint(1, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))  # 0 pads
    plan = plan_attention(torch.ones(TOKENS, dtype=torch.int32), torch.zeros(TOKENS, dtype=torch.int32))
    logits = decoder.logits(decoder(decoder.embed(token), torch.arange(TOKENS), plan))
    wanted = model(input_ids=token[None]).logits[0]
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(
        decoder.embedding.weight.grad, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(
        decoder.layers["0"].attention.input.query.grad,
        model.model.layers[0].self_attn.q_proj.weight.grad,
        rtol=1e-3,
        atol=1e-3,
    )
