"""Recordings as people bring them: MP3 without a tag that says its length, and stereo with one wire reversed."""

import io
import struct

import numpy as np
import pytest
import soundfile

from megatron_gemini.modalities.audio.preprocess import SAMPLE_RATE, decode_audio

RATE, SECONDS = 44_100, 6
KILOBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)


def _recording() -> np.ndarray:
    """Near silence first, so that a variable rate begins with far smaller frames than it ends with."""
    random = np.random.default_rng(0)
    halves = [level * random.standard_normal(SECONDS * RATE // 2) for level in (1e-4, 0.2)]
    return np.concatenate(halves).astype(np.float32)


def _mp3(mode: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, _recording(), RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return file.getvalue()


def _first_frame(data: bytes) -> int:
    """Bytes of the first frame, which holds nothing but the Xing or Info tag."""
    header = struct.unpack(">I", data[:4])[0]
    return 144_000 * KILOBITS[(header >> 12) & 15] // RATE + ((header >> 9) & 1)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("tagged", [True, False])
def test_an_mp3_is_decoded_to_its_end_whether_or_not_a_tag_says_where_it_is(mode, tagged):
    data = _mp3(mode)
    wave = decode_audio(data if tagged else data[_first_frame(data) :])
    # Without the tag the encoder's padding cannot be told from sound: a frame and a half at most.
    assert SECONDS - 0.001 <= len(wave) / SAMPLE_RATE < SECONDS + 0.05
    loud = np.abs(wave[len(wave) // 2 + 1600 :]).mean()
    assert loud > 0.05, "the second half is the loud one"


def test_a_sound_whose_channels_cancel_is_read_from_one_of_them():
    wave = (0.3 * np.sin(np.arange(RATE) * 0.06)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave, -wave], 1), RATE, format="WAV")
    heard = decode_audio(file.getvalue())
    assert np.sqrt((heard**2).mean()) == pytest.approx(np.sqrt((wave**2).mean()), rel=0.01)
