"""What recomputation keeps on the device and costs in time: decoder layers forward and backward, without head and loss.

    python tools/bench/recompute.py                                   # a table row a mode, JSON lines
    python tools/bench/recompute.py --layers 4 --width 512 --tokens 1024 --rounds 20

Float32, one thread, RoPE and QK-norm on, one packed row of documents of unequal length. The shape of a layer is
Gemma-2B's: 8 query heads for one key/value head, together as wide as the model, and an MLP of eight times its width.
Bytes are those of distinct memory that autograd holds between forward and backward, without parameters and what all
layers share. Modes run in turn, so that a noisy machine disturbs all, and times are CPU time of the process as ratios
to the mode that keeps everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.models.decoder import Decoder
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.recompute import Recompute
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

MODES = {
    "none": Recompute(),
    "selective": Recompute("selective"),
    "selective, offload": Recompute("selective", offload=True),
    "full": Recompute("full"),
    "full, offload": Recompute("full", offload=True),
}


class Case:
    """The layers of one mode, and a row to run through them."""

    def __init__(self, recompute: Recompute, layers: int, width: int, tokens: int) -> None:
        config = ModelConfig(
            width=width, layers=layers, heads=8, kv_heads=1, head_width=width // 8, mlp_width=8 * width
        )
        self.model = Decoder(config, 16, LayerFactory(Topology.serial()), recompute=recompute)
        initialize(self.model, seed=0)
        self.position_T = torch.arange(tokens)
        ends = torch.tensor([tokens // 2, tokens // 2 + tokens // 3, tokens])
        self.segment_T = torch.searchsorted(ends, self.position_T, right=True) + 1
        self.h_TD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))

    def forward(self) -> torch.Tensor:
        plan = plan_attention(self.segment_T, torch.zeros_like(self.segment_T))
        return self.model(self.h_TD.clone().requires_grad_(), self.position_T, plan)

    def step(self) -> float:
        """CPU seconds of forward and backward."""
        begin = time.process_time()
        self.forward().sum().backward()
        return time.process_time() - begin

    def kept(self) -> int:
        """Bytes between forward and backward; of what is offloaded, the newest is still there."""
        parameters = {p.data_ptr() for p in self.model.parameters()}
        sizes: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            if x.data_ptr() not in parameters:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            self.forward()
        newest = self.h_TD.nbytes if self.model.recompute.offload else 0
        return sum(sizes.values()) + newest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each mode")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: Case(mode, options.layers, options.width, options.tokens) for name, mode in MODES.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(options.rounds + 1):
        for name, case in cases.items():
            spent = case.step()
            if turn:  # the first one warms up
                times[name].append(spent)
    kept = {name: case.kept() for name, case in cases.items()}
    for name, seconds in times.items():
        row = {
            "recompute": name,
            "kept_bytes_of_a_token_and_layer": round(kept[name] / options.tokens / options.layers),
            "kept": round(kept[name] / kept["none"], 3),
            "ratio_of_medians": round(statistics.median(seconds) / statistics.median(times["none"]), 3),
            "ratio_of_minima": round(min(seconds) / min(times["none"]), 3),
        }
        print(json.dumps(row | vars(options) | {"torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
