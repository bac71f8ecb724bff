"""A packed row as bytes between processes: a line of JSON about it, and its tensors back to back. Nothing executes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

import numpy as np
import torch

from megatron_gemini.contracts import Batch, Media

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

_ALIGNED = 64  # bytes: a view of wider values must begin at a multiple of their size; 64 is a line of the cache
_TENSORS = tuple(f.name for f in dataclasses.fields(Batch) if f.name.endswith("_T"))
_MEDIA = tuple(f.name for f in dataclasses.fields(Media))


class Place(NamedTuple):
    """A tensor in the body. part: "row", "columns", or the encoder whose media it belongs to, behind "media."."""

    part: str
    name: str
    dtype: str
    shape: list[int]
    begin: int


class Header(TypedDict):
    """What is said of a row. extra: what travels along. bytes: length of the body. samples: as in `Batch`."""

    extra: Mapping[str, Plain]
    samples: list[str]
    tensors: list[Place]
    bytes: int


def _parts(batch: Batch) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(part, name, tensor) of every tensor of a row."""
    yield from (("row", name, getattr(batch, name)) for name in _TENSORS)
    yield from (("columns", name, column) for name, column in batch.columns.items())
    for encoder, media in batch.media.items():
        yield from ((f"media.{encoder}", name, getattr(media, name)) for name in _MEDIA)


def to_bytes(batch: Batch, extra: Mapping[str, Plain]) -> tuple[bytes, bytearray]:
    """(header, body). extra: JSON values that travel along."""
    places: list[Place] = []
    size = 0
    for part, name, tensor in _parts(batch):
        places.append(Place(part, name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    body = bytearray(size)
    for place, (_, _, tensor) in zip(places, _parts(batch), strict=True):
        content = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
        np.frombuffer(body, np.uint8)[place.begin : place.begin + len(content)] = content
    header = Header(extra=extra, samples=batch.samples, tensors=places, bytes=size)
    return json.dumps(header).encode(), body


def parse_header(header: bytes) -> Header:
    """What `to_bytes` said of a row: its `extra`, and the length of its body as `bytes`."""
    return cast("Header", json.loads(header))


def from_bytes(header: Header, body: torch.Tensor) -> Batch:
    """The row, whose tensors are views of `body`, uint8[header["bytes"]]."""
    # Views, no copies: with page-locked memory the tensors are where the GPU takes them from.
    parts: dict[str, dict[str, torch.Tensor]] = {"row": {}, "columns": {}}
    for part, name, dtype, shape, begin in header["tensors"]:
        kind: torch.dtype = getattr(torch, dtype)
        count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        parts.setdefault(part, {})[name] = body[begin : begin + count].view(kind).view(shape)
    row, columns = parts.pop("row"), parts.pop("columns")
    media = {part.removeprefix("media."): Media(**tensors) for part, tensors in parts.items()}
    return Batch(**row, columns=columns, media=media, samples=header["samples"])


def pinned(batch: Batch) -> Batch:
    """The same row in page-locked memory, from where it is copied to a GPU while other work goes on."""
    media = {
        encoder: Media(**{name: getattr(each, name).pin_memory() for name in _MEDIA})
        for encoder, each in batch.media.items()
    }
    return Batch(
        **{name: getattr(batch, name).pin_memory() for name in _TENSORS},
        columns={name: column.pin_memory() for name, column in batch.columns.items()},
        media=media,
        samples=batch.samples,
    )
