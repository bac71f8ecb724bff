"""Text, which the decoder reads itself: no encoder, no placeholder."""

from __future__ import annotations

from megatron_gemini.modalities.spec import ModalitySpec
from megatron_gemini.modalities.text.preprocess import decode_text


def sizes(data: bytes) -> dict[str, float]:
    return {"text characters": len(decode_text(data))}


TEXT: ModalitySpec[None, str] = ModalitySpec(name="text", members=("txt", "text", "caption"), sizes=sizes)
