"""Utilization of the devices, and memory."""

from __future__ import annotations

import subprocess
import sys

import torch

from megatron_gemini.config.engine import EngineConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.models import flops
from megatron_gemini.training import throughput


def test_utilization_is_the_models_flops_over_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    config = RunConfig(engine=EngineConfig(precision="bf16"))
    assert flops.utilization(config, 312e6, 2e6, devices=4) == 0.5
    assert flops.utilization(RunConfig(), 312e6, 2e6, devices=4) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "unheard of")
    assert flops.utilization(config, 312e6, 2e6, devices=4) is None


def test_peak_memory_is_this_processs_own_and_remembers_what_was_freed():
    """Measured in a child, because it must not begin at the peak of the process that started it."""
    ballast = torch.ones(300 << 20, dtype=torch.uint8)
    program = (
        "import torch; from megatron_gemini.training.throughput import _peak_resident_bytes as peak\n"
        "before = peak(); held = torch.ones(200 << 20, dtype=torch.uint8); del held; print(before, peak())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert after - before > 150 << 20
    if sys.platform == "linux":
        assert before < throughput._peak_resident_bytes() - ballast.numel() // 2
