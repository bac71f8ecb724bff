"""A corpus with every kind of adversarial and damaged input that a collection from the web may hold, and what should
come of each.

Every sample's key is the reason that it is to be skipped for, then a number; keys of good samples begin with "good".
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from tests.tiny_shards import LAYOUT, Members, add, codes, document, mp4, png, sample, wav, write_tar


class Writes:
    """What unpickles as a file: a canary for code that runs."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple:
        return open, (self.canary, "w")


@dataclass(frozen=True)
class Corpus:
    """A shard of one task. rejected: members that its tar's index leaves out, by reason."""

    task: str
    shard: str
    rejected: dict[str, int]


def write_corpus(folder: Path, canary: Path) -> list[Corpus]:
    """A shard of every task, of good samples among bad ones, and three tars that are themselves bad."""
    shards = [
        ("caption", _pictures(canary)),
        ("generate", _codes()),
        ("transcribe", _recordings(canary)),
        ("video_caption", _clips(canary)),
        ("interleave", _documents(canary)),
    ]
    made = [Corpus(task, write_tar(folder / f"{task}.tar", _numbered(bad)), {}) for task, bad in shards]
    return [*made, _bad_members(folder, canary), _broken_off(folder), _absurd_size(folder)]


def _numbered(bad: list[tuple[str, Members]]) -> Iterable[tuple[str, Members]]:
    good = document if bad[0][1].keys() & {"json"} else sample
    yield from ((f"good-{i}", good(i)) for i in range(12))
    yield from ((f"{reason}-{100 + i}", members) for i, (reason, members) in enumerate(bad))


def _pictures(canary: Path) -> list[tuple[str, Members]]:
    good, half = sample(0), png(1, 32, 32)
    pictures = [
        ("image_corrupt", half[: len(half) // 2]),
        ("image_corrupt", _jpeg(64)[:2000]),
        ("image_corrupt", half[:60] + bytes([half[60] ^ 255]) + half[61:]),  # a checksum that is wrong
        ("image_too_large", _png_of(30_000, 30_000)),  # 900 megapixels in a few bytes
        ("image_too_large", _png_of(2**31 - 1, 2**31 - 1)),
        ("image_too_narrow", _png_of(100_000, 1)),
        ("image_unreadable", pickle.dumps(Writes(canary))),
        (
            "image_unreadable",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + str(canary).encode() + b") (w) file",
        ),
        ("image_unreadable", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("image_unreadable", b"hello, I am text"),
        ("image_empty", b""),
        ("good", _jpeg(16)),  # called .png, and the content tells
    ]
    bad: list[tuple[str, Members]] = [(reason, {**good, "png": picture}) for reason, picture in pictures]
    texts = [
        ("text_too_large", b"long " * 10_000_000),  # 50 MB
        ("too_long", b"long " * 1000),
        ("bad_text", b"caf\xe9"),
        ("bad_text", b"\xed\xa0\x80"),  # half of a surrogate pair
        ("empty_text", b" \n"),
    ]
    bad += [(reason, {**good, "txt": text}) for reason, text in texts]
    bad += [("missing_image", {"txt": b"x", "pyd": pickle.dumps(Writes(canary)), "pickle": b"x"})]
    return bad


def _codes() -> list[tuple[str, Members]]:
    right = json.loads(codes())["codes"]
    values: list[tuple[str, object]] = [
        ("bad_codes", {"codes": [*right[1:], float("nan")]}),
        ("bad_codes", {"codes": [*right[1:], True]}),
        ("bad_codes", {"codes": [*right[1:], 1e300]}),
        ("bad_codes", {"codes": [*right[1:], len(LAYOUT.code_range("image"))]}),
        ("bad_codes", {"codes": right * 10_000}),
        ("bad_codes", {"codes": {"0": 1}}),
        ("bad_codes", right),
    ]
    members = [(reason, json.dumps(value).encode()) for reason, value in values]
    members += [("bad_json", b'{"codes": [' + b"9" * 10_000 + b"]}"), ("bad_json", b"\xff\xfe"), ("bad_json", b"")]
    members += [("bad_json", b'{"codes": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")]
    return [(reason, {**sample(0), "codes.json": data}) for reason, data in members]


def _recordings(canary: Path) -> list[tuple[str, Members]]:
    whole = wav()
    sounds = [
        ("audio_silent", _sound(np.zeros(1600))),
        ("audio_not_finite", _sound(np.where(np.arange(1600) == 800, np.nan, 0.5))),
        ("audio_not_finite", _sound(np.full(1600, np.inf))),
        ("audio_out_of_range", _sound(np.where(np.arange(1600) % 2, 1e30, -1e30))),
        ("audio_too_long", _sound(np.sin(np.arange(16_000 * 5)))),
        ("audio_truncated", whole[: len(whole) // 2]),
        ("audio_unreadable", b"RIFF nonsense"),
        ("audio_unreadable", pickle.dumps(Writes(canary))),
        ("audio_bad_rate", whole[:24] + struct.pack("<I", 1) + whole[28:]),
        ("audio_empty", b""),
        ("audio_empty", _sound(np.zeros(0))),
    ]
    return [(reason, {**sample(0), "wav": sound}) for reason, sound in sounds]


def _clips(canary: Path) -> list[tuple[str, Members]]:
    whole = mp4(4)
    clips = [
        ("video_no_frames", whole[: len(whole) // 2]),  # the index is at the end
        ("video_unreadable", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ("video_unreadable", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"),
        ("video_unreadable", pickle.dumps(Writes(canary))),
        ("video_no_frames", _patched(whole, b"stco", 8, struct.pack(">I", 0x7FFFFFFF))),  # points beyond the file
        ("video_too_many_frames", _index_bomb(whole)),
        ("video_too_many_frames", _index_bomb(whole)[:40] + _box(b"trun", bytes(4) + b"\x04\0\0\0")),
        ("video_unreadable", _box(b"moov", _box(b"cmov", zlib.compress(whole)))),
        ("video_empty", b""),
    ]
    return [(reason, {**sample(0), "mp4": clip}) for reason, clip in clips]


def _documents(canary: Path) -> list[tuple[str, Members]]:
    def of(*items: object) -> Members:
        return {**document(0), "json": json.dumps({"items": items}).encode()}

    deep = b'{"items": ' + b'[{"text": ' * 50_000 + b"1" + b"}]" * 50_000 + b"}"
    return [
        ("bad_json", {**document(0), "json": deep}),
        ("bad_json", {**document(0), "json": b"\x80\x04" + pickle.dumps(Writes(canary))}),
        ("bad_json", {**document(0), "json": b'{"items": [], "items": {}}'}),
        ("bad_json", of({"image": "0.png", "text": "both"})),
        ("bad_json", of({"image": ["0.png"]})),
        ("bad_json", of({"pipe": f"touch {canary}"})),
        ("unsafe_name", of({"image": "../../../etc/passwd"})),
        ("unsafe_name", of({"image": "file:///etc/passwd"})),
        ("image_too_large", {**of({"image": "0.png"}), "0.png": _png_of(30_000, 30_000)}),
        ("too_long", of(*[{"image": "0.png"}] * 20_000)),
        ("text_too_large", {**document(0), "json": b'{"items": [' + b'{"text": "' + b"x" * 3_000_000 + b'"}]}'}),
    ]


def _bad_members(folder: Path, canary: Path) -> Corpus:
    """Names and kinds of members that a careless reader would write to, follow or run."""
    path = folder / "members.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(8):
            add(tar, f"good-{number}.txt", b"text")
        for name in ("../up.txt", "/absolute.txt", "a/../../b.txt", "C:\\x.txt", "line\nbreak.txt", "./../c.txt"):
            add(tar, name, b"text")
        for name in (f"missing_text-$(touch {canary.name}).pyd", "missing_text-__reduce__.pickle"):
            add(tar, name, pickle.dumps(Writes(canary)))
        for _ in range(2):  # beside the first one
            add(tar, "good-0.txt", b"another text")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            header = tarfile.TarInfo(f"special{kind.decode()}.txt")
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    rejected = {"tar_unsafe_name": 6, "tar_duplicate": 2, "tar_link": 2, "tar_special_file": 2}
    return Corpus("text", str(path), rejected)


def _broken_off(folder: Path) -> Corpus:
    path = folder / "broken.tar"
    write_tar(path, ((f"good-{i}", {"txt": b"x".ljust(2000)}) for i in range(8)))
    path.write_bytes(path.read_bytes()[: 7 * 2560 + 1000])  # a header and three blocks of content each
    return Corpus("text", str(path), {"tar_damaged": 1})


def _absurd_size(folder: Path) -> Corpus:
    """A member of 8 exabytes, as GNU tar's binary sizes can say it."""
    path = folder / "absurd.tar"
    write_tar(path, ((f"good-{i}", {"txt": b"text"}) for i in range(8)))
    header = bytearray(tarfile.TarInfo("bad.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80\0\0\0" + struct.pack(">Q", 2**63 - 1)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(path.read_bytes()[: 8 * 1024] + bytes(header) + b"\0" * 2048)
    return Corpus("text", str(path), {"tar_damaged": 1})


def _png_of(width: int, height: int) -> bytes:
    """A PNG that says to be of that size, with hardly anything in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def _jpeg(size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _sound(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _patched(clip: bytes, box: bytes, offset: int, data: bytes) -> bytes:
    """The clip with other bytes at an offset behind the name of its first box of that kind."""
    place = clip.index(box) + 4 + offset
    return clip[:place] + data + clip[place + len(data) :]


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + kind + content


def _index_bomb(clip: bytes) -> bytes:
    """A kilobyte whose index sends of 80 million frames of one byte, all of them in one chunk."""
    frames = struct.pack(">I", 80_000_000)
    clip = _patched(clip, b"stsz", 4, struct.pack(">I", 1) + frames)
    clip = _patched(clip, b"stts", 8, frames)
    return _patched(clip, b"stsc", 12, frames)
