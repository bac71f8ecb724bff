"""Operations on sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from megatron_gemini.config.encoders import AudioConfig
    from megatron_gemini.modalities.audio.item import Audio


def speed(
    audio: AudioConfig, slowest: float = 0.9, fastest: float = 1.1
) -> Callable[[Audio, np.random.Generator], Audio]:
    """Resampled to a random speed, and with it pitch (Ko et al. 2015), never beyond the encoder's max_seconds."""
    import numpy as np
    import soxr

    from megatron_gemini.modalities.audio.item import Audio

    if not 0.25 <= slowest <= fastest <= 4:
        raise ValueError(f"slowest is {slowest} and fastest {fastest}; they must be in order, from 0.25 to 4")
    longest = audio.max_seconds * 16_000

    def change(sound: Audio, random: np.random.Generator) -> Audio:
        # A recording may be as long as the limit already; it is then never slowed down.
        rate = max(random.uniform(slowest, fastest), min(len(sound.wave) / longest, 1.0))
        return Audio(np.ascontiguousarray(soxr.resample(sound.wave, 16_000 * rate, 16_000), np.float32))

    return change
