"""How evenly a step's images and sounds are assigned to the ranks, how many travel, and what working it out costs.

    python tools/bench/assignment.py            # a line of JSON for each layout

Made-up rows: four items in five are images of 4 x 4 to 31 x 31 patches, the others sounds of 1 to 30 seconds. Rows are
read by all ranks in turn. Balance is the cost of the most expensive rank over the mean; unassigned is what it would be
if every rank encoded what it has read, and at home if the ranks of the embedding stage encoded those of their rows.
Seconds are one rank's CPU time for plan and routes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from megatron_gemini.config.run import RunConfig
from megatron_gemini.models.encoders import costs
from megatron_gemini.models.encoding_plan import COLUMNS, ENCODER, FRAMES, ROW, ROWS, START, make_plan
from megatron_gemini.parallel.encoders.exchange import Streams, embedding_routes
from megatron_gemini.parallel.topology import Topology

LAYOUTS = (  # (data, tensor, pipeline)
    (8, 1, 1),
    (4, 2, 4),
    (16, 8, 1),
    (32, 8, 4),
    (1024, 1, 1),
)
ROW_TOKENS = 32768


def table(random: np.random.Generator, rows: int, items: int) -> np.ndarray:
    """A data-parallel rank's table of sizes, as `encoding_plan.size_table` makes it: `items` in each of its rows."""
    lines = np.zeros((rows * items, 7))
    lines[:, ENCODER] = np.sort(random.random(len(lines)) < 0.2)
    lines[:, ROW], lines[:, START] = random.integers(0, rows, len(lines)), random.integers(0, 30000, len(lines))
    sound = lines[:, ENCODER] == 1
    lines[:, FRAMES] = np.where(sound, random.integers(100, 3000, len(lines)), 1)
    for column in (ROWS, COLUMNS):
        lines[:, column] = np.where(sound, 1, random.integers(4, 32, len(lines)))
    return lines


def measure(data: int, tensor: int, pipeline: int, rows: int, items: int, repeats: int) -> dict[str, float]:
    random, config = np.random.default_rng(0), RunConfig()
    topology = Topology(world=data * tensor * pipeline, data_size=data, tensor_size=tensor, pipeline_size=pipeline)
    streams, seconds = Streams(topology, ROW_TOKENS), []
    readers = [number % topology.world for number in range(rows * data)]
    for _ in range(repeats):
        tables = [table(random, rows, items) for _ in range(data)]
        begin = time.process_time()
        plan = make_plan(tables, readers, config, topology, training=True)
        embedding_routes(plan.items, streams, rows, np.array([True, True]), np.array([True, True]))
        seconds.append(time.process_time() - begin)
    assigned = plan.items
    names = enumerate(config.enabled_encoders)
    cost = np.concatenate(
        [costs(name, plan.grid_I3[assigned.encoder == n], config.encoders[name].cost) for n, name in names]
    )
    unassigned = np.bincount(assigned.holder, weights=cost, minlength=topology.world)
    at_home = np.bincount(assigned.home, weights=cost) / tensor
    return {
        "ranks": topology.world,
        "items": len(assigned.rank),
        "balance": round(plan.balance, 3),
        "balance_at_home": round(float(at_home.max() / (cost.sum() / topology.world)), 3),
        "balance_unassigned": round(float(unassigned.max() / (cost.sum() / topology.world)), 3),
        "travel": round(float(np.mean(assigned.rank != assigned.holder)), 3),
        "median_seconds": round(statistics.median(seconds), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows of a data-parallel rank (default: %(default)s)")
    parser.add_argument("--items", type=int, default=20, help="items of a row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="steps a layout (default: %(default)s)")
    options = parser.parse_args()
    for data, tensor, pipeline in LAYOUTS:
        found = measure(data, tensor, pipeline, options.rows, options.items, options.repeats)
        print(json.dumps({"data": data, "tensor": tensor, "pipeline": pipeline, **found}), flush=True)


if __name__ == "__main__":
    main()
