"""Text from files."""

from __future__ import annotations

from megatron_gemini.modalities.bad_sample import BadSample


def decode_text(data: bytes) -> str:
    """UTF-8 text without the white space around it. Raises BadSample: bad_text, empty_text."""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("bad_text", "the text is not UTF-8") from None
    if not text:
        raise BadSample("empty_text", "the text is empty")
    return text
