"""Recomputation and offloading on a GPU, where copies are asynchronous and backwards have threads of their own."""

from __future__ import annotations

import pytest
import torch

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.models.decoder import Decoder
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.recompute import Recompute
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

pytestmark = pytest.mark.gpu
LAYERS, T, D = 8, 2048, 512
CONFIG = ModelConfig(width=D, layers=LAYERS, heads=8, kv_heads=1, head_width=64, mlp_width=4 * D)


class Case:
    """A decoder on the GPU and a row of two documents."""

    def __init__(self, mode: str, offload: bool) -> None:
        self.model = Decoder(CONFIG, 16, LayerFactory(Topology.serial()), recompute=Recompute(mode, offload))
        initialize(self.model, seed=1)
        self.model.cuda()
        self.h_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
        segment_T = (torch.arange(T, device="cuda") >= T // 3).int() + 1
        self.plan = plan_attention(segment_T, torch.zeros_like(segment_T))

    def forward(self) -> torch.Tensor:
        return self.model(self.h_TD, torch.arange(T, device="cuda"), self.plan)

    def gradients(self) -> dict[str, torch.Tensor]:
        self.forward().square().sum().backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        assert self.h_TD.grad is not None
        return found | {"input": self.h_TD.grad}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_those_of_kept_activations(mode: str, offload: bool) -> None:
    expected, found = Case("none", False).gradients(), Case(mode, offload).gradients()
    assert set(found) == set(expected)
    for name, gradient in found.items():  # attention's backward on CUDA may sum in another order every time
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_is_offloaded_leaves_the_device() -> None:
    held = []
    for offload in (False, True):
        case = Case("full", offload)
        before = torch.cuda.memory_allocated()
        out = case.forward()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del out, case
    one = T * D * 4
    assert held[0] - held[1] >= (LAYERS - 2) * one  # the newest stays, and the first is the row's own input
