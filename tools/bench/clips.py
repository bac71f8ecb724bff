"""Decoding clips against PyAV's own `to_ndarray`, one frame after the other.

    python tools/bench/clips.py [--rounds 9]

Both sides decode every frame of the same H.264 clips in turn, in one process, and CPU time is compared. Ours also
checks every limit, reads when each frame is shown, and turns and stretches what the file says. A frame that PyAV
converts by itself starts a scaler with a thread for every core.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence

import av
import numpy as np

from megatron_gemini.modalities.video.encode import encode_video
from megatron_gemini.modalities.video.preprocess import decode_video

FRAMES = 8


def clip(side: int) -> bytes:
    """A square that moves over noise, two frames a second."""
    noise = np.random.default_rng(side).integers(0, 64, (side, side, 3), np.uint8)
    frames = np.repeat(noise[None], FRAMES, axis=0)
    for number, frame in enumerate(frames):
        frame[: side // 2, number * side // 16 : (number + 8) * side // 16] = 200
    return encode_video(frames, fps=2)


def ours(data: bytes) -> np.ndarray:
    frames, _ = decode_video(data, max_frames=FRAMES)
    return frames


def by_pyav(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), mode="r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def cpu_time(decode: Callable[[bytes], np.ndarray], data: bytes, repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        decode(data)
    return (time.process_time() - began) / repeats


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="pairs (default: %(default)s)")
    options = parser.parse_args(argv)
    for side, repeats in ((16, 100), (224, 20), (512, 6)):
        data = clip(side)
        assert np.array_equal(ours(data), by_pyav(data)), side
        pairs = [(cpu_time(ours, data, repeats), cpu_time(by_pyav, data, repeats)) for _ in range(options.rounds)]
        median = statistics.median(mine / other for mine, other in pairs)
        least = min(mine for mine, _ in pairs) / min(other for _, other in pairs)
        print(
            f"{FRAMES} frames of {side} x {side}: ours / PyAV {median:.3f} (median), {least:.3f} (minima)", flush=True
        )


if __name__ == "__main__":
    main()
