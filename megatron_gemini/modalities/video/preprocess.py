"""Clips from files to frames, by PyAV: limits first, then an even sample of the frames.

Shape suffixes: F frames, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from megatron_gemini.modalities.bad_sample import BadSample, one_line
from megatron_gemini.modalities.image.preprocess import check_size
from megatron_gemini.modalities.video.mp4_index import check_index

MAX_BYTES = 512 * 1024 * 1024
MAX_PIXELS = 8192 * 4320  # of one frame
MAX_SECONDS = 3600.0
MAX_CODED_FRAMES = 500_000
# Plain files only: a playlist would make FFmpeg open whatever paths and addresses it names.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts"


def decode_video(
    data: bytes,
    max_frames: int,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
) -> tuple[np.ndarray, float]:
    """At most `max_frames` frames of a clip, evenly spaced from the first to the last.

    Returns uint8[F, H, W, 3] at the clip's own size, and the mean number of seconds between two of these frames (0.0
    where there is only one). `fit_image` of any frame gives the size for all. A rotation stored in the file is applied;
    sound is ignored. Bytes, frame size, duration and number of frames are checked before decoding.

    Raises BadSample: video_empty, video_too_large, video_too_narrow, video_too_long, video_too_many_frames,
    video_no_frames, video_unreadable, video_truncated, video_corrupt.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; it must be 1 or more")
    if not data:
        raise BadSample("video_empty", "the video file is empty (0 bytes)")
    if len(data) > max_bytes:
        raise BadSample("video_too_large", f"the video file has {len(data):,} bytes; the limit is {max_bytes:,}")
    check_index(data, MAX_CODED_FRAMES)
    # A pass over the packets first: which frames to keep depends on how many there are, and decoding is what costs.
    coded = _count_frames(data, max_pixels, max_seconds)
    keep = {round(index) for index in np.linspace(0, coded - 1, min(coded, max_frames))}
    frames: list[np.ndarray] = []
    times: list[float] = []
    seen = 0
    try:
        for index, frame in enumerate(_decoded(data, max_pixels)):
            seen = index + 1
            if index in keep:
                frames.append(_to_rgb(frame, frames))
                times.append(float(frame.time) if frame.time is not None else 0.0)
    except BadSample:
        raise
    except Exception as error:  # FFmpeg meets arbitrary bytes here
        raise BadSample("video_corrupt", f"the video breaks off at frame {seen}: {one_line(error)}") from None
    if not frames:
        raise BadSample("video_no_frames", "the video holds no frame that can be decoded")
    if len(frames) < len(keep):
        raise BadSample("video_truncated", f"only {seen} of the video's {coded} frames can be decoded")
    between = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    # Damaged times may run backward; the encoder takes 0 for a still image.
    return np.stack(frames), max(between, 0.0)


def _open(data: bytes) -> tuple[InputContainer, VideoStream]:
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(io.BytesIO(data), mode="r", options=options)
    except Exception as error:
        raise BadSample("video_unreadable", f"not a readable video file: {one_line(error)}") from None
    if not container.streams.video:
        container.close()
        raise BadSample("video_no_frames", "the file holds no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise BadSample("video_unreadable", "the video is in a format that has no decoder here, or is damaged")
    stream.thread_count = 1  # loaders run beside training; the decoder's own threads would only compete with it
    return container, stream


def _count_frames(data: bytes, max_pixels: int, max_seconds: float) -> int:
    """Coded frames of the clip, by reading its packets without decoding them; checks every limit on the way."""
    container, stream = _open(data)
    with container:
        check_size(stream.codec_context.width, stream.codec_context.height, max_pixels, "video")
        seconds = (container.duration or 0) / av.time_base
        if seconds > max_seconds:
            raise BadSample("video_too_long", f"the video lasts {seconds:.1f} s; the limit is {max_seconds:g} s")
        coded = 0
        try:
            for packet in container.demux(stream):
                # PyAV's last packet is an empty one that flushes a decoder; discarded ones are decoded and never shown.
                coded += packet.size > 0 and not packet.is_discard
                if coded > MAX_CODED_FRAMES:
                    raise BadSample("video_too_many_frames", f"the video has more than {MAX_CODED_FRAMES:,} frames")
        except BadSample:
            raise
        except Exception as error:
            raise BadSample("video_corrupt", f"the video breaks off after {coded} frames: {one_line(error)}") from None
        if coded == 0:
            raise BadSample("video_no_frames", "the video stream holds no frames")
        # 0 where the header does not say, as in Matroska.
        if coded < stream.frames:
            raise BadSample("video_truncated", f"the video holds {coded} of the {stream.frames} frames in its header")
    return coded


def _decoded(data: bytes, max_pixels: int) -> Iterator[VideoFrame]:
    container, stream = _open(data)
    with container:
        for frame in container.decode(stream):
            # Again for every frame: a stream may change its size behind the header that was checked.
            check_size(frame.width, frame.height, max_pixels, "video")
            yield frame


def _to_rgb(frame: VideoFrame, earlier: list[np.ndarray]) -> np.ndarray:
    """uint8[H, W, 3], upright; a stream that changes its size midway keeps that of its first frame."""
    turns = round(frame.rotation / 90) % 4
    if not earlier:
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    height, width = earlier[0].shape[:2] if turns % 2 == 0 else earlier[0].shape[1::-1]
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", width=width, height=height), turns))
