"""What a compressed recording says of its own end, where a cut one could pass for a shorter whole one."""

from __future__ import annotations

import re

from megatron_gemini.modalities.bad_sample import BadSample

_OGG_HEADER = 27  # bytes of a page before the table of its segments (RFC 3533, section 6)
_FIRST_PAGE, _LAST_PAGE = 2, 4  # of a stream, as flags
_VBRI = 36  # bytes before this tag, in the first frame


def declared_bytes(data: bytes) -> int:
    """Bytes that the header of a WAV, RF64, Wave64 or AIFF file says the whole has; 0 for any other."""
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8
    if data[:4] == b"RF64" and data[12:16] == b"ds64":  # EBU Tech 3306
        return int.from_bytes(data[20:28], "little") + 8
    if data[:4] == b"riff":  # Sony's Wave64: behind a GUID, and it counts itself
        return int.from_bytes(data[16:24], "little")
    if data[:4] == b"FORM":
        return int.from_bytes(data[4:8], "big") + 8
    return 0


def check_ogg_end(data: bytes) -> None:
    """Refuses an Ogg file whose last page is cut, or that has a stream without a last page.

    Raises BadSample: audio_truncated.
    """
    place, open_streams = 0, set[bytes]()
    while place >= 0:
        flags, serial = data[place + 5 : place + 6], data[place + 14 : place + 18]
        segments = data[place + _OGG_HEADER : place + _OGG_HEADER + data[place + 26]] if place + 26 < len(data) else b""
        end = place + _OGG_HEADER + len(segments) + sum(segments)
        if place + 26 >= len(data) or len(segments) < data[place + 26] or end > len(data):
            raise BadSample("audio_truncated", f"the Ogg file breaks off within a page, after {len(data):,} bytes")
        if flags[0] & _FIRST_PAGE:
            open_streams.add(serial)
        if flags[0] & _LAST_PAGE:
            open_streams.discard(serial)
        # Pages follow each other; what is between them is damage, over which decoders go on to the next one.
        place = data.find(b"OggS", end)
    if open_streams:
        raise BadSample("audio_truncated", "the Ogg file has no last page: it was cut")


def mp3_frames(data: bytes) -> int:
    """Frames that the tag in an MP3's first frame (Xing, Info or VBRI) speaks of; 0 where there is no such tag."""
    place = 0
    while data[place : place + 3] == b"ID3" and len(data) >= place + 10:
        # ID3v2: the size of what follows the ten bytes, seven bits a byte.
        size = zip(data[place + 6 : place + 10], (21, 14, 7, 0), strict=True)
        place += 10 + sum((byte & 127) << shift for byte, shift in size)
    first = data[place : place + 256]
    if found := re.search(rb"(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f](....)", first, re.DOTALL):
        return int.from_bytes(found[1], "big")
    if first[_VBRI : _VBRI + 4] == b"VBRI":
        return int.from_bytes(first[_VBRI + 14 : _VBRI + 18], "big")
    return 0
