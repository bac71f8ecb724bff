import io
import struct

import av
import numpy as np
import pytest

from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.video.mp4_index import check_index
from megatron_gemini.modalities.video.preprocess import decode_video
from tests.tiny_shards import mp4


def with_sound(codec: str, container: str, options: dict[str, str]) -> bytes:
    """Four frames and half a second of sound."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as out:
        video, audio = out.add_stream("libx264", rate=8), out.add_stream(codec, rate=48_000, layout="mono")
        video.width = video.height = 16
        video.pix_fmt = "yuv420p"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 50 * i, np.uint8), format="rgb24")
            out.mux(video.encode(frame))
        kind = "s16" if codec.startswith("pcm") else "fltp"
        wave = av.AudioFrame.from_ndarray(
            np.zeros((1, 24_000), np.int16 if kind == "s16" else np.float32), kind, "mono"
        )
        wave.sample_rate = 48_000
        out.mux(audio.encode(wave))
        out.mux(audio.encode(None))
        out.mux(video.encode(None))
    return file.getvalue()


def refused(data: bytes, limit: int) -> str:
    with pytest.raises(BadSample) as caught:
        check_index(data, limit)
    return caught.value.reason


def test_the_limit_is_the_number_of_frames():
    clip = mp4(4)
    check_index(clip, 4)
    assert refused(clip, 3) == "video_too_many_frames"


def test_fragments_are_counted_together():
    clip = with_sound("aac", "mp4", {"movflags": "frag_keyframe+empty_moov"})
    assert b"trun" in clip
    check_index(clip, 100)
    assert refused(clip, 10) == "video_too_many_frames"
    assert len(decode_video(clip, 4)[0]) == 4


def test_samples_of_plain_sound_are_no_frames():
    clip = with_sound("pcm_s16le", "mov", {})
    place = clip.index(b"stsz", clip.index(b"soun")) + 8
    assert 24_000 in (int.from_bytes(clip[p : p + 4], "big") for p in (place, place + 4))
    check_index(clip, 100)
    assert len(decode_video(clip, 4)[0]) == 4
    pretends = clip.replace(b"soun", b"vide", 1)
    assert refused(pretends, 100) == "video_too_many_frames"


def test_media_that_looks_like_an_index_is_not_read_as_one():
    lies = struct.pack(">I4s", 32, b"mdat") + b"stsz" + b"\xff" * 20
    check_index(lies + mp4(2), 10)
    assert refused(struct.pack(">I4s", 4, b"mdat") + lies[8:], 10) == "video_too_many_frames"


@pytest.mark.parametrize(
    "data", [b"", b"abc", b"\0\0\0\1mdat", b"\0\0\0\0mdat", b"\xff" * 40, b"RIFFstsz" + b"\xff" * 20]
)
def test_bytes_without_an_index_are_let_through(data):
    check_index(data, 1)
