"""Operations on clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_gemini.modalities.image.operations import check_tokens, resized

if TYPE_CHECKING:
    import numpy as np

    from megatron_gemini.config.encoders import VisionConfig
    from megatron_gemini.modalities.video.item import Video


def resize(vision: VisionConfig, tokens: int = 0) -> Callable[[Video, np.random.Generator], Video]:
    """Frames to whole patches at the native aspect, as images. tokens: most patches of all frames together."""
    from megatron_gemini.modalities.video.item import Video

    check_tokens(tokens)

    def change(video: Video, random: np.random.Generator) -> Video:
        # All frames of a clip share one grid, so each has the same part of the budget, and no less than a patch.
        budget = max(tokens // len(video.frames_FHW3), 1) if tokens else 0
        return Video(resized(video.frames_FHW3, vision, budget), video.seconds_between_frames)

    return change


def frames(vision: VisionConfig, count: int = 8) -> Callable[[Video, np.random.Generator], Video]:
    """At most `count` frames, evenly spaced from the first to the last."""
    import numpy as np

    from megatron_gemini.modalities.video.item import Video

    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")

    def change(video: Video, random: np.random.Generator) -> Video:
        total = len(video.frames_FHW3)
        if total <= count:
            return video
        kept = np.linspace(0, total - 1, count).round().astype(int)
        # The same time from the first frame to the last, in fewer steps.
        seconds = video.seconds_between_frames * (total - 1) / (count - 1) if count > 1 else 0.0
        return Video(video.frames_FHW3[kept], seconds)

    return change
