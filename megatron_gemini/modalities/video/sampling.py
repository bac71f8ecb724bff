"""Which frames of a clip are kept, so that the steps between them are even in time.

Shape suffixes: F frames.
"""

from __future__ import annotations

import numpy as np


def sample_frames(seconds_F: np.ndarray, at_most: int) -> tuple[np.ndarray, float]:
    """(how often each frame is kept, int64[F]; seconds between two that are kept, 0.0 where there is only one).

    seconds_F: float64, when each frame is shown, ascending. The steps are even, from the first frame to the last. At
    each of them is the frame that is shown then. One that stands still for a while is kept several times, and one that
    is shown for less than a step may be left out.
    """
    frames = len(seconds_F)
    span = float(seconds_F[-1] - seconds_F[0])
    gaps_F = np.diff(seconds_F)
    steps = gaps_F[gaps_F > 0]
    step = span / (frames - 1) if frames > 1 else 0.0
    # Even enough is a clip whose frames are all shown within a quarter of a step of where counting them puts them.
    if np.abs(seconds_F - seconds_F[0] - step * np.arange(frames)).max() <= step / 4:
        kept = np.linspace(0, frames - 1, min(frames, at_most)).round().astype(np.int64)
    else:
        count = min(at_most, round(span / float(steps.min())) + 1)
        # A microsecond, so that a step which meets a frame to the last bit has it.
        kept = np.searchsorted(seconds_F, seconds_F[0] + np.linspace(0, span, count) + 1e-6, side="right") - 1
    between = float(seconds_F[kept[-1]] - seconds_F[kept[0]]) / (len(kept) - 1) if len(kept) > 1 else 0.0
    return np.bincount(kept, minlength=frames), between
