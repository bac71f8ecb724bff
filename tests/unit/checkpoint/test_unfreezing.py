"""A module that was frozen goes on with fresh moments, on every kind of engine, and resumes to the bit from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_gemini.checkpoint.index import seal
from megatron_gemini.checkpoint.load import load
from megatron_gemini.checkpoint.run_state import RunState, read_progress
from megatron_gemini.checkpoint.save import save
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.parallel.topology import Topology
from tests.unit.engine.tiny_engines import alone_in_the_world, config_of, engine_of

KINDS = ["plain", "stage 1", "stage 2, offloaded", "stage 3", "stage 3, offloaded"]
INPUTS = [torch.linspace(-1.0, 1.0, 8) * scale for scale in (1.0, -2.0, 3.0)]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with alone_in_the_world():
        yield


class OneEngine(Engine):
    """A tiny module, frozen or trained."""

    def __init__(self, kind: str) -> None:
        super().__init__(config_of(kind), Topology.serial(), torch.device("cpu"))
        self.whole = engine_of(kind)
        (self.frozen if isinstance(self.whole, FrozenEngine) else self.parts).append(self.whole)  # type: ignore[arg-type]

    def forward_backward(self, step: torch.Tensor, weight: float, collect: Callable[[None], None]) -> None:
        self.parts[0].backward(self.parts[0].forward(step), boundary=True)

    def evaluate(self, step: None, collect: Callable[[None], None]) -> None:
        raise AssertionError("it is only trained")

    def train(self, inputs: list[torch.Tensor]) -> list[list[float]]:
        """The weights after every step."""
        after = []
        for x in inputs:
            self.forward_backward(x, 1.0, lambda _: None)
            assert not self.step(1e-2).skipped
            after.append([v for f in self.whole.owned() for v in f.master().detach().flatten().tolist()])
        return after


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_frozen_trains_as_a_new_module_and_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    frozen = save(OneEngine("frozen"), tmp_path / "frozen", RunState(step=5, optimizer_steps=5), {}, keep=1)
    new = OneEngine(kind)
    load(new, as_new(shutil.copytree(frozen, tmp_path / "new")))
    wanted = new.train(INPUTS)

    unfrozen = OneEngine(kind)
    progress = load(unfrozen, frozen)
    assert progress.told == ["v, w (2 parameters): frozen until now, the optimizer's moments begin fresh"]
    assert unfrozen.train(INPUTS[:2]) == wanted[:2]
    progress.step, progress.optimizer_steps = 7, 7
    saved = save(unfrozen, tmp_path / "on", progress, {}, keep=1)
    again = OneEngine(kind)
    resumed = load(again, saved)
    assert resumed.moments_since == {"w": 5, "v": 5} and not resumed.told
    assert again.train(INPUTS[2:]) == wanted[2:]


def as_new(directory: Path) -> Path:
    """The same weights as of a run that has made no step."""
    path = directory / "state.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"optimizer_steps": 0}))
    seal(directory)
    return directory


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "5"},
        {"step": True},
        {"tokens": 1 << 70},
        {"seconds": "long"},
        {"seconds": [1]},
        {"optimizer_steps": None},
        {"moments_since": [1]},
        {"moments_since": {"w": "x"}},
        {"run": "x"},
        {"told": ["x"]},
    ],
)
def test_a_crafted_state_is_refused_in_one_line(change: dict[str, object], tmp_path: Path) -> None:
    state = {"step": 5, "tokens": 1, "seconds": 1.0, "optimizer_steps": 5, "moments_since": {}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert read_progress(tmp_path).step == 5
    (tmp_path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(ValueError, match=r"has no readable state: \S") as error:
        read_progress(tmp_path)
    assert "\n" not in str(error.value)
