"""What every test gets: one thread, all the time it wants, and a reason instead of a failure where there is no GPU."""

from __future__ import annotations

import hypothesis
import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
    hypothesis.settings.register_profile("shared cores", deadline=None)  # 200 ms are gone at once on a busy machine
    hypothesis.settings.load_profile("shared cores")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
