"""What ranks tell each other before a step. The collective is stood in for: each rank sees what all ranks gave."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_gemini.engine import synchronize as agreement
from megatron_gemini.engine.synchronize import (
    StepFingerprint,
    config_digest,
    rows_digest,
    step_fingerprint,
    synchronize_step,
)
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import CONFIG, ROWS, T, rows

DEVICE = torch.device("cpu")
SAME = StepFingerprint(step=7, microbatches=4, row_tokens=96, encoders=("vision", "audio"), rows=1, config=5)


@pytest.fixture
def outcomes(monkeypatch):
    """f(topologies, fingerprints, ...) -> what `synchronize_step` gives or raises on each rank, as all of them would
    see it."""

    def run(topologies, fingerprints, weights=None, stops=None, problems=None):
        ranks = range(len(topologies))
        arguments = [
            ((weights or [1.0] * len(ranks))[r], (stops or [0] * len(ranks))[r], fingerprints[r], topologies[r], DEVICE)
            for r in ranks
        ]
        said = problems or [""] * len(ranks)
        rounds: list[list[torch.Tensor]] = []

        def record(mine, topology, device):
            calls.append(mine)
            if len(calls) <= len(rounds):
                return torch.stack(rounds[len(calls) - 1])
            raise StopIteration

        monkeypatch.setattr(agreement, "_gather", record)
        while True:  # one more collective is known in every turn
            found, told = [], []
            for r in ranks:
                calls: list[torch.Tensor] = []
                try:
                    found.append(synchronize_step(*arguments[r], said[r]))
                except ValueError as error:
                    found.append(str(error))
                except StopIteration:
                    told.append(calls[-1])
            if not told:
                return found
            assert len(told) == len(ranks), "some ranks wait for others in a collective"
            rounds.append(told)

    return run


def world(data: int = 1, tensor: int = 1, pipeline: int = 1) -> list[Topology]:
    sizes = {"world": data * tensor * pipeline, "tensor_size": tensor, "pipeline_size": pipeline, "data_size": data}
    places = [(p, d, t) for p in range(pipeline) for d in range(data) for t in range(tensor)]
    return [
        Topology(**sizes, rank=rank, pipeline_rank=p, data_rank=d, tensor_rank=t)
        for rank, (p, d, t) in enumerate(places)
    ]


def changed(number: int, ranks: int, **fields: object) -> list[StepFingerprint]:
    """The same fingerprint on all ranks but one."""
    return [dataclasses.replace(SAME, **fields) if rank == number else SAME for rank in range(ranks)]


def test_the_weight_of_a_row_counts_once(outcomes):
    topologies = world(data=2, tensor=2, pipeline=2)
    weights = [10.0 if topology.data_rank else 1.0 for topology in topologies]
    assert outcomes(topologies, [SAME] * 8, weights) == [(11.0, 0)] * 8


def test_a_request_to_stop_reaches_all(outcomes):
    assert outcomes(world(data=3), [SAME] * 3, stops=[0, 15, 0]) == [(3.0, 15)] * 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"microbatches": 3}, "rank 2 has 3 microbatches, all others 4"),
        ({"row_tokens": 64}, "rank 2 has rows of 64 tokens, all others 96"),
        ({"encoders": ("vision",)}, "rank 2 has the encoders vision, all others vision, audio"),
        ({"encoders": ()}, "rank 2 has the encoders none, all others vision, audio"),
        ({"step": 8}, "rank 2 has step 8 to take, all others 7"),
        ({"config": 6}, "rank 2: another configuration than all others"),
    ],
)
def test_a_difference_stops_every_rank_and_names_the_odd_one(outcomes, fields, words):
    found = outcomes(world(data=4), changed(2, 4, **fields))
    assert all(words in message for message in found)


def test_several_odd_ranks_are_named_together(outcomes):
    fingerprints = [dataclasses.replace(SAME, microbatches=count) for count in (5, 5, 4, 4, 5, 3)]
    (message,) = set(outcomes(world(data=6), fingerprints))
    assert "ranks 2, 3 have 4 microbatches, most 5; rank 5 has 3 microbatches, most 5" in message


def test_only_peers_must_hold_the_same_rows(outcomes):
    topologies = world(data=2, tensor=2)
    own = [dataclasses.replace(SAME, rows=topology.data_rank) for topology in topologies]
    assert outcomes(topologies, own) == [(2.0, 0)] * 4
    own[3] = dataclasses.replace(SAME, rows=9)
    (message,) = set(outcomes(topologies, own))
    assert "rank 3: other rows than rank 2, though both work on those of data rank 1" in message


def test_the_problem_of_one_rank_stops_all_of_them(outcomes):
    (message,) = set(outcomes(world(data=3), [SAME] * 3, problems=["", "sample a/b: too long é", ""]))
    assert message == "rank 1: sample a/b: too long é"


def test_a_step_without_loss_is_no_error_and_all_ranks_know_it(outcomes):
    assert outcomes(world(data=2), [SAME] * 2, weights=[0.0, 0.0]) == [(0.0, 0)] * 2


def test_a_process_by_itself_agrees_with_itself():
    batches = rows(0)
    fingerprint = step_fingerprint(3, batches, CONFIG, config_digest(CONFIG))
    assert (fingerprint.step, fingerprint.microbatches, fingerprint.row_tokens) == (3, ROWS, T)
    assert synchronize_step(2.5, 0, fingerprint, Topology.serial(), DEVICE) == (2.5, 0)


def test_the_digest_of_rows_sees_tokens_weights_and_sizes_of_media():
    digest = rows_digest(rows(0))
    assert digest == rows_digest(rows(0))
    changes = [
        lambda batch: batch.token_T[3:4].add_(1),
        lambda batch: batch.weight_T[3:4].add_(1),
        lambda batch: batch.segment_T[3:4].add_(1),
        lambda batch: batch.media["vision"].grid_I3[:1].add_(1),
        lambda batch: batch.media["vision"].time_I[:1].add_(1),
    ]
    for change in changes:
        batches = rows(0)
        change(batches[2])
        assert rows_digest(batches) != digest


def test_another_configuration_has_another_digest():
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, layers=3))
    assert config_digest(CONFIG) == config_digest(dataclasses.replace(CONFIG)) != config_digest(other)


def test_a_problem_that_all_ranks_have_is_told_without_naming_them(outcomes):
    assert set(outcomes(world(data=3), [SAME] * 3, problems=["no shards"] * 3)) == {"no shards"}
