"""Text, which the decoder reads itself: no encoder, no placeholder."""

from __future__ import annotations

from megatron_gemini.modalities.spec import ModalitySpec

TEXT: ModalitySpec[None, str] = ModalitySpec(name="text", members=("txt", "text", "caption"))
