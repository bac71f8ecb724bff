"""What a GPU and its node can do. Peaks and links from NVIDIA's data sheets; what of them is reached is assumed.

Only `HOOK` and `KEPT` have been measured by this project: estimates rank layouts, they do not promise throughput.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gemini.models.flops import peak_flops


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU and its share of a node's links and memory, per second.

    name: as `peak_flops` knows it, for the dense bf16 peak. fp32: peak without tensor cores, in FLOP/s. nvlink: bytes
    in one direction. network: bytes of the GPU's own adapter, in one direction. pcie: bytes in one direction, to the
    host. host: bytes of the host's memory, an eighth of a node's.
    """

    name: str
    fp32: float
    nvlink: float
    network: float
    pcie: float
    host: float

    def peak(self, bf16: bool) -> float:
        found = peak_flops(self.name) if bf16 else self.fp32
        assert found is not None, self.name
        return found


# DGX A100 (NVLink 3, 200 Gb/s a GPU, PCIe 4, DDR4-3200 on 16 channels), DGX H100 and H200 (NVLink 4, 400 Gb/s a GPU,
# PCIe 5, DDR5-4800 on 16 channels): NVIDIA's data sheets of 2020, 2022 and 2024.
GPUS = {
    "a100": Gpu("A100", 19.5e12, 300e9, 25e9, 32e9, 51e9),
    "h100": Gpu("H100", 67e12, 450e9, 50e9, 64e9, 77e9),
    "h200": Gpu("H200", 67e12, 450e9, 50e9, 64e9, 77e9),
}

ARITHMETIC = 0.5
"""Share of the peak that matrix products and attention reach in eager torch."""
LINKS = 0.7
"""Share of a link's rate that collectives and copies reach."""
HOOK = 3e-4
"""Seconds of the host that ZeRO-3's hooks take for each module with parameters in each pass. Measured on a CPU by
tools/bench/zero_hooks.py; on a GPU arithmetic may hide them."""
KEPT = 8e-5
"""The same where the weights stay gathered, and only what takes up the gradients is left. Measured by the same."""
HOST = 0.5
"""Share of the host memory's rate that the CPU's Adam reaches."""
