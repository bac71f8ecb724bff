"""How full packed rows are, and what filling them costs.

    python tools/bench/packing.py                                            # generated lengths
    python tools/bench/packing.py --config examples/quickstart/pretrain.yaml # the rows of a run, from its own data

Generated: documents of random lengths in rows of 2,048 tokens, by the choice of data/packing/pack.py and, for
comparison, by taking the longest that fits again and again. Both take the document that has waited longest first, and
choose among `look_ahead` of them. Microseconds are CPU time a row of the choice alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from megatron_gemini.config.load import load_config
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.packing.pack import choose
from megatron_gemini.data.samples.document import Size
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.registry import OBJECTIVES

ROW = 2048
Choice = Callable[[Sequence[Size], Size], list[int]]


def longest_that_fits(waiting: Sequence[Size], room: Size) -> list[int]:
    """The one longest document that fits, the oldest of equals."""
    fitting = [place for place, size in enumerate(waiting) if size.tokens <= room.tokens]
    return [max(fitting, key=lambda place: (waiting[place].tokens, -place))] if fitting else []


def lengths(kind: str, random: np.random.Generator) -> int:
    """Tokens of a document of a mixture."""
    if kind == "captions":  # an image of 256 tokens and a short text
        return int(256 + random.lognormal(3.0, 0.6))
    if kind == "web":
        return int(np.clip(random.lognormal(6.0, 1.0), 16, ROW))
    mixed = ("captions", "web", "speech")[int(random.integers(3))]
    return int(random.uniform(60, 800)) if mixed == "speech" else lengths(mixed, random)


def fill(kind: str, look_ahead: int, choice: Choice, rows: int) -> tuple[float, float]:
    """(share of tokens that are not padding, microseconds a row)."""
    random = np.random.default_rng(0)
    waiting: list[Size] = []
    used, spent = 0, 0.0
    for _ in range(rows):
        room, more = Size(ROW), [0]
        waiting += [Size(lengths(kind, random)) for _ in range(look_ahead - len(waiting))]
        while more:
            for place in reversed(more):
                room = room - waiting.pop(place)
            waiting += [Size(lengths(kind, random)) for _ in range(look_ahead - len(waiting))]
            begin = time.process_time()
            more = choice(waiting, room)
            spent += time.process_time() - begin
        used += ROW - room.tokens
    return used / (rows * ROW), 1e6 * spent / rows


def generated(rows: int) -> None:
    for kind in ("captions", "web", "mixed"):
        for look_ahead in (8, 16, 32, 64):
            ours, cost = fill(kind, look_ahead, choose, rows)
            greedy, greedy_cost = fill(kind, look_ahead, longest_that_fits, rows)
            figures = {"fill": round(ours, 4), "us_a_row": round(cost)}
            figures |= {"longest_that_fits": round(greedy, 4), "its_us_a_row": round(greedy_cost)}
            print(json.dumps({"lengths": kind, "look_ahead": look_ahead, **figures}))


def of_run(path: str, steps: int) -> None:
    config = load_config(["--config", path])
    tokenizer = TextTokenizer(config.data.text_model)
    layout = TokenLayout(tokenizer.size, code_ranges(config))
    form = OBJECTIVES.get(config.objective.kind).rows
    assert form is not None, config.objective.kind
    with Loader(config, 0, 1, layout, tokenizer, form(config.objective)) as loader:
        rows = [batch for _ in range(steps) for batch in loader.next().values()]
    used = [float((batch.segment_T > 0).float().mean()) for batch in rows]
    print(json.dumps({"rows": len(rows), "fill": round(sum(used) / len(used), 4), "least": round(min(used), 4)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run whose own mixture is packed")
    parser.add_argument("--rows", type=int, default=400, help="rows, or steps of a run")
    options = parser.parse_args()
    if options.config:
        of_run(options.config, options.rows)
    else:
        generated(options.rows)


if __name__ == "__main__":
    main()
