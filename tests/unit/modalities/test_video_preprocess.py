"""Clips become evenly sampled frames, and unusable ones one counted reason."""

import io
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.video import encode, preprocess
from megatron_gemini.modalities.video.encode import encode_video
from megatron_gemini.modalities.video.preprocess import decode_video


def _ramp(frames: int, side: int = 16) -> np.ndarray:
    """Frame i is grey of value 20 + 10 i."""
    return np.stack([np.full((side, side, 3), 20 + 10 * i, np.uint8) for i in range(frames)])


CLIP = encode_video(_ramp(9), fps=4)


def test_thumbnail_frames_survive_encoding():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 8, 8, 1), np.uint8)
    frames = np.broadcast_to(coarse.repeat(2, axis=1).repeat(2, axis=2), (3, 16, 16, 3))
    decoded, seconds = decode_video(encode_video(frames, fps=2), max_frames=8)
    assert decoded.shape == (3, 16, 16, 3)
    assert decoded.dtype == np.uint8
    assert seconds == pytest.approx(0.5)
    assert np.abs(decoded.astype(int) - frames).mean() < 4


@pytest.mark.parametrize(("max_frames", "kept"), [(1, [0]), (3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (20, list(range(9)))])
def test_frames_are_sampled_evenly(max_frames, kept):
    frames, seconds = decode_video(CLIP, max_frames)
    assert np.abs(frames.mean(axis=(1, 2, 3)) - [20 + 10 * i for i in kept]).max() < 4
    assert seconds == pytest.approx(0.25 * 8 / (len(kept) - 1) if len(kept) > 1 else 0.0, abs=0.01)


def _sound_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return file.getvalue()


def _no_frames() -> bytes:
    file = io.BytesIO()
    with av.open(file, mode="w", format="avi") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "video_empty"),
        (b"not a video" * 50, "video_unreadable"),
        (CLIP[: len(CLIP) // 2], "video_unreadable"),
        (_sound_only(), "video_no_frames"),
        (_no_frames(), "video_no_frames"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://localhost/x.ts\n", "video_unreadable"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "video_unreadable"),
    ],
)
def test_unusable_clips_have_one_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        decode_video(data, 4)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_bytes": 100}, "video_too_large"),
        ({"max_pixels": 255}, "video_too_large"),
        ({"max_seconds": 1.0}, "video_too_long"),
    ],
)
def test_limits_are_checked_before_decoding(limits, reason, monkeypatch):
    monkeypatch.setattr(preprocess, "_decoded", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadSample) as caught:
        decode_video(CLIP, 4, **limits)
    assert caught.value.reason == reason


def test_too_many_frames_are_refused(monkeypatch):
    monkeypatch.setattr(preprocess, "MAX_CODED_FRAMES", 5)
    with pytest.raises(BadSample) as caught:
        decode_video(CLIP, 4)
    assert caught.value.reason == "video_too_many_frames"


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=1, max_size=100), st.floats(0, 1))
def test_random_damage_never_raises_anything_else(noise, where):
    at = int(where * len(CLIP))
    try:
        frames, seconds = decode_video(CLIP[:at] + noise + CLIP[at + len(noise) :], 4)
    except BadSample as error:
        assert error.reason.startswith("video_")
    else:
        assert frames.dtype == np.uint8
        assert np.isfinite(seconds)


def test_a_clip_is_encoded_until_two_agree(monkeypatch):
    """x264 gives other bytes once in a great while; here at its first and third try."""
    real, tries = encode._encode, iter([b"slip", None, b"another", None])
    monkeypatch.setattr(encode, "_encode", lambda *given: next(tries) or real(*given))
    assert encode_video(_ramp(9), fps=4) == CLIP
    assert not list(tries)


def test_odd_sides_cannot_be_encoded():
    with pytest.raises(ValueError, match="even sides"):
        encode_video(_ramp(2, side=15), fps=2)


def test_a_clip_has_one_scaler_of_one_thread(monkeypatch):
    """PyAV makes another for each frame, with a thread for every core: most of the time of small clips."""
    made, used = [], []

    def reformat(*arguments, **named):
        used.append(named["threads"])
        return made[-1].reformat(*arguments, **named)

    def scaler():
        made.append(VideoReformatter())
        return SimpleNamespace(reformat=reformat)

    monkeypatch.setattr(preprocess, "VideoReformatter", scaler)
    decode_video(CLIP, max_frames=9)
    assert len(made) == 1 and used == [1] * 9


def test_a_file_is_opened_once(monkeypatch):
    """FFmpeg decodes frames whenever it opens one."""
    opened = []
    true_open = preprocess.open_media
    monkeypatch.setattr(preprocess, "open_media", lambda *given: opened.append(1) or true_open(*given))
    decode_video(CLIP, max_frames=9)
    assert opened == [1]
