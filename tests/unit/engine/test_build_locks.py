"""Locks that killed processes left beside compiled operators."""

from __future__ import annotations

import os

import pytest

from megatron_gemini.engine import build_locks
from megatron_gemini.engine.build_locks import remove_stale_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name in ("LOCAL_SIZE", "SLURM_NNODES", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "an_operator" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_a_lock_that_nobody_holds_goes(lock):
    assert remove_stale_locks() == [lock]
    assert not lock.exists()


def test_a_lock_that_a_process_holds_stays(lock):
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        assert remove_stale_locks() == []
        assert lock.exists()
    finally:
        os.close(descriptor)


def test_a_lock_is_looked_at_again_a_second_later(lock, monkeypatch):
    slept, taken = [], []

    def take_it_meanwhile(seconds):
        slept.append(seconds)
        taken.append(os.open(lock, os.O_RDONLY))

    monkeypatch.setattr(build_locks.time, "sleep", take_it_meanwhile)
    try:
        assert remove_stale_locks() == []
        assert lock.exists() and slept == [1.0]
    finally:
        for descriptor in taken:
            os.close(descriptor)


# What torchrun, DeepSpeed's launcher and srun export; the jobs in examples/ start their ranks by srun.
SEVERAL = [
    {"LOCAL_WORLD_SIZE": "1"},
    {"LOCAL_SIZE": "1"},
    {"SLURM_NNODES": "2"},
    {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2"},
    {},  # a launcher that says nothing
]
ONE = [{"LOCAL_WORLD_SIZE": "2"}, {"LOCAL_SIZE": "2"}, {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "1"}]


@pytest.mark.parametrize("environment", SEVERAL)
def test_a_job_of_several_nodes_leaves_locks_alone(lock, monkeypatch, environment):
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert remove_stale_locks() == []
    assert lock.exists()


@pytest.mark.parametrize("environment", ONE)
def test_a_job_on_one_machine_removes_them_whatever_started_it(lock, monkeypatch, environment):
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert remove_stale_locks() == [lock]


def test_one_process_of_a_job_of_several_nodes_leaves_them_too(lock, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert remove_stale_locks() == []
    monkeypatch.delenv("SLURM_NNODES")
    assert remove_stale_locks() == [lock]
