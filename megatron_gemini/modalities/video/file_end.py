"""Whether a clip's file is as long as its outermost element says.

FFmpeg reads a Matroska or AVI file that was cut as a shorter whole one. An MP4 has an index of all frames, and MPEG-TS
has neither.
"""

from __future__ import annotations

from megatron_gemini.modalities.bad_sample import BadSample

_NO_SIZE = 0x7FFFFF00  # what cannot go back to its header leaves the largest number there, or 0
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def check_end(data: bytes) -> None:
    """Raises BadSample: video_truncated."""
    declared = 0
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        size = int.from_bytes(data[4:8], "little")
        declared = size + 8 if size < _NO_SIZE else 0
    elif data.startswith(_EBML):
        content, size = _element_size(data, len(_EBML))
        segment = content + size
        if data[segment : segment + 4] == _SEGMENT:
            content, size = _element_size(data, segment + 4)
            declared = content + size
    if declared > len(data):
        raise BadSample("video_truncated", f"the video file has {len(data):,} of the {declared:,} bytes in its header")


def _element_size(data: bytes, place: int) -> tuple[int, int]:
    """(where the content begins, its bytes) of an EBML element whose size is at `place`; 0 bytes where it is open.

    RFC 8794, section 4: the zeros before the first 1 say how many bytes follow, and all ones mean an unknown size.
    """
    first = data[place] if place < len(data) else 0
    width = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + width], "big") & ((1 << 7 * width) - 1)
    return place + width, value if value != (1 << 7 * width) - 1 else 0
