"""Clips from files to frames, by PyAV: limits first, then frames at even steps of time.

Shape suffixes: F frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from megatron_gemini.modalities.bad_sample import BadSample, one_line
from megatron_gemini.modalities.image.preprocess import check_size
from megatron_gemini.modalities.media_file import open_media
from megatron_gemini.modalities.video.file_end import check_end
from megatron_gemini.modalities.video.mp4_index import check_index
from megatron_gemini.modalities.video.sampling import sample_frames

MAX_BYTES = 512 * 1024 * 1024
MAX_PIXELS = 8192 * 4320  # of one frame
MAX_SECONDS = 3600.0
MAX_CODED_FRAMES = 500_000
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts"


def decode_video(
    data: bytes,
    max_frames: int,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
) -> tuple[np.ndarray, float]:
    """At most `max_frames` frames of a clip, evenly spaced in time from the first to the last.

    Returns uint8[F, H, W, 3] at the clip's own size, and the number of seconds between two of these frames (0.0 where
    there is only one). The steps are even in time, whatever the frame rate does (`sample_frames`). `fit_image` of any
    frame gives the size for all. A rotation stored in the file is applied, and so is the shape of its pixels. Sound and
    cover pictures are ignored. Bytes, frame size, duration and number of frames are checked before decoding.

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
    check_end(data)
    # Read and not believed: a header may say any number, and which frames are kept depends on when they are shown.
    container, stream = _open(data)
    with container:
        clip = _read_packets(container, stream, max_pixels, max_seconds)
        return _decode(clip, max_frames, max_pixels)


def _decode(clip: _Clip, max_frames: int, max_pixels: int) -> tuple[np.ndarray, float]:
    count_F, between = sample_frames(clip.seconds_F, max_frames)
    frames: list[np.ndarray] = []
    # One for all frames, of one thread: a frame by itself starts a scaler with as many threads as there are cores,
    # which took 1 to 4 ms on two of them, and its pixels 30 us.
    scaler, seen = VideoReformatter(), 0
    try:
        for index, frame in enumerate(_decoded(clip.packets, max_pixels)):
            seen = index + 1
            if index < len(count_F) and count_F[index]:
                frames += [_to_rgb(frame, scaler, clip.pixel_aspect, frames, max_pixels)] * int(count_F[index])
    except BadSample:
        raise
    except Exception as error:  # FFmpeg meets arbitrary bytes here
        raise BadSample("video_corrupt", f"the video breaks off at frame {seen}: {one_line(error)}") from None
    if not frames:
        raise BadSample("video_no_frames", "the video holds no frame that can be decoded")
    if len(frames) < count_F.sum():
        raise BadSample("video_truncated", f"only {seen} of the video's {len(count_F)} frames can be decoded")
    return np.stack(frames), between


@dataclass(frozen=True, eq=False)
class _Clip:
    """packets: still to be decoded. seconds_F: float64, when each frame is shown, ascending. pixel_aspect: width of a
    pixel over its height."""

    packets: list[Packet]
    seconds_F: np.ndarray
    pixel_aspect: float


def _open(data: bytes) -> tuple[InputContainer, VideoStream]:
    try:
        container = open_media(data, _CONTAINERS, MAX_PIXELS)
    except Exception as error:
        raise BadSample("video_unreadable", f"not a readable video file: {one_line(error)}") from None
    # A cover or a thumbnail is a stream of one picture, in sounds as in clips.
    streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if not streams:
        container.close()
        raise BadSample("video_no_frames", "the file holds no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        container.close()
        raise BadSample("video_unreadable", "the video is in a format that has no decoder here, or is damaged")
    stream.thread_count = 1  # loaders run beside training; the decoder's own threads would only compete with it
    return container, stream


def _read_packets(container: InputContainer, stream: VideoStream, max_pixels: int, max_seconds: float) -> _Clip:
    """Reads the clip's packets without decoding them; checks every limit on the way.

    They are kept, since FFmpeg decodes some frames whenever a file is opened: twice took 1.3 times as long.
    """
    check_size(stream.codec_context.width, stream.codec_context.height, max_pixels, "video")
    packets, coded, shown = list[Packet](), 0, list[int | None]()
    # An AVI has no times of showing. FFmpeg guesses them, two frames at once at the end. Those of decoding are the
    # places of the frames.
    is_avi = container.format.name == "avi"
    try:
        for packet in container.demux(stream):
            packets.append(packet)
            coded += packet.size > 0
            if packet.size > 0 and not packet.is_discard:  # what an edit list leaves out is never shown
                shown.append(packet.dts if is_avi else packet.pts)
            if coded > MAX_CODED_FRAMES:
                raise BadSample("video_too_many_frames", f"the video has more than {MAX_CODED_FRAMES:,} frames")
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("video_corrupt", f"the video breaks off after {coded} frames: {one_line(error)}") from None
    if not shown:
        raise BadSample("video_no_frames", "the video stream holds no frames")
    # The index of an MP4 lists every frame. What the header of an AVI has is a length, in frames of one rate.
    if container.format.name.startswith("mov") and coded < stream.frames:
        raise BadSample("video_truncated", f"the video holds {coded} of the {stream.frames} frames in its index")
    times = [pts for pts in shown if pts is not None]
    if len(times) == len(shown):
        seconds_F = np.sort(np.array(times, np.float64)) * float(stream.time_base or 0)
    else:  # without times there is the rate
        seconds_F = np.arange(len(shown)) / float(stream.average_rate or 1)
    seconds = float(seconds_F[-1] - seconds_F[0])
    if seconds > max_seconds:
        raise BadSample("video_too_long", f"the video lasts {seconds:.1f} s; the limit is {max_seconds:g} s")
    return _Clip(packets, seconds_F, float(stream.sample_aspect_ratio or 1))


def _decoded(packets: list[Packet], max_pixels: int) -> Iterator[VideoFrame]:
    for packet in packets:  # the last one is empty, and brings out what the decoder has kept back
        for frame in packet.decode():
            assert isinstance(frame, VideoFrame)
            # Once more, of every frame: a stream may grow behind a modest header.
            check_size(frame.width, frame.height, max_pixels, "video")
            yield frame


def _to_rgb(
    frame: VideoFrame, scaler: VideoReformatter, pixel_aspect: float, earlier: list[np.ndarray], max_pixels: int
) -> np.ndarray:
    """uint8[H, W, 3], upright and of square pixels; a stream that changes its size midway keeps that of its first
    frame."""
    turns = round(frame.rotation / 90) % 4
    height, width = frame.height, max(round(frame.width * pixel_aspect), 1)
    if earlier:
        height, width = earlier[0].shape[:2] if turns % 2 == 0 else earlier[0].shape[1::-1]
    check_size(width, height, max_pixels, "video")
    pixels = scaler.reformat(frame, width, height, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, turns))
