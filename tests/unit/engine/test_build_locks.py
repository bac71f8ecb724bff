"""Locks that killed processes left beside compiled operators."""

from __future__ import annotations

import os

import pytest

from megatron_gemini.engine.build_locks import remove_stale_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
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


def test_a_job_of_several_nodes_leaves_locks_alone(lock, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert remove_stale_locks() == []
    assert lock.exists()
