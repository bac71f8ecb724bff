"""A packed row as bytes between processes: a line of JSON about it, and its tensors back to back. Nothing executes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import torch

from megatron_gemini.contracts import Batch, Media

_ALIGNED = 64  # bytes: where each tensor begins


def to_bytes(batch: Batch, extra: dict[str, Any]) -> tuple[bytes, bytearray]:
    """(header, body). extra: JSON values that travel along."""
    rest = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if not f.name.endswith("_T")}
    media = rest.pop("media")
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name.endswith("_T")}
    for name, inputs in media.items():
        tensors |= {f"{name}.{f.name}": getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    places: list[Any] = []
    size = 0
    for name, tensor in tensors.items():
        places.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size])
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    body = bytearray(size)
    for (*_, begin), tensor in zip(places, tensors.values(), strict=True):
        content = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
        np.frombuffer(body, np.uint8)[begin : begin + len(content)] = content
    header = {"extra": extra, "rest": rest, "tensors": places, "bytes": size, "media": list(media)}
    return json.dumps(header).encode(), body


def parse_header(header: bytes) -> dict[str, Any]:
    """What `to_bytes` said of a row: its `extra`, and the length of its body as `bytes`."""
    return json.loads(header)


def from_bytes(header: dict[str, Any], body: torch.Tensor) -> Batch:
    """The row, whose tensors are views of `body`, uint8[header["bytes"]]."""
    tensors: dict[str, Any] = {}
    for name, dtype, shape, begin in header["tensors"]:
        kind: torch.dtype = getattr(torch, dtype)
        count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        tensors[name] = body[begin : begin + count].view(kind).view(shape)
    media = {
        name: Media(**{f.name: tensors.pop(f"{name}.{f.name}") for f in dataclasses.fields(Media)})
        for name in header["media"]
    }
    return Batch(**tensors, media=media, **header["rest"])


def pinned(batch: Batch) -> Batch:
    """The same row in page-locked memory, from where it is copied to a GPU while other work goes on."""
    columns = {f.name: getattr(batch, f.name).pin_memory() for f in dataclasses.fields(batch) if f.name.endswith("_T")}
    media = {
        name: Media(**{f.name: getattr(inputs, f.name).pin_memory() for f in dataclasses.fields(inputs)})
        for name, inputs in batch.media.items()
    }
    return dataclasses.replace(batch, **columns, media=media)
