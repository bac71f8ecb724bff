"""Sound, and its encoder.

Shape suffixes: I items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_gemini.config.encoders import AudioConfig
from megatron_gemini.modalities.audio.operations import speed
from megatron_gemini.modalities.counting import attention, feed_forward, linear
from megatron_gemini.modalities.spec import EncoderSpec, ItemOperation, ModalitySpec, Picture, Prepared

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from megatron_gemini.modalities.audio.item import Audio

FP32 = 4
FRAMES_PER_SECOND = 100
INSPECTED_SECONDS = 3600.0  # a shard may hold recordings that are too long for the model at hand
PREVIEW_MELS = 64


def spans(grid_I3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A grid is (log-mel frames, 1, 1): two convolutions of stride 2 leave one embedding for every 40 ms begun."""
    frames_I = grid_I3[:, 0]
    return frames_I * 0 + 1, (frames_I + 3) // 4  # a quarter, rounded up twice


def parameters(audio: AudioConfig) -> int:
    width = audio.width
    subsample = linear(3 * audio.mels, width) + linear(3 * width, width)
    convolution = 4 * width + linear(width, 2 * width, bias=False) + width * audio.kernel + width * width
    block = 2 * feed_forward(width, audio.mlp_width) + attention(width) + convolution + 2 * width
    return subsample + audio.layers * block


def saved_bytes(audio: AudioConfig, frames: int, element: int) -> float:
    """Bytes that the audio encoder keeps of `frames` log-mel frames in one forward with a graph."""
    width = audio.width
    block = 20 * width + 4 * audio.mlp_width
    outputs = audio.layers * block
    statistics = audio.layers * (12 + audio.heads)
    subsample = 4 * audio.mels + 5 * width
    return frames / 4 * ((outputs + subsample) * element + statistics * FP32)


def build(audio: AudioConfig) -> nn.Module:
    from megatron_gemini.modalities.audio.encoder import AudioEncoder

    return AudioEncoder(audio)


def decode(data: bytes, audio: AudioConfig) -> Audio:
    from megatron_gemini.modalities.audio.item import Audio
    from megatron_gemini.modalities.audio.preprocess import decode_audio

    return Audio(decode_audio(data, audio.max_seconds))


def sizes(data: bytes) -> dict[str, float]:
    from megatron_gemini.modalities.audio.preprocess import SAMPLE_RATE, decode_audio

    return {"audio seconds": len(decode_audio(data, INSPECTED_SECONDS)) / SAMPLE_RATE}


def preview(data: bytes) -> np.ndarray:
    """A spectrogram: time to the right, pitch upwards, louder is brighter."""
    import numpy as np

    from megatron_gemini.modalities.audio.preprocess import decode_audio, log_mel

    mel_LM = log_mel(decode_audio(data, INSPECTED_SECONDS), PREVIEW_MELS).numpy()
    # From the noise up, and without the loudest clicks, each of which alone would darken all the rest.
    low, high = np.percentile(mel_LM, [10, 99.8])
    shade_ML = ((mel_LM.T[::-1] - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    return np.repeat(shade_ML.round().astype(np.uint8)[..., None], 3, axis=-1)


def prepare(sound: Audio, audio: AudioConfig) -> Prepared:
    """Log-mel frames, 100 a second."""
    from megatron_gemini.modalities.audio.preprocess import log_mel

    values_PC = log_mel(sound.wave, audio.mels)
    return Prepared(values_PC, (len(values_PC), 1, 1))


def picture(prepared: Prepared, audio: AudioConfig) -> Picture:
    return Picture(spectrum_LM=prepared.values_PC.numpy())


AUDIO_ENCODER = EncoderSpec(
    name="audio",
    section=AudioConfig,
    input_width=lambda audio: audio.mels,
    output_width=lambda audio: audio.width,
    spans=spans,
    parameters=parameters,
    saved_bytes=saved_bytes,
    largest_item=lambda audio: 0,  # of a chunk's size or less: no single sound decides what a chunk keeps
    longest_item=lambda audio: int(audio.max_seconds * FRAMES_PER_SECOND),
    build=build,
)
AUDIO: ModalitySpec[AudioConfig, Audio] = ModalitySpec(
    name="audio",
    encoder="audio",
    control="audio",
    members=("wav", "flac", "mp3", "ogg", "opus", "audio"),
    files="WAV, FLAC, Ogg or MP3",
    beside=("audio", "audios"),
    mark="<audio>",
    parts=("input_audio", "audio_url"),
    decode=decode,
    prepare=prepare,
    picture=picture,
    sizes=sizes,
    preview=preview,
    operations={"speed": ItemOperation(speed, random=True)},
)
