"""Text from files."""

from __future__ import annotations

import codecs

from megatron_gemini.modalities.bad_sample import BadSample


def check_text(text: str) -> str:
    """The text as it is. Raises BadSample: bad_text, for half of a surrogate pair, which JSON can say and UTF-8 not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise BadSample("bad_text", f"the text has half of a character, {half}, which UTF-8 cannot hold") from None
    return text


def decode_text(data: bytes) -> str:
    """UTF-8 text without a byte order mark and the white space around it. Raises BadSample: bad_text, empty_text."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadSample("bad_text", "the text is UTF-16; write it as UTF-8")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadSample("bad_text", "the text is not UTF-8") from None
    if "\0" in text:
        raise BadSample("bad_text", "the text has NUL characters, as UTF-16 read as UTF-8; write it as UTF-8")
    if not text:
        raise BadSample("empty_text", "the text is empty")
    return text
