"""What every rank encodes in a global step. All ranks work it out from the same sizes, without a further word.

Shape suffixes: I items, O encoder output embeddings, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.models.encoders import (
    costs,
    encoded_counts,
    gives_memory,
    input_counts,
    is_frozen,
    output_counts,
)
from megatron_gemini.models.placement import check_placeholders
from megatron_gemini.parallel.encoders.assignment import Items, assign, chunks, loads
from megatron_gemini.parallel.topology import Topology

# Columns of a table of sizes: float64, which holds all of them exactly. SECONDS: between two frames, `Media.time_I`.
ENCODER, ROW, START, FRAMES, ROWS, COLUMNS, SECONDS = range(7)


def check_media(batch: Batch, layout: TokenLayout, config: RunConfig) -> None:
    """Raise ValueError, unless every placeholder gets what is for it and those of an item are consecutive."""
    allowed = config.enabled_encoders
    memories = [name for name in allowed if gives_memory(config, name)]
    counts = {
        name: output_counts(config, name, media.grid_I3.cpu().numpy())
        for name, media in batch.media.items()
        if name in allowed
    }
    check_placeholders(batch, layout, {name: int(count_I.sum()) for name, count_I in counts.items()}, memories)
    for name, count_I in counts.items():
        token_O = batch.media[name].token_O.cpu().numpy()
        item_O = np.repeat(np.arange(len(count_I)), count_I)
        first_I = np.cumsum(count_I) - count_I
        # Embedding n of an item, from 0, belongs n * step positions behind its first one.
        step = 0 if name in memories else 1  # all embeddings of a memory's item belong to its one placeholder
        if (token_O - token_O[first_I][item_O] != step * (np.arange(len(token_O)) - first_I[item_O])).any():
            raise ValueError(
                f"sample {', '.join(batch.samples)}: the placeholders of one item of the {name} encoder have other "
                "tokens between them; an image, clip or sound is one run of placeholders"
            )


def size_table(batches: Sequence[Batch], config: RunConfig) -> np.ndarray:
    """float64[I, 7]: a line for every item of a data-parallel rank's rows, by encoder, row and place in the row."""
    lines = [np.empty((0, 7))]  # rows without items still give a table, since every rank sends one
    for encoder, name in enumerate(config.enabled_encoders):
        for row, batch in enumerate(batches):
            if name not in batch.media:
                continue
            media = batch.media[name]
            grid_I3 = media.grid_I3.cpu().numpy()
            count_I = output_counts(config, name, grid_I3)
            start_I = media.token_O.cpu().numpy()[np.cumsum(count_I) - count_I]
            line = np.empty((len(grid_I3), 7))
            line[:, ENCODER], line[:, ROW], line[:, START] = encoder, row, start_I
            line[:, FRAMES : COLUMNS + 1], line[:, SECONDS] = grid_I3, media.time_I.cpu().numpy()
            lines.append(line)
    return np.concatenate(lines)


@dataclass(frozen=True)
class EncodingPlan:
    """Who encodes what in a step.

    grid_I3, seconds_I: of every item, as in `contracts.Media`. chunks: of each encoder, the items (numbers) of each of
    this rank's forwards. forwards: of each encoder, how many forwards every rank runs; those without items are dummies.
    balance: the cost of the most expensive rank over the mean, 1 if there is nothing to encode.
    """

    items: Items
    grid_I3: np.ndarray
    seconds_I: np.ndarray
    chunks: list[list[list[int]]]
    forwards: list[int]
    balance: float


def make_plan(
    tables: Sequence[np.ndarray], readers: Sequence[int], config: RunConfig, topology: Topology, training: bool
) -> EncodingPlan:
    """tables: `size_table` of every data-parallel rank. readers: as in `StepRows`. training: a trained encoder runs at
    least once.

    Items of each encoder are assigned on their own: ranks run one encoder after the other and under ZeRO-3 wait for
    each other in each. A rank with much to do for one encoder is the last to be given items of the next.
    """
    # Stable, here and in what follows: equal items keep the tables' order, which all ranks share, so all get one plan.
    home = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    table = np.concatenate(list(tables))
    order = np.argsort(table[:, ENCODER], kind="stable")
    table, home = table[order], home[order]
    whole = table[:, :SECONDS].astype(np.int64)
    encoder, grid_I3 = whole[:, ENCODER], whole[:, FRAMES : COLUMNS + 1]
    encoded, outputs, rank = np.zeros_like(encoder), np.zeros_like(encoder), np.zeros_like(encoder)
    names, load_R = config.enabled_encoders, np.zeros(topology.world)
    # Row r of data-parallel rank d is row r * data_size + d of the step.
    holder = np.array(readers, np.int64)[whole[:, ROW] * topology.data_size + home]
    for number, name in enumerate(names):
        of = encoder == number
        cost_I = costs(name, grid_I3[of], config.encoders[name].cost)
        encoded[of] = encoded_counts(name, grid_I3[of])
        outputs[of] = output_counts(config, name, grid_I3[of])
        rank[of] = assign(cost_I, holder[of], load_R)
        load_R = load_R + loads(cost_I, rank[of], topology.world)
    items = Items(encoder, home, whole[:, ROW], whole[:, START], input_counts(grid_I3), encoded, outputs, holder, rank)
    mine, forwards = [], []
    for number, name in enumerate(names):
        packed = _chunks(items, number, config.encoder_engines.chunk_tokens, topology.world)
        mine.append(packed[topology.rank])
        # ZeRO-3 would keep the gradient of the step before where no forward and backward overwrites it.
        least = int(training and not is_frozen(config, name))
        # The same number everywhere, as ZeRO-3 gathers weights and reduces gradients together with all ranks.
        forwards.append(max(least, *map(len, packed)))
    mean = load_R.mean()
    return EncodingPlan(items, grid_I3, table[:, SECONDS], mine, forwards, float(load_R.max() / mean) if mean else 1.0)


def _chunks(items: Items, encoder: int, limit: int, world: int) -> list[list[list[int]]]:
    """Of every rank, its forwards of one encoder, as numbers of items."""
    # Of all ranks and not only of this one: the largest number of forwards is everybody's.
    of = np.flatnonzero(items.encoder == encoder)
    of = of[np.argsort(items.rank[of], kind="stable")]
    ends = np.searchsorted(items.rank[of], np.arange(world), side="right")
    return [
        [share[chunk].tolist() for chunk in chunks(items.inputs[share].tolist(), limit)]
        for share in np.split(of, ends[:-1])
    ]
