"""Kills in the midst of what changes a file system, at every change in turn."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from megatron_gemini.checkpoint.blocks import BlockHash


class KilledError(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> bool:
    """Run `act`, killed before the given change of the file system. False if it makes fewer changes."""
    calls = 0
    changes = [(os, name) for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")]
    with monkeypatch.context() as patch:
        for where, name in [*changes, (BlockHash, "update")]:  # what is hashed has just been written
            true = getattr(where, name)

            def counted(*given: object, true: Callable[..., object] = true, **named: object) -> object:
                nonlocal calls
                calls += 1
                if calls == number:
                    raise KilledError
                return true(*given, **named)

            patch.setattr(where, name, counted)
        try:
            act()
        except KilledError:
            return True
    return False
