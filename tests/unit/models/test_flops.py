"""Model FLOPs against a count of the products that really run, and the table of devices."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.models.flops import model_flops_per_token, peak_flops


def test_flops_equal_those_that_torch_counts_in_a_decoder_of_plain_products():
    model = ModelConfig(width=24, layers=3, heads=4, kv_heads=2, head_width=10, mlp_width=40)
    tokens, vocabulary, queries, keys = 16, 50, 40, 20
    shapes = [(24, queries), (24, keys), (24, keys), (queries, 24), (24, 40), (24, 40), (40, 24)] * model.layers
    weights = [torch.ones(shape, requires_grad=True) for shape in [*shapes, (24, vocabulary)]]
    score = [torch.ones(model.heads, tokens, model.head_width, requires_grad=True) for _ in range(3 * model.layers)]
    with FlopCounterMode(display=False) as counter:
        total = torch.zeros(())
        for weight in weights:
            total = total + (torch.ones(tokens, weight.shape[0], requires_grad=True) @ weight).sum()
        for query, key, value in zip(score[::3], score[1::3], score[2::3], strict=True):
            total = total + torch.bmm(torch.bmm(query, key.transpose(1, 2)), value).sum()
        total.backward()
    expected = counter.get_total_flops() / tokens
    assert model_flops_per_token(model, vocabulary, visible_keys=tokens) == expected


def test_only_the_tokens_with_a_target_pay_for_the_head():
    model = ModelConfig()
    all_of_them, half = (model_flops_per_token(model, 1000, 8, share) for share in (1.0, 0.5))
    assert all_of_them - half == 6 * model.width * 1000 * 0.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_torchs_name(name, peak):
    assert peak_flops(name) == peak
