"""The index of an MP4 before FFmpeg sees it.

FFmpeg makes 24 bytes or more of every frame that an index speaks of, when the file is opened. An index may speak of any
number of them in a few bytes ("so many frames of equal size"): a file of 1.6 kB took 5.5 GB. So the tables are looked
for here, wherever they are, in all of the file but the media data.
"""

from __future__ import annotations

import re
import struct

from megatron_gemini.modalities.bad_sample import BadSample

_OTHER_CONTAINERS = (b"\x1a\x45\xdf\xa3", b"RIFF", b"\x47")  # Matroska, AVI, MPEG-TS: their frames are their own index
_TABLE = re.compile(b"stsz|stz2|trun|cmov")


def check_index(data: bytes, max_frames: int) -> None:
    """Refuses an MP4 or MOV whose index speaks of more than `max_frames` frames, sound included, or is compressed.

    Raises BadSample: video_too_many_frames, video_unreadable.
    """
    if data.startswith(_OTHER_CONTAINERS):
        return
    frames = 0
    for begin, end in _beside_media(data):
        for found in _TABLE.finditer(data, begin, end):
            kind, place = found.group(), found.end()
            if kind == b"cmov":
                raise BadSample("video_unreadable", "the video's index is compressed, which is not supported")
            offset = 4 if kind == b"trun" else 8  # behind version and flags, and the size of all frames
            count = int.from_bytes(data[place + offset : place + offset + 4], "big")
            if kind == b"trun" or not _is_plain_sound(data, begin, place):
                frames += count
            if frames > max_frames:
                raise BadSample(
                    "video_too_many_frames", f"the index speaks of {frames:,} frames; the limit is {max_frames:,}"
                )


def _beside_media(data: bytes) -> list[tuple[int, int]]:
    """(begin, end) of every top-level box but `mdat`; where the boxes make no sense, the rest of the file."""
    parts: list[tuple[int, int]] = []
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        # ISO/IEC 14496-12, section 4.2: size 1 announces one of 64 bits behind the name, and size 0 is a last box that
        # reaches to the end of the file.
        if size == 1 and place + 16 <= len(data):
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        elif size == 0:
            size = len(data) - place
        if size < 8:
            return [*parts, (place, len(data))]
        if kind != b"mdat":
            parts.append((place, min(place + size, len(data))))
        place += size
    return parts


def _is_plain_sound(data: bytes, begin: int, place: int) -> bool:
    """Whether the table at `place` is of a sound track of PCM samples, which FFmpeg does not list one by one.

    Each of them lasts one tick, and they are as many as the sampling rate says.
    """
    track = max(data.rfind(b"trak", begin, place), begin)
    end = data.find(b"trak", place)
    content = data[track : end if end >= 0 else len(data)][: 1024 * 1024]
    # A table of times (`stts`): version and flags, the number of entries (1), how many samples, the ticks of each (1).
    one_tick = re.findall(rb"stts....(\x00\x00\x00\x01....\x00\x00\x00\x01)?", content, re.DOTALL)
    return b"soun" in content and b"vide" not in content and len(one_tick) == 1 and one_tick[0] != b""
