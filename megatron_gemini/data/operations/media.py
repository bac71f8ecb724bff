"""Operations on images, clips and sounds, wherever in the sample they stand.

Shape suffixes: F frames, H height, W width.
"""

from __future__ import annotations

import math

import numpy as np
import soxr
from PIL import Image as Pillow

from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.data.operations.registry import Operation, Sample, Setting, operation
from megatron_gemini.data.samples.decode import over_media
from megatron_gemini.data.samples.document import Item, RawItem, prepare
from megatron_gemini.modalities.audio.item import Audio
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.modalities.image.preprocess import fitted_size
from megatron_gemini.modalities.video.item import Video


@operation("resize")
def resize(setting: Setting, tokens: int = 0) -> Operation:
    """Images and frames to whole patches at their native aspect, at most vision.max_side a side (bicubic).

    tokens: most patches of an image, or of all frames of a clip; 0 for no such limit. Images are never made larger,
    except for the part of a patch that rounding adds.
    """
    vision = _vision(setting)
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; it must be 0 or more")

    def change(item: Item) -> Item:
        if isinstance(item, Image):
            return Image(_resized(item.pixels_HW3[None], vision.patch, vision.max_side, tokens)[0])
        if isinstance(item, Video):
            budget = max(tokens // len(item.frames_FHW3), 1) if tokens else 0
            frames_FHW3 = _resized(item.frames_FHW3, vision.patch, vision.max_side, budget)
            return Video(frames_FHW3, item.seconds_between_frames)
        return item

    return lambda sample, random: over_media(sample, change)


def size_within(height: int, width: int, patch: int, max_side: int, tokens: int) -> tuple[int, int]:
    """(height, width) in whole patches, near the native aspect, with at most `tokens` patches (0: any number)."""
    fitted = fitted_size(height, width, patch, max_side)
    if not tokens or fitted[0] * fitted[1] <= tokens * patch**2:
        return fitted
    scale = math.sqrt(tokens * patch**2 / (height * width))
    rows, columns = (max(math.floor(side * scale / patch), 1) for side in (height, width))
    most = max_side // patch
    return min(rows, most, tokens) * patch, min(columns, most, tokens // min(rows, tokens)) * patch


def _resized(frames_FHW3: np.ndarray, patch: int, max_side: int, tokens: int) -> np.ndarray:
    height, width = frames_FHW3.shape[1:3]
    size = size_within(height, width, patch, max_side, tokens)
    if size == (height, width):
        return frames_FHW3
    resized = [Pillow.fromarray(frame).resize(size[::-1], Pillow.Resampling.BICUBIC) for frame in frames_FHW3]
    return np.stack([np.asarray(frame) for frame in resized])


@operation("crop", random=True)
def crop(setting: Setting, smallest: float = 0.8) -> Operation:
    """A random part of every image, each side at least the share `smallest` of the whole one's."""
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest is {smallest}; it must be above 0 and at most 1")

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        def change(item: Item) -> Item:
            if not isinstance(item, Image):
                return item
            sides = item.pixels_HW3.shape[:2]
            kept = [max(1, round(side * random.uniform(smallest, 1.0))) for side in sides]
            top, left = (int(random.integers(side - part + 1)) for side, part in zip(sides, kept, strict=True))
            return Image(item.pixels_HW3[top : top + kept[0], left : left + kept[1]])

        return over_media(sample, change)

    return apply


@operation("frames")
def frames(setting: Setting, count: int = 8) -> Operation:
    """At most `count` frames of every clip, evenly spaced from its first to its last."""
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")

    def change(item: Item) -> Item:
        if not isinstance(item, Video) or len(item.frames_FHW3) <= count:
            return item
        total = len(item.frames_FHW3)
        kept = np.linspace(0, total - 1, count).round().astype(int)
        seconds = item.seconds_between_frames * (total - 1) / (count - 1) if count > 1 else 0.0
        return Video(item.frames_FHW3[kept], seconds)

    return lambda sample, random: over_media(sample, change)


@operation("speed", random=True)
def speed(setting: Setting, slowest: float = 0.9, fastest: float = 1.1) -> Operation:
    """Every sound resampled to a random speed, and with it pitch (Ko et al. 2015), never beyond audio.max_seconds."""
    if not 0.25 <= slowest <= fastest <= 4:
        raise ValueError(f"slowest is {slowest} and fastest {fastest}; they must be in order, from 0.25 to 4")

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        def change(item: Item) -> Item:
            if not isinstance(item, Audio):
                return item
            longest = _audio(setting).max_seconds * 16_000
            rate = max(random.uniform(slowest, fastest), min(len(item.wave) / longest, 1.0))
            return Audio(np.ascontiguousarray(soxr.resample(item.wave, 16_000 * rate, 16_000), np.float32))

        return over_media(sample, change)

    return apply


@operation("prepare")
def prepare_items(setting: Setting) -> Operation:
    """Every image, clip and sound as its encoder's input."""
    encoders = setting.decoder.encoders
    return lambda sample, random: over_media(
        sample, lambda item: prepare(item, encoders) if isinstance(item, RawItem) else item
    )


def _vision(setting: Setting) -> VisionConfig:
    section = setting.decoder.encoders["vision"]
    assert isinstance(section, VisionConfig)
    return section


def _audio(setting: Setting) -> AudioConfig:
    section = setting.decoder.encoders["audio"]
    assert isinstance(section, AudioConfig)
    return section
