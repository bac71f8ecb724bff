"""What every test gets: one thread, all its time, the built-in registries, and a reason to skip without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from megatron_gemini.registry import CONNECTORS, ENCODERS, FORMATS, METRICS, MODALITIES, OBJECTIVES, OPERATIONS, TASKS

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


@pytest.fixture(scope="module", autouse=True)
def built_in_registries() -> Iterator[None]:
    """A file's toy entries go with it: one left behind changed `--help` and took a name in the files after it."""
    registries = (CONNECTORS, ENCODERS, FORMATS, METRICS, MODALITIES, OBJECTIVES, OPERATIONS, TASKS)
    before = [registry.names for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names) - set(names):
            registry.unregister(name)


@pytest.fixture(scope="module", autouse=True)
def no_rank_variables() -> Iterator[None]:
    """A file that joined a world of one takes its address along: commands of later files would listen on its port."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
