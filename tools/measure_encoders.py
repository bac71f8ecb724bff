"""Measures what encoding an item costs on this machine, by its size, and prints the constants for a configuration.

    python tools/measure_encoders.py --config run.yaml
    python tools/measure_encoders.py --config run.yaml --encoders.vision.max_side 448      # any setting can be changed

An encoder's forward, recomputation and backward (a frozen one's forward) run on full chunks of equal items, of several
sizes up to the largest that the configuration allows. The cost a n^2 + b n + c of one item is fitted to the time of a
chunk divided by its items, all errors relative and no constant negative. Prints YAML to paste into the configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import yaml

from megatron_gemini.config.encoders import CostConfig
from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Media
from megatron_gemini.modalities.spec import Grid
from megatron_gemini.models.encoders import build_encoder, input_width, is_frozen, run_lengths
from megatron_gemini.models.presets import preset
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.registry import ENCODERS

SIZES = 6  # of items, spread evenly in their side or length


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run configuration; its data need not exist")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of every size (default: %(default)s)")
    options, settings = parser.parse_known_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; measure every size once or more often")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = load_config(["--config", options.config, *settings], presets=preset)
    except (ValueError, OSError) as error:
        print(f"measure_encoders: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"# microseconds an item on {_name(device)}, torch {torch.__version__}, {config.engine.precision}")
    print("encoders:")
    for encoder in config.enabled_encoders:
        sizes, seconds = measure(config, encoder, device, options.repeats)
        cost, off = fit(sizes, [1e6 * each for each in seconds])
        rounded = {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(cost).items()}
        values = yaml.safe_dump(rounded, default_flow_style=True, sort_keys=False).strip()
        print(f"  {encoder}: {{cost: {values}}}  # n = {sizes[0]} to {sizes[-1]}, off by at most {off:.0%}", flush=True)
    return 0


def measure(config: RunConfig, encoder: str, device: torch.device, repeats: int) -> tuple[list[int], list[float]]:
    """(n, seconds of one item) of several sizes, the smallest first: the median of `repeats` measurements in turn."""
    module = build_encoder(config, encoder)
    initialize(module, config.train.seed)
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    module.to(device=device, dtype=dtype)
    chunks = [_chunk(config, encoder, grid, device) for grid in grids(config, encoder)]
    trains = not is_frozen(config, encoder)

    def step(media: Media) -> None:
        if config.encoder_engines.recompute or not trains:
            with torch.no_grad():
                module(media)
        if trains:
            module(media).float().sum().backward()

    times: list[list[float]] = [[] for _ in chunks]
    for _ in range(repeats + 1):
        for media, found in zip(chunks, times, strict=True):
            found.append(_seconds(lambda media=media: step(media), device) / media.items)  # type: ignore[misc]
    sizes = [int(run_lengths(encoder, media.grid_I3[:1].cpu().numpy())[0]) for media in chunks]
    return sizes, [statistics.median(found[1:]) for found in times]  # the first one warms up


def grids(config: RunConfig, encoder: str) -> list[Grid]:
    """Items to measure, in the terms of `contracts.Media`, the smallest first."""
    spec, section = ENCODERS.get(encoder), config.encoders[encoder]
    shares = [step / SIZES for step in range(1, SIZES + 1)]
    if spec.single_grid is not None:
        return sorted({spec.single_grid(section, share) for share in shares})
    longest = spec.longest_item(section)
    return [(inputs, 1, 1) for inputs in sorted({max(1, round(longest * share)) for share in shares})]


def _chunk(config: RunConfig, encoder: str, grid: Grid, device: torch.device) -> Media:
    """As many equal items as one forward takes."""
    inputs = grid[0] * grid[1] * grid[2]
    items = max(1, config.encoder_engines.chunk_tokens // inputs)
    return Media(
        values_PC=torch.rand(items * inputs, input_width(config, encoder), device=device) * 2 - 1,
        grid_I3=torch.tensor([grid] * items, device=device),
        time_I=torch.zeros(items, device=device),
        token_O=torch.empty(0, dtype=torch.int64, device=device),
    )


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """CPU time of this process, or on a GPU the time until it is done."""
    if device.type == "cpu":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def fit(sizes: Sequence[int], costs: Sequence[float]) -> tuple[CostConfig, float]:
    """(the constants that are nearest to the costs, their largest relative error).

    Least squares of relative errors, no constant below 0: of the seven sets of constants that may be other than 0, the
    best one that has such a solution.
    """
    n, cost = np.array(sizes, np.float64), np.array(costs, np.float64)
    matrix = np.stack((n**2, n, np.ones_like(n)), 1) / cost[:, None]
    best, least = np.zeros(3), np.inf
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in (1, 2, 3)):
        constants = np.zeros(3)
        constants[list(used)] = np.linalg.lstsq(matrix[:, used], np.ones_like(n), rcond=None)[0]
        error = float(np.square(matrix @ constants - 1).sum())
        if (constants >= 0).all() and error < least:
            best, least = constants, error
    return CostConfig(*best.tolist()), float(np.abs(matrix @ best - 1).max())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
