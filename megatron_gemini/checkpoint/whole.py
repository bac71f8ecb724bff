"""A checkpoint's weights in one file, in a folder that generation and evaluation take like a checkpoint."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch

from megatron_gemini.checkpoint.directory import verify
from megatron_gemini.checkpoint.index import INDEX, read_index, seal
from megatron_gemini.checkpoint.tensor_file import Outgoing, write_tensors
from megatron_gemini.checkpoint.weights import WEIGHTS, open_weights


def write_whole(directory: Path, out: Path, dtype: str) -> int:
    """Write the weights of a step directory with all that is beside them, but for what only training needs.

    Holds one parameter at a time. dtype: torch's name of it. Returns the number of parameters.
    """
    verify(directory, but_pieces=True)
    reader = open_weights(directory)
    out.mkdir(parents=True)
    for name in read_index(directory).files:
        if not name.startswith(("rank-", "state.json")) and name not in (WEIGHTS, INDEX):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / name, out / name)
    kind: torch.dtype = getattr(torch, dtype)
    tensors = [Outgoing(name, reader.shape(name), kind, partial(reader.weight, name)) for name in reader.names()]
    entry = write_tensors(out / WEIGHTS, tensors)
    seal(out, read_index(directory).run, entries={WEIGHTS: entry})
    return sum(torch.Size(each.shape).numel() for each in tensors)
