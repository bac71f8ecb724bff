"""TensorBoard and Weights & Biases, each imported only where the configuration asks for it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from megatron_gemini.config.run import RunConfig

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the records of a run, in the order of their steps. Whatever it raises is a warning (`warn_of`)."""

    name: str

    def write(self, step: int, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(config: RunConfig, run_dir: Path, start_step: int) -> list[Tracker]:
    """The trackers that `config.logging` asks for. Raises a `ValueError` for one that is not installed."""
    made: list[tuple[str, Callable[[], Tracker]]] = []
    if config.logging.tensorboard:
        made.append((_TensorBoard.name, lambda: _TensorBoard(run_dir / "tensorboard", start_step)))
    if config.logging.wandb_project:
        made.append((_WeightsAndBiases.name, lambda: _WeightsAndBiases(config, run_dir, start_step)))
    trackers: list[Tracker] = []
    for name, make in made:
        try:
            trackers.append(make())
        except NotInstalledError:
            raise
        except Exception as error:
            warn_of(name, error)
    return trackers


def warn_of(name: str, error: Exception) -> None:
    """Say that a tracker or a figure is given up, and that the run is not."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning("%s failed and is left out from here on; the run goes on: %s", name, what)


class NotInstalledError(ValueError):
    """A tracker that is asked for is not there, which is known before the first step."""


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, directory: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise NotInstalledError(
                "logging.tensorboard is true, but TensorBoard is not installed; "
                "pip install tensorboard, or set logging.tensorboard to false"
            ) from error
        # The events after the checkpoint that a run resumes from stay in the files; TensorBoard hides them.
        self.writer = SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            self.writer.add_scalar(_grouped(name), value, step)

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    """The key comes from the user's own login (`wandb login`); only the run's configuration is sent."""

    name = "Weights & Biases"

    def __init__(self, config: RunConfig, run_dir: Path, start_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise NotInstalledError(
                f"logging.wandb_project is {config.logging.wandb_project!r}, but Weights & Biases is not installed; "
                "pip install wandb, or set logging.wandb_project to ''"
            ) from error
        identity = run_dir / "wandb_run_id"
        known = identity.read_text().strip() if start_step and identity.exists() else None
        self.run = wandb.init(
            project=config.logging.wandb_project,
            name=run_dir.name,
            id=known,
            resume="allow" if known else None,
            dir=str(run_dir),
            config=dataclasses.asdict(config),
        )
        # For a resume, which then goes on with the same curves instead of beginning new ones.
        identity.write_text(f"{self.run.id}\n")

    def write(self, step: int, record: Mapping[str, float]) -> None:
        self.run.log({_grouped(name): value for name, value in record.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self.run.finish()


def _grouped(name: str) -> str:
    """`validation_loss_text` belongs to the figure `validation_loss`, `share_audio` to `share`: they use a slash."""
    for group in ("validation_loss", "loss", "share"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(group + '_')}"
    return name
