"""Opening a file of sound or pictures that move with FFmpeg, which is told before how little it may do."""

from __future__ import annotations

import io

import av
from av.container import InputContainer


def open_media(data: bytes, formats: str, max_pixels: int) -> InputContainer:
    """The file as an open container. formats: FFmpeg's names of those that are read, with commas between.

    FFmpeg decodes a first picture of every stream while it opens the file, a cover in a sound's tag included: 650 kB of
    PNG took 650 MB. A picture of more than `max_pixels` is not decoded. Playlists are none of the formats: FFmpeg would
    open whatever paths and addresses they name.
    """
    options = {"format_whitelist": formats, "protocol_whitelist": "file", "max_pixels": str(max_pixels)}
    return av.open(io.BytesIO(data), mode="r", options=options)
