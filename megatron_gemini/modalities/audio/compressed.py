"""Recordings whose length only decoding tells, by PyAV and to their end.

The length in the header of an MP3 is an estimate, in a FLAC it may be missing or wrong, an Ogg file may be several one
after the other. libsndfile reads as many samples as the header speaks of and no more.

Shape suffixes: L samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.error import InvalidDataError

from megatron_gemini.modalities.audio.file_end import check_ogg_end, mp3_frames
from megatron_gemini.modalities.bad_sample import BadSample, one_line
from megatron_gemini.modalities.media_file import open_media

FORMATS = "wav,flac,ogg,mp3"
MIN_RATE, MAX_RATE = 1_000, 768_000
MAX_CHANNELS = 32


def decode_to_end(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """float32[L, C] and the sampling rate in Hz.

    Raises BadSample: audio_empty, audio_unreadable, audio_bad_rate, audio_bad_channels, audio_too_long,
    audio_truncated, audio_corrupt.
    """
    if data.startswith(b"OggS"):
        check_ogg_end(data)  # first: FFmpeg does not open a file that is cut before its first page of sound
    try:
        container = open_media(data, FORMATS, max_pixels=1)
    except Exception as error:  # the header parsers of a foreign library meet arbitrary bytes here
        raise BadSample("audio_unreadable", f"not a readable WAV, FLAC, Ogg or MP3 file: {one_line(error)}") from None
    with container:
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            raise BadSample("audio_unreadable", "the file holds no sound that can be decoded")
        pieces, samples, rate, channels = list[np.ndarray](), 0, 0, 0
        for frame in _frames(container, data):
            if not pieces:
                rate, channels = frame.sample_rate, frame.layout.nb_channels
                check_kind(rate, channels)
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                raise BadSample("audio_corrupt", f"the audio changes its rate or channels after {samples / rate:.1f} s")
            pieces.append(_float_LC(frame))
            samples += frame.samples
            # Counted here, since no header is believed: one that lies about the length costs no memory.
            if samples > math.floor(max_seconds * rate):
                raise BadSample("audio_too_long", f"the audio goes on after {max_seconds:g} s, which is the limit")
        if not samples:
            raise BadSample("audio_empty", "the audio has no samples")
        declared = container.streams.audio[0].duration or 0
        if container.format.name == "flac" and samples < declared:
            raise BadSample(
                "audio_truncated", f"the audio ends after {samples} of the {declared} samples in its header"
            )
    return np.concatenate(pieces), rate


def check_kind(rate: int, channels: int) -> None:
    """Raises BadSample: audio_bad_rate, audio_bad_channels."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadSample("audio_bad_rate", f"the sampling rate is {rate} Hz; it must be {MIN_RATE} to {MAX_RATE}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadSample("audio_bad_channels", f"the audio has {channels} channels; it must have 1 to {MAX_CHANNELS}")


def _frames(container: InputContainer, data: bytes) -> Iterator[AudioFrame]:
    """Decoded frames to the end of the file, which has to be where the file says, as far as it says so."""
    damage, coded = "", 0
    try:
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except InvalidDataError as error:
                damage = damage or one_line(error)
                continue
            if frames and damage:
                raise BadSample("audio_corrupt", f"the audio cannot be decoded: {damage}")
            coded += packet.size > 0
            yield from frames
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("audio_corrupt", f"the audio cannot be decoded: {one_line(error)}") from None
    if container.format.name != "mp3" and damage:
        raise BadSample("audio_truncated", f"the audio breaks off: {damage}")
    # Behind the last frame of an MP3 there may be tags of any kind, which are no frames. Some programs count the frame
    # that holds the number.
    declared = mp3_frames(data) if container.format.name == "mp3" else 0
    if coded < declared - 1:
        raise BadSample("audio_truncated", f"the audio ends after {coded} of the {declared} frames in its header")


def _float_LC(frame: AudioFrame) -> np.ndarray:
    """float32[L, C] in [-1, 1], the values that libsndfile gives."""
    values = frame.to_ndarray()
    # FFmpeg gives the channels one after the other (planar), or sample by sample in one row.
    values_LC = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values_LC.dtype == np.uint8:  # unsigned, with silence at 128
        return (values_LC.astype(np.float32) - 128.0) / 128.0
    if values_LC.dtype.kind == "i":
        return (values_LC.astype(np.float64) / 2.0 ** (8 * values_LC.itemsize - 1)).astype(np.float32)
    return values_LC.astype(np.float32)
