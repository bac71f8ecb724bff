"""Whole weights by name, whichever kind of files they lie in: a training checkpoint's pieces, or one file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_gemini.checkpoint.directory import is_complete, resolve, verify
from megatron_gemini.checkpoint.pieces import PieceReader

WEIGHTS = "model.safetensors"  # whole weights by name, for inference only


class WeightReader(Protocol):
    """Whole parameters by name. Errors are ValueErrors that name the file."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def weight(self, name: str) -> torch.Tensor:
        """float32 [shape], read from the disk now."""
        ...


class WholeReader:
    """Parameters of one safetensors file. Raises ValueError that names the file where it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def names(self) -> list[str]:
        return sorted(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def weight(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name).float()  # files of other tools have bf16


def find_weights(path: Path) -> Path:
    """The folder that holds the weights a user means: of one file, a step directory, or a run's newest checkpoint.

    Raises ValueError where there is none.
    """
    return path if (path / WEIGHTS).is_file() else resolve(path)


def verify_weights(directory: Path) -> None:
    """Compare with the index what `find_weights` found. Raises ValueError that names a damaged file.

    Weights in one file have no index of their own, unless they lie in a step directory, whose index has them.
    """
    if is_complete(directory):
        verify(directory)
    elif is_complete(directory.parent):
        verify(directory.parent)


def open_weights(directory: Path) -> WeightReader:
    """A reader of what `find_weights` found."""
    return WholeReader(directory / WEIGHTS) if (directory / WEIGHTS).is_file() else PieceReader(directory)
