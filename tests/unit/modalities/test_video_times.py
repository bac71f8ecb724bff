"""Frames are taken at even steps of time, with the times that they have, upright and of square pixels."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.video.preprocess import decode_video
from megatron_gemini.modalities.video.sampling import sample_frames
from tests.unit.modalities.test_audio_lengths import NOISE, _file, with_cover

MILLISECONDS = Fraction(1, 1000)


def clip(times, kind="mp4", size=(16, 16), aspect=None, sound=0.0) -> bytes:
    """Frame i, shown from times[i] milliseconds on, is grey of value 20 + 20 i. sound: its seconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "10", "threads": "1", "bf": "0"}
        stream.codec_context.time_base = MILLISECONDS
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        voice = container.add_stream("aac", rate=16_000) if sound else None
        for i, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 20 + 20 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, MILLISECONDS
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice:
            for begin in range(0, round(sound * 16_000), 1024):
                wave = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                wave.sample_rate, wave.pts = 16_000, begin
                container.mux(voice.encode(wave))
            container.mux(voice.encode())
    return file.getvalue()


def shown(data: bytes, at_most: int = 20) -> tuple[list[int], float]:
    """(number of each frame that is kept, seconds between two)."""
    frames, between = decode_video(data, at_most)
    return ((frames.mean(axis=(1, 2, 3)) - 20) / 20).round().astype(int).tolist(), between


def test_a_frame_that_stands_still_is_shown_for_as_long():
    numbers, between = shown(clip([0, 40, 80, 10_000, 10_130]), 8)
    assert between == pytest.approx(10.13 / 7)
    assert numbers == [0, *[2] * 6, 4]


def test_a_burst_at_the_end_does_not_stretch_what_is_before_it():
    numbers, between = shown(clip([0, 1000, 2000, 3000, 3010, 3020, 3030, 3040]), 4)
    assert (numbers, between) == ([0, 1, 2, 7], pytest.approx(3.04 / 3))


def test_few_uneven_frames_are_all_kept_where_there_is_room():
    numbers, between = shown(clip([0, 100, 300]))
    assert (numbers, between) == ([0, 1, 1, 2], pytest.approx(0.1))


def test_even_frames_are_kept_once_each_also_with_rounded_times():
    assert shown(clip([0, 33, 67, 100, 133, 167])) == (list(range(6)), pytest.approx(0.0334))


@pytest.mark.parametrize("first", [40, 5000])
@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_a_clip_that_begins_later_is_the_same(first, kind):
    assert shown(clip([first + 40 * i for i in range(5)], kind)) == (list(range(5)), pytest.approx(0.04))


def test_frames_that_an_edit_list_leaves_out_are_not_there_and_are_no_damage():
    """A time before 0 makes an edit list, as cutting without encoding anew does."""
    assert shown(clip([40 * i - 120 for i in range(8)])) == ([3, 4, 5, 6, 7], pytest.approx(0.04))


@pytest.mark.parametrize("kind", ["avi", "matroska", "mpegts"])
def test_a_header_that_estimates_the_number_of_frames_is_not_believed(kind):
    numbers, between = shown(clip([0, 40, 80, 120, 160, 200], kind))
    assert numbers == list(range(6))
    assert between == pytest.approx(0.04, rel=0.25)  # AVI rounds times to frames


def test_a_sound_that_is_longer_than_the_clip_changes_nothing():
    data = clip([0, 40, 80], sound=4.0)
    assert len(decode_video(data, 8, max_seconds=1.0)[0]) == 3


def test_a_clip_is_as_long_as_its_frames_say():
    with pytest.raises(BadSample, match=r"10\.0 s; the limit is 9 s") as caught:
        decode_video(clip([0, 10_000]), 8, max_seconds=9.0)
    assert caught.value.reason == "video_too_long"


@pytest.mark.parametrize(
    ("aspect", "width"), [(None, 32), (Fraction(2, 1), 64), (Fraction(64, 45), 46), (Fraction(1, 2), 16)]
)
def test_pixels_become_square(aspect, width):
    assert decode_video(clip([0, 40], size=(32, 16), aspect=aspect), 8)[0].shape == (2, 16, width, 3)


def test_pixels_of_an_absurd_shape_are_refused():
    data = clip([0, 40], aspect=Fraction(2, 1))
    place = data.find(b"pasp") + 4
    stretched = data[:place] + (480).to_bytes(4, "big") + data[place + 4 :]
    with pytest.raises(BadSample) as caught:
        decode_video(stretched, 8)
    assert caught.value.reason == "video_too_narrow"


def test_a_clip_is_turned_after_its_pixels_became_square():
    data = clip([0, 40], size=(32, 16), aspect=Fraction(2, 1))
    upright = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"
    turned = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(16) + b"\x40\0\0\0"
    place = data.find(upright, data.find(b"tkhd"))
    assert place > 0
    turned_data = data[:place] + turned + data[place + len(upright) :]
    assert decode_video(turned_data, 8)[0].shape == (2, 64, 16, 3)


@pytest.mark.parametrize("sound", ["mp3", "m4a"])
def test_a_sound_with_a_cover_has_no_frames(sound):
    cover = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "PNG")
    data = with_cover(_file("MP3"), cover.getvalue()) if sound == "mp3" else _m4a(cover.getvalue())
    with pytest.raises(BadSample) as caught:
        decode_video(data, 8)
    assert caught.value.reason == ("video_unreadable" if sound == "mp3" else "video_no_frames")


def test_the_cover_of_a_clip_is_not_taken_for_it():
    """Matroska lists a cover like a stream; here it stands before the clip."""
    cover = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(cover, "PNG")
    file = io.BytesIO()
    with av.open(io.BytesIO(clip([0, 40, 80]))) as source, av.open(file, "w", format="mp4") as container:
        picture = container.add_stream("png", rate=1)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        moving = container.add_stream_from_template(source.streams.video[0])
        still = av.Packet(cover.getvalue())
        still.stream, still.pts, still.dts, still.time_base = picture, 0, 0, Fraction(1, 1)
        container.mux(still)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = moving
                container.mux(packet)
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert len(container.streams.video) == 2
    assert decode_video(file.getvalue(), 8)[0].shape == (3, 16, 16, 3)


def _m4a(cover: bytes) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        voice = container.add_stream("aac", rate=16_000)
        picture = container.add_stream("png", rate=1)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        still = av.Packet(cover)
        still.stream, still.pts, still.dts, still.time_base = picture, 0, 0, Fraction(1, 1)
        for begin in range(0, 4096, 1024):
            wave = av.AudioFrame.from_ndarray(NOISE[None, begin : begin + 1024], format="fltp", layout="mono")
            wave.sample_rate, wave.pts = 16_000, begin
            container.mux(voice.encode(wave))
        container.mux(voice.encode())
        container.mux(still)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["avi", "matroska", "webm"])
@pytest.mark.parametrize("share", [0.6, 0.95])
def test_a_clip_that_was_cut_is_refused(kind, share):
    data = clip([40 * i for i in range(10)], "matroska" if kind == "webm" else kind)
    with pytest.raises(BadSample) as caught:
        decode_video(data[: int(share * len(data))], 8)
    assert caught.value.reason == "video_truncated"


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40).map(sorted), st.integers(1, 12))
def test_what_is_kept_is_shown_at_its_step(times, at_most):
    seconds_F = np.array(times) / 1000
    count_F, between = sample_frames(seconds_F, at_most)
    kept = np.repeat(np.arange(len(times)), count_F)
    assert 1 <= len(kept) <= at_most
    assert kept[0] == 0 or seconds_F[kept[0]] == seconds_F[0]
    told = seconds_F[0] + between * np.arange(len(kept))
    until = np.append(seconds_F[1:], np.inf)
    # Shown at the time that is told. Of a clip that is as good as even, frames are taken by their number: a quarter of
    # a step off, and half of one where the number is rounded.
    slack = 0.75 * (seconds_F[-1] - seconds_F[0]) / max(len(times) - 1, 1) + 1e-5
    assert (seconds_F[kept] - slack <= told).all()
    assert (told <= until[kept] + slack).all()
