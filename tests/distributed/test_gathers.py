"""Breadth-first pipelines gather a stage's ZeRO-3 weights once a pass, however many microbatches go through it, and
every engine whose weights are few gathers them once a step."""

from __future__ import annotations

import json

import pytest

from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, bool], dict[str, int]]:
    out = tmp_path_factory.mktemp("gathers") / "out.json"
    ended = run_ranks("tests.distributed.gather_counts", 4, out, log=out.with_suffix(".log"))
    assert ended.status == 0, ended.output
    keys = ("schedule", "virtual_stages", "few_live")
    return {tuple(case["layout"][key] for key in keys): case for case in json.loads(out.read_text())}


@pytest.mark.parametrize("virtual", [1, 2])
def test_breadth_first_gathers_each_stage_once_forward_and_once_backward(found: dict, virtual: int) -> None:
    assert found["breadth_first", virtual, True]["4"] == found["breadth_first", virtual, True]["8"] == 2 * virtual


def test_1f1b_gathers_for_every_microbatch(found: dict) -> None:
    """So that the count above can fail."""
    assert found["1f1b", 1, True]["8"] > 1.5 * found["1f1b", 1, True]["4"] > 8


def test_few_weights_are_gathered_once_a_step(found: dict) -> None:
    assert found["1f1b", 1, False]["8"] == found["1f1b", 1, False]["4"] == 1
