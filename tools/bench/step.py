"""CPU time of one training step's forward, loss and backward against transformers' Gemma of the same configuration.

    python tools/bench/step.py                       # both cases, JSON lines
    python tools/bench/step.py --layers 32 --width 64 --tokens 16

Neither side has an optimizer, DeepSpeed or torch.compile; both use torch SDPA, float32 and one thread; QK-norm and
z-loss are off. The two run in turn, so that a noisy machine disturbs both, and only ratios are reported: that of the
medians and that of the minima, with the quartiles of the single pairs' ratios as the spread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable

import torch

from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

VOCABULARY = 1024
CASES = (
    {"layers": 32, "width": 64, "tokens": 16, "bound": 0.90},  # dispatch dominates
    {"layers": 4, "width": 256, "tokens": 256, "bound": 1.02},  # arithmetic dominates
)


def our_step(layers: int, width: int, tokens: int) -> Callable[[], torch.Tensor]:
    """Forward, loss and backward of this package's model; returns the loss."""
    config = RunConfig(
        model=ModelConfig(
            width=width, layers=layers, heads=4, kv_heads=1, head_width=width // 4, mlp_width=4 * width, qk_norm=False
        ),
        encoders={"vision": VisionConfig(enabled=False), "audio": AudioConfig(enabled=False)},
    )
    layout = TokenLayout(VOCABULARY - TokenLayout(1).size + 1)
    model = Gemini(config, layout, LayerFactory(Topology.serial()), NextTokenLoss(len(layout.targets)))
    initialize(model, seed=0)
    token = torch.randint(layout.text_size, (tokens + 1,))
    ones = torch.ones(tokens, dtype=torch.int32)
    weight = torch.ones(tokens)
    weight[-1] = 0  # transformers' loss has tokens - 1 targets: the last token predicts nothing
    batch = Batch(
        token[:-1], token[1:], weight, torch.arange(tokens), ones, ones * 0, (ones * 0).to(torch.int8), samples=["row"]
    )

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(batch).loss
        loss.backward()
        return loss

    return step


def gemma_step(layers: int, width: int, tokens: int) -> Callable[[], torch.Tensor]:
    """The same of transformers' Gemma."""
    from transformers import GemmaConfig, GemmaForCausalLM  # --help, and its refusal below, go without

    config = GemmaConfig(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=width // 4,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GemmaForCausalLM(config)
    token = torch.randint(VOCABULARY, (1, tokens))

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=token, labels=token, use_cache=False).loss
        loss.backward()
        return loss

    return step


def cpu_seconds(step: Callable[[], torch.Tensor], repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - begin) / repeats


def compare(layers: int, width: int, tokens: int, pairs: int, repeats: int) -> dict[str, float]:
    """Ratios of our CPU time to Gemma's over `pairs` interleaved measurements of `repeats` steps each."""
    torch.manual_seed(0)
    ours, gemma = our_step(layers, width, tokens), gemma_step(layers, width, tokens)
    cpu_seconds(ours, 3), cpu_seconds(gemma, 3)
    times = [(cpu_seconds(ours, repeats), cpu_seconds(gemma, repeats)) for _ in range(pairs)]
    a, b = zip(*times, strict=True)
    quartiles = statistics.quantiles([x / y for x, y in times], n=4)
    return {
        "ratio_of_medians": round(statistics.median(a) / statistics.median(b), 3),
        "ratio_of_minima": round(min(a) / min(b), 3),
        "pair_ratio_quartile_1": round(quartiles[0], 3),
        "pair_ratio_quartile_3": round(quartiles[2], 3),
        "our_median_ms": round(1e3 * statistics.median(a), 3),
        "gemma_median_ms": round(1e3 * statistics.median(b), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=0, help="one case of your own; without it the two that are bounded"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs of measurements, at least 10")
    parser.add_argument("--repeats", type=int, default=3, help="steps of one measurement")
    options = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        parser.error("the peer is transformers, which is not installed; `bash tools/install.sh dev` installs it")
    torch.set_num_threads(1)
    own = {"layers": options.layers, "width": options.width, "tokens": options.tokens}
    for case in [own] if options.layers else CASES:
        size = {name: int(case[name]) for name in own}
        result = compare(**size, pairs=max(10, options.pairs), repeats=options.repeats)
        print(json.dumps({**case, **result, "pairs": max(10, options.pairs), "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
