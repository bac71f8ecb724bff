"""What lives at once: microbatches in flight against torch's own schedules, and what moves which bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from megatron_gemini.planning.activations import RowShare, layer_saved
from megatron_gemini.planning.memory import in_flight, rank_footprint
from tests.unit.planning.jobs import MODEL, job


def most_in_flight(kind: type, ranks: int, virtual: int, rows: int) -> list[int]:
    """Of every rank, by counting forwards and backwards in the order that a schedule of torch lays down."""
    stages = [
        SimpleNamespace(
            group_size=ranks,
            group_rank=0,
            num_stages=ranks * virtual,
            has_backward=True,
            stage_index=number * ranks,
            stage_index_to_group_rank={stage: stage % ranks for stage in range(ranks * virtual)},
            is_first=number == 0,
            is_last=False,
            device="cpu",
            submod=None,
            group=None,
        )
        for number in range(virtual)
    ]
    schedule = kind(stages, rows, loss_fn=lambda *_: 0, scale_grads=False)
    found = []
    for rank in range(ranks):
        alive = most = 0
        for action in filter(None, schedule.pipeline_order[rank]):
            alive += {"FORWARD": 1, "FULL_BACKWARD": -1}[action.computation_type.name]
            most = max(most, alive)
        found.append(most)
    return found


@pytest.mark.parametrize(("ranks", "virtual", "rows"), [(2, 2, 4), (4, 2, 8), (4, 2, 4), (2, 4, 16)])
def test_as_many_microbatches_wait_as_in_torchs_interleaved_and_breadth_first_orders(ranks, virtual, rows):
    for name, kind in (
        ("interleaved", schedules.ScheduleInterleaved1F1B),
        ("breadth_first", schedules.ScheduleLoopedBFS),
    ):
        planned = job(ranks, rows=rows, pipeline=ranks, virtual_stages=virtual, schedule=name)
        assert [in_flight(planned, rank) for rank in range(ranks)] == most_in_flight(kind, ranks, virtual, rows), name


def test_in_1f1b_the_first_rank_keeps_a_microbatch_for_every_rank_behind_it():
    planned = job(4, rows=8, pipeline=4)
    assert [in_flight(planned, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(job(4, rows=4, pipeline=1), 0) == 1


def test_offload_moves_the_optimizer_to_the_host_and_sharding_divides_it():
    here = rank_footprint(job(4, encoders=False), 0)
    there = rank_footprint(job(4, encoders=False, engine={"offload_optimizer": "cpu"}), 0)
    assert here.host.optimizer == there.gpu.optimizer == 0
    assert there.host.optimizer == here.gpu.optimizer > 0
    alone = rank_footprint(job(1, encoders=False), 0)
    assert alone.gpu.optimizer == pytest.approx(4 * here.gpu.optimizer)
    assert alone.gpu.weights == here.gpu.weights


def test_context_ranks_share_state_like_data_ranks():
    data = rank_footprint(job(4, encoders=False, engine={"zero_stage": 3}), 0)
    context = rank_footprint(job(4, encoders=False, engine={"zero_stage": 3}, context=2), 0)
    assert (context.gpu.weights, context.gpu.optimizer) == (data.gpu.weights, data.gpu.optimizer)
    assert context.gpu.activations < 0.6 * data.gpu.activations


def test_the_encoders_state_is_divided_over_the_whole_world_whatever_the_decoders_layout():
    def encoders(**layout) -> float:
        with_them, without = (rank_footprint(job(8, encoders=on, **layout), 0) for on in (True, False))
        return with_them.gpu.optimizer - without.gpu.optimizer

    assert encoders() == pytest.approx(encoders(tensor=2, pipeline=4, rows=8)) == pytest.approx(encoders(tensor=8))


def test_encoders_may_be_sharded_further_than_the_decoder():
    same, sharded = job(8), job(8, encoder_engines={"zero_stage": 3})
    counts = sum(same.trained)
    saved = rank_footprint(same, 0).gpu.weights - rank_footprint(sharded, 0).gpu.weights
    assert saved == pytest.approx(2 * counts * 7 / 8)


def test_frozen_encoders_have_weights_only():
    import dataclasses

    trained = job(2)
    config = trained.config
    frozen = dataclasses.replace(
        trained,
        config=dataclasses.replace(
            config,
            encoders={
                name: dataclasses.replace(
                    section, frozen=True, connector=dataclasses.replace(section.connector, frozen=True)
                )
                for name, section in config.encoders.items()
            },
        ),
    )
    bare = rank_footprint(job(2, encoders=False), 0).gpu
    found = rank_footprint(frozen, 0).gpu
    assert (found.gradients, found.optimizer) == (bare.gradients, bare.optimizer)
    assert found.weights - bare.weights == 2 * sum(trained.trained)


def test_breadth_first_zero3_holds_one_stage_gathered_and_every_microbatch():
    def planned(schedule: str, virtual: int):
        return job(4, encoders=False, engine={"zero_stage": 3}, pipeline=2, virtual_stages=virtual, schedule=schedule)

    wide, interleaved = rank_footprint(planned("breadth_first", 2), 0), rank_footprint(planned("interleaved", 2), 0)
    waiting = in_flight(planned("breadth_first", 2), 0) / in_flight(planned("interleaved", 2), 0)
    assert wide.gpu.activations == pytest.approx(waiting * interleaved.gpu.activations)
    two, four = (rank_footprint(planned("breadth_first", virtual), 0).gpu.buffers for virtual in (2, 4))
    halved = (
        planned("breadth_first", 2).stages_of(0)[0].parameters - planned("breadth_first", 4).stages_of(0)[0].parameters
    )
    buckets = 2 * 50_000_000 * 2  # two more engines have a bucket each
    assert two - four == pytest.approx(2 * halved - buckets)


def test_offloaded_activations_leave_two_layers_on_the_gpu():
    here = rank_footprint(job(1, encoders=False, engine={"recompute": "full"}), 0)
    there = rank_footprint(job(1, encoders=False, engine={"recompute": "full", "offload_activations": True}), 0)
    layer = layer_saved(MODEL, RowShare.of(job().config), "full")
    assert here.gpu.activations - there.gpu.activations == pytest.approx((MODEL.layers - 2) * layer)
    assert there.host.activations == pytest.approx(MODEL.layers * layer)
