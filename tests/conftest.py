"""What every test gets: one thread, all the time it wants, and a reason instead of a failure where there is no GPU."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# No deadline: 200 ms are gone at once on a busy machine. A run tries the same examples as the one before, so that it
# says something of the change and not of its luck; `bash tests/run.sh --hypothesis-profile random` looks for new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("same")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
