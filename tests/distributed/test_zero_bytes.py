"""The state of an engine by formula against what DeepSpeed really holds, at every ZeRO stage, on two ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_gemini.planning.zero_state import ZeroPlan, zero_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.long
RANKS = 2
ENGINES: list[dict[str, Any]] = [
    {"precision": precision, "zero_stage": stage, "offload_optimizer": offload}
    for precision in ("bf16", "fp32")
    for stage, offload in ((0, "none"), (1, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu"))
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> list[list[list[int]]]:
    """[bytes, parameters, largest] of every engine, rank by rank."""
    out = tmp_path_factory.mktemp("zero") / "out.json"
    given = (out, json.dumps(ENGINES))
    ended = run_ranks("tests.distributed.zero_bytes", RANKS, *given, log=out.with_suffix(".log"))
    assert ended.status == 0, ended.output
    return json.loads(out.read_text())


@pytest.mark.parametrize("number", range(len(ENGINES)), ids=lambda n: "-".join(map(str, ENGINES[n].values())))
def test_an_engine_holds_what_the_formula_says(counted, number):
    engine = ENGINES[number]
    plan = ZeroPlan(
        engine["zero_stage"],
        RANKS,
        engine["precision"] == "bf16",
        offload_optimizer=engine["offload_optimizer"] == "cpu",
    )
    for rank in range(RANKS):
        found, parameters, largest = counted[rank][number]
        state = zero_state(parameters, largest, plan)
        assert state.gpu.total + state.host.total == pytest.approx(found, rel=0.05)
        assert (state.host.total > 0) == plan.offload_optimizer
