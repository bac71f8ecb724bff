"""Breadth-first pipelines gather a stage's ZeRO-3 weights once a pass, however many microbatches go through it."""

from __future__ import annotations

import json

import pytest

from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, int]]:
    out = tmp_path_factory.mktemp("gathers") / "out.json"
    ended = run_ranks("tests.distributed.gather_counts", 4, out, log=out.with_suffix(".log"))
    assert ended.status == 0, ended.output
    return {
        (case["layout"]["schedule"], case["layout"]["virtual_stages"]): case for case in json.loads(out.read_text())
    }


@pytest.mark.parametrize("virtual", [1, 2])
def test_breadth_first_gathers_each_stage_once_forward_and_once_backward(found: dict, virtual: int) -> None:
    assert found["breadth_first", virtual]["4"] == found["breadth_first", virtual]["8"] == 2 * virtual


def test_1f1b_gathers_for_every_microbatch(found: dict) -> None:
    """So that the count above can fail."""
    assert found["1f1b", 1]["8"] > 1.5 * found["1f1b", 1]["4"] > 8
