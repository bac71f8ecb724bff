"""Recordings of every rate become 16 kHz log-mel frames, and unusable ones one counted reason."""

import io

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.modalities.audio.preprocess import (
    FOURIER,
    HOP,
    SAMPLE_RATE,
    WINDOW,
    decode_audio,
    log_mel,
    log_mel_frames,
)
from megatron_gemini.modalities.audio.spec import spans
from megatron_gemini.modalities.bad_sample import BadSample


def embeddings(frames: int) -> int:
    """Of a clip of so many log-mel frames."""
    return int(spans(np.array([[frames, 1, 1]]))[1][0])


def _tone(seconds: float, rate: int = SAMPLE_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def _file(samples: np.ndarray, rate: int = SAMPLE_RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_format_rate_and_channels_become_mono_16_khz(kind, rate, channels):
    wave = decode_audio(_file(np.stack([_tone(0.5, rate)] * channels, axis=1), rate, kind))
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert abs(len(wave) - 8000) < 1600  # MP3 pads its frames
    spectrum = np.abs(np.fft.rfft(wave[:8000]))
    assert abs(spectrum.argmax() * SAMPLE_RATE / min(len(wave), 8000) - 440) < 5


def test_16_khz_mono_is_unchanged():
    assert np.array_equal(decode_audio(_file(_tone(0.2), subtype="FLOAT")), _tone(0.2))


def _spoiled(value: float) -> bytes:
    samples = _tone(0.1)
    samples[7] = value
    return _file(samples, subtype="FLOAT")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "audio_empty"),
        (b"not audio", "audio_unreadable"),
        (_file(np.zeros(0, np.float32)), "audio_empty"),
        (_file(np.zeros(1600, np.float32)), "audio_silent"),
        (_file(np.full(1600, 0.3, np.float32)), "audio_silent"),
        (_spoiled(np.nan), "audio_not_finite"),
        (_spoiled(np.inf), "audio_not_finite"),
        (_spoiled(1e20), "audio_out_of_range"),
        (_file(_tone(0.5))[:-4000], "audio_truncated"),
        (_file(_tone(0.1, 16_000), 7), "audio_bad_rate"),
        (_file(_tone(0.1, 16_000), 2_000_000_000), "audio_bad_rate"),
        (_file(np.zeros((16, 40), np.float32)), "audio_bad_channels"),
    ],
)
def test_unusable_recordings_have_one_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        decode_audio(data)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_truncated_flac_is_refused():
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    data = _file(noise, kind="FLAC")
    with pytest.raises(BadSample) as caught:
        decode_audio(data[: len(data) // 2])
    assert caught.value.reason in ("audio_truncated", "audio_corrupt")


def test_too_long_recording_names_its_seconds_and_the_limit():
    with pytest.raises(BadSample, match=r"2\.0 s; the limit is 1\.5 s") as caught:
        decode_audio(_file(_tone(2.0)), max_seconds=1.5)
    assert caught.value.reason == "audio_too_long"
    assert len(decode_audio(_file(_tone(1.5)), max_seconds=1.5)) == 24_000


def test_streamed_wav_without_a_size_is_read():
    data = bytearray(_file(_tone(0.2)))
    data[4:8] = b"\xff\xff\xff\xff"
    assert len(decode_audio(bytes(data))) == 3200


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 300), st.sampled_from(["WAV", "FLAC", "OGG"]))
def test_random_damage_never_raises_anything_else(noise, at, kind):
    data = _file(_tone(0.05), kind=kind)
    try:
        wave = decode_audio(data[:at] + noise + data[at + len(noise) :])
    except BadSample as error:
        assert error.reason.startswith("audio_")
    else:
        assert torch.isfinite(log_mel(wave)).all()


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 5_000, 16_000])
@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_equals_a_foreign_implementation(samples, mels):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    wave = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    filters = audio_utils.mel_filter_bank(
        num_frequency_bins=FOURIER // 2 + 1,
        num_mel_filters=mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    frames = log_mel_frames(samples)
    before = (WINDOW - HOP) // 2
    energy = audio_utils.spectrogram(
        np.pad(wave, (before, (frames - 1) * HOP + WINDOW - before - samples)),
        audio_utils.window_function(WINDOW, "hann"),
        frame_length=WINDOW,
        hop_length=HOP,
        fft_length=FOURIER,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-30,
    ).T
    expected = np.log10(np.maximum(energy / max(energy.max(), 1e-10), 1e-8)) / 4 + 1
    actual = log_mel(wave, mels)
    assert actual.shape == (frames, mels)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.from_numpy(expected).float(), rtol=0, atol=2e-4)


def test_every_mel_filter_hears_something():
    wave = np.zeros(SAMPLE_RATE, np.float32)
    wave[8000] = 1.0  # a click holds every frequency
    assert (log_mel(wave).amax(dim=0) > -1).all()


def test_log_mel_ignores_the_recording_level():
    wave = _tone(0.3)
    torch.testing.assert_close(log_mel(wave), log_mel(wave * 0.01), rtol=0, atol=1e-4)
    assert log_mel(wave).max() == 1.0
    assert log_mel(wave).min() >= -1.0
    assert (log_mel(np.zeros(400, np.float32)) == -1).all()


def test_output_lengths():
    assert [log_mel_frames(n) for n in (1, 160, 161, 480_000)] == [1, 1, 2, 3000]
    assert [embeddings(n) for n in (1, 4, 5, 3000)] == [1, 1, 2, 750]
    for frames in range(1, 60):
        halved = torch.nn.Conv1d(1, 1, 3, stride=2, padding=1)(torch.zeros(1, 1, frames))
        assert embeddings(frames) == torch.nn.Conv1d(1, 1, 3, stride=2, padding=1)(halved).shape[-1]
