"""Recordings from files to log-mel frames: limits first, then mono 16 kHz, then the USM front end.

Shape suffixes: C channels, L samples or frames of the log-mel spectrogram, M mel bins, B bins of the Fourier transform.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import soundfile
import soxr
import torch

from megatron_gemini.modalities.audio.compressed import check_kind, decode_to_end
from megatron_gemini.modalities.audio.file_end import declared_bytes
from megatron_gemini.modalities.bad_sample import BadSample, one_line

SAMPLE_RATE = 16_000
WINDOW = 512  # 32 ms
HOP = 160  # 10 ms
# Twice the window, by zero padding: with 128 mels the lowest triangles are about 46 Hz wide, and bins 31 Hz apart
# would leave some of them without a single bin.
FOURIER = 1024
DYNAMIC_RANGE = 8.0  # powers of ten of energy that are kept below the clip's loudest cell

SILENCE = 1e-4  # half of peak to peak; one step of 16-bit audio is 3e-5
MAX_AMPLITUDE = 1e6
_LENGTH_IS_DECODED = ("MP3", "FLAC", "OGG")
_NO_SIZE = 0x7FFFFF00  # FFmpeg and SoX write the largest number, of 32 bits or of 31, where they cannot go back
CANCELED = 0.1  # of the loudest channel's power (root mean square); what coding at a low bit rate leaves is below it


def decode_audio(data: bytes, max_seconds: float = 30.0) -> np.ndarray:
    """A WAV, FLAC, Ogg or MP3 file as float32[samples], mono at 16 kHz.

    Channels are averaged and any sampling rate is resampled (soxr). Where the average cancels the sound, as of stereo
    out of phase, the loudest channel is taken. Too long a recording is refused, never cut: a transcript would no longer
    be true of it. For the same reason a recording that breaks off is refused.

    Raises BadSample: audio_empty, audio_unreadable, audio_bad_rate, audio_bad_channels, audio_too_long,
    audio_truncated, audio_corrupt, audio_not_finite, audio_out_of_range, audio_silent.
    """
    if not data:
        raise BadSample("audio_empty", "the audio file is empty (0 bytes)")
    samples_LC, rate = _uncompressed(data, max_seconds) or decode_to_end(data, max_seconds)
    # Before resampling, which would smear a NaN over its neighbors and cost as much for silence as for speech.
    check_wave(samples_LC)
    wave = np.ascontiguousarray(soxr.resample(_mono(samples_LC), rate, SAMPLE_RATE), dtype=np.float32)
    # And behind it: what lies above 8 kHz is gone, and a sample or two may have become none.
    check_wave(wave)
    return wave


def _uncompressed(data: bytes, max_seconds: float) -> tuple[np.ndarray, int] | None:
    """float32[L, C] and the sampling rate of a file whose header has an exact length; None for any other."""
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except Exception:  # a foreign parser meets arbitrary bytes here; the other decoder says what is wrong
        return None
    with file:
        check_kind(file.samplerate, file.channels)
        # Programs that write to a pipe leave the sizes at 0.
        if file.format in _LENGTH_IS_DECODED or file.frames <= 0:
            return None
        seconds = file.frames / file.samplerate
        if seconds > max_seconds:
            raise BadSample("audio_too_long", f"the audio lasts {seconds:.1f} s; the limit is {max_seconds:g} s")
        # libsndfile silently shortens what is shorter than its header says.
        # Programs that write to a pipe leave the size at 0 or at the largest value.
        if len(data) < (declared := declared_bytes(data)) < _NO_SIZE:
            raise BadSample("audio_truncated", f"the file has {len(data)} of the {declared} bytes in its header")
        try:
            samples_LC = file.read(frames=file.frames, dtype="float32", always_2d=True)
        except Exception as error:
            raise BadSample("audio_corrupt", f"the audio cannot be decoded: {one_line(error)}") from None
        if len(samples_LC) < file.frames:
            raise BadSample(
                "audio_truncated", f"the audio ends after {len(samples_LC)} of the {file.frames} samples in its header"
            )
        return samples_LC, file.samplerate


def _mono(samples_LC: np.ndarray) -> np.ndarray:
    """float32[L], the mean of the channels, or the loudest of them where the mean is nearly silent beside it."""
    mean_L = samples_LC.mean(axis=1)
    power_C = np.sqrt(np.square(samples_LC, dtype=np.float64).mean(axis=0))
    if np.sqrt(np.square(mean_L, dtype=np.float64).mean()) < CANCELED * power_C.max():
        return samples_LC[:, power_C.argmax()]
    return mean_L


def check_wave(samples: np.ndarray) -> None:
    """Refuses float32 samples that carry no sound.

    Raises BadSample: audio_empty, audio_not_finite, audio_out_of_range, audio_silent.
    """
    if samples.size == 0:
        raise BadSample("audio_empty", "the audio has no samples")
    if not np.isfinite(samples).all():
        raise BadSample("audio_not_finite", "the audio holds samples that are NaN or infinite")
    low, high = float(samples.min()), float(samples.max())
    if max(-low, high) > MAX_AMPLITUDE:
        raise BadSample("audio_out_of_range", f"the audio reaches {max(-low, high):.3g}; full scale is 1.0")
    # Half of peak to peak and not the peak: a constant offset is no sound.
    if (high - low) / 2 < SILENCE:
        raise BadSample("audio_silent", f"the audio is silent (amplitude {(high - low) / 2:.1e})")


def log_mel_frames(samples: int) -> int:
    """Log-mel frames of so many 16 kHz samples: one for every 10 ms begun."""
    return (samples + HOP - 1) // HOP


def log_mel(wave_16k: np.ndarray | torch.Tensor, mels: int = 128) -> torch.Tensor:
    """Log-mel spectrogram of float32[samples] at 16 kHz as float32[L, M] in [-1, 1].

    32 ms Hann window every 10 ms, each centered on its hop, zeros beyond the ends; energies in a Slaney mel
    filterbank; base-10 logarithm. The clip's loudest cell is 1 and whatever lies 80 dB or more below it is -1,
    so that the recording level does not matter. (USM's front end: Zhang et al. 2023, section 2.1.)
    """
    wave = torch.as_tensor(wave_16k, dtype=torch.float32)
    frames = log_mel_frames(wave.numel())
    # What a window has beyond its hop lies half before the hop and half behind it.
    before = (WINDOW - HOP) // 2
    padded = torch.nn.functional.pad(wave, (before, (frames - 1) * HOP + WINDOW - before - wave.numel()))
    windows = padded.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW, periodic=True, device=wave.device)
    power_LB = torch.fft.rfft(windows, n=FOURIER).abs().square()
    energy_LM = power_LB @ _mel_filters(mels).to(wave.device).T
    peak = energy_LM.max().clamp_min(1e-10)
    level_LM = torch.log10((energy_LM / peak).clamp_min(10.0**-DYNAMIC_RANGE))
    # The level is log10(energy / peak) in [-8, 0], whatever the recording level was: [-1, 1] of it.
    return level_LM * (2.0 / DYNAMIC_RANGE) + 1.0


@functools.lru_cache(maxsize=4)
def _mel_filters(mels: int) -> torch.Tensor:
    """float32[M, B]: triangles of equal area, equally spaced on Slaney's mel scale from 0 Hz to 8 kHz.

    Slaney's scale is linear below 1 kHz (3 mels every 200 Hz) and logarithmic above (27 mels a factor of 6.4).
    """
    top = 15.0 + 27.0 * math.log(SAMPLE_RATE / 2 / 1000.0) / math.log(6.4)
    mel = torch.linspace(0.0, top, mels + 2, dtype=torch.float64)
    hertz = torch.where(mel < 15.0, mel * (200.0 / 3.0), 1000.0 * torch.exp((mel - 15.0) * (math.log(6.4) / 27.0)))
    bins = torch.linspace(0.0, SAMPLE_RATE / 2, FOURIER // 2 + 1, dtype=torch.float64)
    left, center, right = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    rising, falling = (bins - left) / (center - left), (right - bins) / (right - center)
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    # A triangle of height 2 / base has an area of 1. Without it, the broad high ones would be louder than the low ones.
    return (triangles * (2.0 / (right - left))).to(torch.float32)
