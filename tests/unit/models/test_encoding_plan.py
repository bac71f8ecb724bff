"""Who encodes what: every rank comes to the same plan, and the plan covers every item once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.encoders import CostConfig, EncoderEnginesConfig
from megatron_gemini.models.encoders import Encoders, costs, encoded_counts, output_counts, run_lengths
from megatron_gemini.models.encoding_plan import (
    ENCODER,
    FRAMES,
    ROW,
    SECONDS,
    START,
    check_media,
    make_plan,
    size_table,
)
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import CONFIG, LAYOUT, rows, with_frozen
from tests.extension.halving import HALVING

LIMIT = 24
CHUNKED = dataclasses.replace(CONFIG, encoder_engines=EncoderEnginesConfig(chunk_tokens=LIMIT))


@st.composite
def tables(draw):
    """Tables of sizes of up to 3 data-parallel ranks; some have nothing, or nothing for one encoder."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        lines = draw(
            st.lists(
                st.tuples(
                    st.integers(0, 1), st.integers(0, 3), st.integers(0, 90), st.integers(1, 30), st.integers(1, 4)
                ),
                max_size=8,
            )
        )
        table = np.zeros((len(lines), 7))
        for line, (encoder, row, start, frames, side) in zip(table, sorted(lines), strict=True):
            grid = (frames, 1, 1) if encoder else (1, side, side)
            line[:] = (encoder, row, start, *grid, 0.0)
        found.append(table)
    return found


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(1, 2), st.booleans())
def test_all_ranks_agree_on_forwards_and_encode_every_item_once(sizes, peers, training):
    world = len(sizes) * peers
    plans = [
        make_plan(
            sizes,
            [3 * row % world for row in range(4 * len(sizes))],
            CHUNKED,
            Topology(world=world, rank=rank, data_size=len(sizes), data_rank=rank // peers, tensor_size=peers),
            training,
        )
        for rank in range(world)
    ]
    assert len({tuple(plan.forwards) for plan in plans}) == len({plan.balance for plan in plans}) == 1
    assert all((plan.items.rank == plans[0].items.rank).all() for plan in plans)
    for encoder in (0, 1):
        assigned = [item for plan in plans for chunk in plan.chunks[encoder] for item in chunk]
        assert sorted(assigned) == np.flatnonzero(plans[0].items.encoder == encoder).tolist()
        most = max(len(plan.chunks[encoder]) for plan in plans)
        assert plans[0].forwards[encoder] == max(most, int(training))
    for rank, plan in enumerate(plans):
        for chunk in (chunk for chunks in plan.chunks for chunk in chunks):
            assert set(plan.items.rank[chunk]) == {rank}
            assert plan.items.inputs[chunk].sum() <= LIMIT or len(chunk) == 1
    assert sum(map(len, sizes)) == 0 or 1.0 <= plans[0].balance <= world * (1 + 1e-9)


def test_a_frozen_encoder_without_items_does_not_run():
    frozen = dataclasses.replace(CONFIG, encoders=with_frozen(["vision"], []))
    plan = make_plan([np.empty((0, 7))], [0], frozen, Topology.serial(), training=True)
    assert plan.forwards == [0, 1] and plan.balance == 1.0


def test_the_table_has_a_line_for_every_item():
    table = size_table(rows(0)[:4], CONFIG)
    batches = rows(0)[:4]
    media = [batch.media[name] for name in ("vision", "audio") for batch in batches if name in batch.media]
    assert len(table) == sum(each.items for each in media)
    assert (np.diff(table[:, ENCODER]) >= 0).all()
    for line in table:
        batch = batches[int(line[ROW])]
        token = batch.token_T[int(line[START])]
        names = ("audio",) if line[ENCODER] else ("image", "video")
        assert token in [LAYOUT.control(name) for name in names]
        assert line[SECONDS] == (0.25 if line[FRAMES] == 2 else 0.0)


def test_sizes_tell_how_many_embeddings_come():
    model = Encoders(CONFIG, ("vision", "audio"))
    initialize(model, 0)
    for batch in rows(1):
        for name, media in batch.media.items():
            with torch.no_grad():
                encoded, grid_I3 = model(name, media), media.grid_I3.numpy()
            assert encoded_counts(name, grid_I3).sum() == len(encoded) == run_lengths(name, grid_I3).sum()
            assert output_counts(CONFIG, name, grid_I3).sum() == len(encoded)  # a linear connector keeps them all


def test_a_connector_shortens_every_run_and_not_their_sum(monkeypatch):
    """Four frames of three embeddings are halved to two each: eight, where half of twelve would be six."""
    monkeypatch.setattr("megatron_gemini.models.encoders.connector_of", lambda config, name: HALVING)
    assert output_counts(CONFIG, "vision", np.array([[4, 1, 3], [1, 2, 2]])).tolist() == [8, 2]


def test_a_clip_costs_its_frames_and_a_sound_its_square():
    vision, audio = CostConfig(1.0, 10.0, 100.0), CostConfig(2.0, 20.0, 200.0)
    assert costs("vision", np.array([[1, 2, 3], [4, 2, 3]]), vision).tolist() == [196.0, 784.0]
    assert costs("audio", np.array([[9, 1, 1]]), audio).tolist() == [2.0 * 9 + 20.0 * 3 + 200.0]


def test_media_that_fit_their_placeholders_pass():
    for batch in rows(0):
        check_media(batch, LAYOUT, CONFIG)


def test_a_missing_encoder_is_an_error_that_names_the_sample():
    off = dataclasses.replace(CONFIG.encoders["vision"], enabled=False)
    without = dataclasses.replace(CONFIG, encoders={**CONFIG.encoders, "vision": off})
    with pytest.raises(ValueError, match=r"sample 0/1: .* placeholders for the vision encoder"):
        check_media(rows(0)[0], LAYOUT, without)


def test_an_item_in_pieces_is_an_error():
    """Two pictures whose sizes are exchanged: as many placeholders, but the first item would not be one run."""
    batch = rows(0)[2]
    media = batch.media["vision"]
    assert media.items == 2 and media.grid_I3[0].prod() != media.grid_I3[1].prod()
    media.grid_I3 = media.grid_I3.flip(0)
    with pytest.raises(ValueError, match=r"sample .*2/3: the placeholders of one item of the vision encoder"):
        check_media(batch, LAYOUT, CONFIG)
