"""What the training of the image tokenizer agrees on with other ranks. The collectives are stood in for."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.objectives.image_tokenizer import objective as training
from megatron_gemini.objectives.image_tokenizer.spec import ImageTokenizerObjectiveConfig
from megatron_gemini.parallel.topology import Topology
from tests.end_to_end.dataset import write_tar
from tests.unit.objectives.test_image_tokenizer_images import png


class SharedError(Exception):
    """Raised in the place of the error that all ranks share."""


def config(folder: Path) -> RunConfig:
    write_tar(folder / "good.tar", {f"{number}": {"png": png(10 * number)} for number in range(4)})
    write_tar(folder / "bad.tar", {f"{number}": {"png": b"no image"} for number in range(4)})
    return RunConfig(
        image_tokenizer=ImageTokenizerConfig(image_size=8, patch=4),
        objective=ImageTokenizerObjectiveConfig(images_per_step=2),
        data=DataConfig(
            sources=(SourceConfig(str(folder / "good.tar")),), validation=(SourceConfig(str(folder / "bad.tar")),)
        ),
    )


def test_ranks_compare_settings_and_shards_before_an_engine_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []

    def preflight(settings: int, shards: int, topology: Topology, device: torch.device) -> NoReturn:
        compared.append((settings, shards))
        raise SharedError

    monkeypatch.setattr(training, "preflight", preflight)
    first = config(tmp_path)
    for change in ((), ("more",)):
        for name in change:  # another number of samples in a shard of the same name
            write_tar(tmp_path / "good.tar", {name: {"png": png(1)}})
        with pytest.raises(SharedError):
            training.ImageTokenizerTraining(first, Topology.serial(), torch.device("cpu"))
    assert compared[0][0] == compared[1][0]
    assert compared[0][1] != compared[1][1]


def test_what_one_rank_cannot_read_of_the_validation_data_is_told_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def raise_together(problem: str, topology: Topology, device: torch.device) -> None:
        told.append(problem)
        raise SharedError

    monkeypatch.setattr(training, "raise_together", raise_together)
    monkeypatch.setattr(training, "WholeModelEngine", lambda *_: None)
    objective = training.ImageTokenizerTraining(config(tmp_path), Topology.serial(), torch.device("cpu"))
    with pytest.raises(SharedError):
        objective.validation()
    assert "images cannot be read" in told[0]
