"""Clips: frames through the vision encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_gemini.config.encoders import VisionConfig
from megatron_gemini.modalities.image.spec import picture, prepare_frames
from megatron_gemini.modalities.spec import ItemOperation, ModalitySpec, Prepared
from megatron_gemini.modalities.video.operations import frames, resize

if TYPE_CHECKING:
    import numpy as np

    from megatron_gemini.modalities.video.item import Video

INSPECTED_FRAMES = 8


def decode(data: bytes, vision: VisionConfig) -> Video:
    from megatron_gemini.modalities.video.item import Video
    from megatron_gemini.modalities.video.preprocess import decode_video

    return Video(*decode_video(data, vision.max_frames))


def sizes(data: bytes) -> dict[str, float]:
    from megatron_gemini.modalities.video.preprocess import decode_video

    height, width = decode_video(data, INSPECTED_FRAMES)[0].shape[1:3]
    return {"video width": width, "video height": height}


def preview(data: bytes) -> np.ndarray:
    """The frame in the middle."""
    from megatron_gemini.modalities.video.preprocess import decode_video

    frames_FHW3, _ = decode_video(data, 3)
    return frames_FHW3[len(frames_FHW3) // 2]


def prepare(video: Video, vision: VisionConfig) -> Prepared:
    """The frames on one grid of patches, each a span of its own."""
    if not len(video.frames_FHW3):
        raise ValueError("a clip has no frames")
    return prepare_frames(video.frames_FHW3, video.seconds_between_frames, vision)


VIDEO: ModalitySpec[VisionConfig, Video] = ModalitySpec(
    name="video",
    encoder="vision",
    control="video",
    members=("mp4", "webm", "mkv", "mov", "avi", "video"),
    files="MP4, MOV, WebM, MKV, AVI or TS",
    beside=("video", "videos"),
    mark="<video>",
    parts=("video_url",),
    decode=decode,
    prepare=prepare,
    picture=picture,
    sizes=sizes,
    preview=preview,
    operations={"resize": ItemOperation(resize), "frames": ItemOperation(frames)},
)
