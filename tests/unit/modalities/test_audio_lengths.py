"""A recording is as long as what decodes of it, whatever its header says, and a cut one is refused."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import soundfile

from megatron_gemini.modalities.audio.compressed import decode_to_end
from megatron_gemini.modalities.audio.preprocess import SAMPLE_RATE, decode_audio
from megatron_gemini.modalities.bad_sample import BadSample, one_line

NOISE = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32)


def _file(kind: str, subtype: str | None = None, samples: np.ndarray = NOISE, rate: int = SAMPLE_RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def _wav_sizes(riff: int, size: int) -> bytes:
    data = bytearray(_file("WAV"))
    place = data.find(b"data") + 4
    data[4:8], data[place : place + 4] = riff.to_bytes(4, "little"), size.to_bytes(4, "little")
    return bytes(data)


def _flac_of(declared: int) -> bytes:
    """Whose header speaks of so many samples (36 bits, of which the upper 4 are not used here)."""
    data = bytearray(_file("FLAC"))
    data[22:26] = declared.to_bytes(4, "big")
    return bytes(data)


def _reason(data: bytes) -> str:
    with pytest.raises(BadSample) as caught:
        decode_audio(data)
    assert " object at 0x" not in str(caught.value) and "Errno" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("riff", "size"),
    [(0, 0), (0, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFFDB), (len(_file("WAV")) - 8, 0)],
)
def test_a_wav_from_a_pipe_is_decoded_to_its_end(riff, size):
    assert np.array_equal(decode_audio(_wav_sizes(riff, size)), decode_audio(_file("WAV")))


@pytest.mark.parametrize("declared", [0, len(NOISE) // 2, len(NOISE)])
def test_a_flac_is_decoded_to_its_end(declared):
    assert len(decode_audio(_flac_of(declared))) == len(NOISE)


@pytest.mark.parametrize(
    ("kind", "subtype"), [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_U8"), ("WAV", "FLOAT")]
)
def test_both_decoders_give_the_same_samples(kind, subtype):
    data = _file(kind, subtype, np.stack([NOISE, NOISE[::-1]], 1))
    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    samples_LC, found = decode_to_end(data, 9.0)
    assert found == rate
    assert np.array_equal(samples_LC, expected)


@pytest.mark.parametrize(
    "data",
    [
        _flac_of(2 * len(NOISE)),
        _file("FLAC")[: len(_file("FLAC")) // 2],
        _flac_of(0)[: len(_file("FLAC")) // 2],
        _file("MP3")[: len(_file("MP3")) * 2 // 3],
        *(_file("OGG", kind)[:cut] for kind in ("VORBIS", "OPUS") for cut in (-3, len(_file("OGG", kind)) // 2)),
        # At the end of a page nothing is broken, but the page that ends the stream is missing.
        *(_file("OGG", kind)[: _file("OGG", kind).rfind(b"OggS")] for kind in ("VORBIS", "OPUS")),
    ],
)
def test_a_recording_that_was_cut_is_refused(data):
    assert _reason(data) == "audio_truncated"


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
def test_ogg_files_behind_each_other_are_one_recording(kind):
    data = _file("OGG", kind) + _file("OGG", kind, NOISE[:SAMPLE_RATE])
    assert len(decode_audio(data)) == pytest.approx(3 * SAMPLE_RATE, abs=800)


def test_a_recording_that_changes_its_rate_midway_is_refused():
    assert _reason(_file("OGG", "VORBIS") + _file("OGG", "VORBIS", rate=8_000)) == "audio_corrupt"


@pytest.mark.parametrize("behind", [b"TAG" + bytes(125), b"APETAGEX" + bytes(24) + b"x" * 500, bytes(3000)])
def test_tags_behind_an_mp3_are_no_damage(behind):
    assert len(decode_audio(_file("MP3") + behind)) == pytest.approx(len(decode_audio(_file("MP3"))), abs=576)


def test_damage_within_an_mp3_is_told():
    data = _file("MP3")
    noise = np.random.default_rng(1).integers(0, 255, 3000, np.uint8).tobytes()
    assert _reason(data[:4000] + noise + data[4000:]) == "audio_corrupt"


@pytest.mark.parametrize("kind", ["MP3", "FLAC", "OGG"])
def test_a_length_that_no_header_tells_is_limited_while_decoding(kind):
    with pytest.raises(BadSample, match=r"goes on after 1\.5 s") as caught:
        decode_audio(_file(kind), max_seconds=1.5)
    assert caught.value.reason == "audio_too_long"
    assert len(decode_audio(_file(kind), max_seconds=2.1)) >= len(NOISE)


@pytest.mark.parametrize("data", [_file("OGG", "OPUS")[:300], _file("OGG", "VORBIS")[:300], b"RIFF" + bytes(90)])
def test_what_cannot_be_opened_is_told_without_the_address_of_an_object(data):
    assert _reason(data) in ("audio_unreadable", "audio_truncated")


def test_words_of_libraries_lose_the_objects_in_them():
    error = ValueError("Error opening <_io.BytesIO object at 0x7fb19d5046d0>: File contains data in an unknown format.")
    assert one_line(error) == "Error opening: File contains data in an unknown format."
    assert one_line(OSError(5, "Invalid data", "<none>")) == "Invalid data"
    assert one_line(ValueError("<_io.BytesIO object at 0x7fb19d5046d0>")) == "ValueError"


def test_a_sound_that_only_bats_hear_is_silent():
    wave = 0.3 * np.sin(np.arange(44_100) * (2 * np.pi * 20_000 / 44_100))
    assert _reason(_file("WAV", samples=wave.astype(np.float32) * np.hanning(44_100), rate=44_100)) == "audio_silent"


def test_what_resampling_leaves_nothing_of_is_empty():
    assert _reason(_file("WAV", samples=NOISE[:10], rate=700_000)) == "audio_empty"


@pytest.mark.parametrize("kind", ["WAV", "MP3", "OGG"])
def test_channels_that_cancel_leave_the_loudest(kind):
    louder = np.stack([NOISE, -1.02 * NOISE], 1)
    wave = decode_audio(_file(kind, samples=louder))
    alone = decode_audio(_file(kind, samples=1.02 * NOISE))
    assert np.sqrt(np.square(wave).mean()) == pytest.approx(np.sqrt(np.square(alone).mean()), rel=0.3)


def test_channels_that_do_not_cancel_are_averaged():
    other = np.random.default_rng(1).normal(0, 0.1, len(NOISE)).astype(np.float32)
    both = np.stack([NOISE, other], 1)
    assert np.array_equal(decode_audio(_file("WAV", "FLOAT", both)), both.mean(axis=1))


def _png(side: int) -> bytes:
    rows = zlib.compress(bytes((3 * side + 1) * side))
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + rows, b"IEND")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def with_cover(sound: bytes, picture: bytes) -> bytes:
    """An MP3 with a cover in an ID3v2.3 tag."""
    content = b"\0image/png\0\x03\0" + picture
    frame = b"APIC" + struct.pack(">I", len(content)) + b"\0\0" + content
    return b"ID3\x03\0\0" + bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0)) + frame + sound


def test_the_cover_of_a_sound_is_never_decoded(tmp_path):
    """In a process of its own: the most memory that a process ever had is one number."""
    (tmp_path / "x.mp3").write_bytes(with_cover(_file("MP3"), _png(12_000)))
    code = (
        "import resource, pathlib\n"
        "from megatron_gemini.modalities.audio.preprocess import decode_audio\n"
        f"data = pathlib.Path({str(tmp_path / 'x.mp3')!r}).read_bytes()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(decode_audio(data)) == 32000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    kilobytes = 1 if sys.platform != "darwin" else 1024
    assert int(grown) < 100_000 * kilobytes, "the picture takes 430 MB"


@pytest.mark.parametrize("form", ["WAV", "RF64", "W64", "AIFF"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_file_that_is_shorter_than_its_header_says_was_cut(form, share):
    file = io.BytesIO()
    wave = np.sin(np.arange(16000) / 20).astype(np.float32)
    soundfile.write(file, wave, SAMPLE_RATE, format=form, subtype="PCM_16")
    data = file.getvalue()
    assert len(decode_audio(data, 5.0)) == 16000
    with pytest.raises(BadSample) as error:
        decode_audio(data[: int(len(data) * share)], 5.0)
    assert error.value.reason == "audio_truncated"
