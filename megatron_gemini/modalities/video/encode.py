"""Frames to an H.264 file, for building shards and for tests."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np


def encode_video(frames_FHW3: np.ndarray, fps: float) -> bytes:
    """An MP4 file (H.264, 4:2:0) of uint8[F, H, W, 3] at `fps` frames a second.

    Quality is near lossless (CRF 10), since at thumbnail sizes such as 16 x 16 the default would smear what the
    frames show. H.264's chroma is half size, so both sides must be even. Raises ValueError otherwise.
    """
    frames, height, width = frames_FHW3.shape[:3]
    if frames < 1 or height % 2 or width % 2 or min(height, width) < 2:
        raise ValueError(
            f"{frames} frames of {width} x {height} cannot be encoded; it takes 1 or more, with even sides"
        )
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be greater than 0")
    # Of 150,000 clips of three frames x264 gave one other bytes than at all other times, with one thread, and whatever
    # newly allocated memory was filled with. A build must give the same bytes each time, so that two have to agree.
    given = set[bytes]()
    while (data := _encode(frames_FHW3, fps)) not in given:
        given.add(data)
    return data


def _encode(frames_FHW3: np.ndarray, fps: float) -> bytes:
    height, width = frames_FHW3.shape[1:3]
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        # Up to 1001, so that rates of NTSC such as 30000/1001 stay exact.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "10", "preset": "fast", "threads": "1"}
        for frame_HW3 in frames_FHW3:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), format="rgb24")
            container.mux(stream.encode(picture))
        # Without a frame, the encoder gives what it still holds back.
        container.mux(stream.encode())
    return file.getvalue()
