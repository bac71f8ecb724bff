"""Files that a user names in a prompt, read into items."""

from __future__ import annotations

from pathlib import Path

from megatron_gemini.config.run import RunConfig
from megatron_gemini.data.samples.items import Item, Text
from megatron_gemini.registry import MODALITIES

# Of a file that a person names, read whole into memory: far more than any prompt takes, far less than a disk image.
MAX_BYTES = 512 * 1024 * 1024


def read_item(kind: str, value: str, config: RunConfig) -> Item:
    """A prompt item. kind: "text" (value is the text), or another modality (value is a path).

    Raises ValueError that names the file and what is wrong with it.
    """
    if kind == "text":
        return Text(value)
    data = _read(kind, Path(value))
    try:
        spec = MODALITIES.get(kind)
        assert spec.decode is not None, kind
        return spec.decode(data, config.encoders[spec.encoder])
    except ValueError as error:
        raise ValueError(f"{value}: {error}") from error


def _read(kind: str, path: Path) -> bytes:
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"--{kind} {path} {what}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"--{kind} {path} has {size:,} bytes; the limit is {MAX_BYTES:,}")
    return path.read_bytes()
