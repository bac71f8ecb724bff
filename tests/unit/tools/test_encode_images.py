"""Shards get the codes of their images, once, whole or not at all."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_gemini.checkpoint.inference import load_image_tokenizer, save_weights
from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.modalities.image.preprocess import decode_image, signed_pixels, square_image
from megatron_gemini.parallel.parameters import initialize

_spec = importlib.util.spec_from_file_location(
    "encode_images", Path(__file__).parents[3] / "tools" / "encode_images.py"
)
encode_images = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(encode_images)


def _save_tokenizer(path: Path, seed: int) -> Path:
    config = ImageTokenizerConfig(image_size=8, width=16, layers=1, heads=2, mlp_width=16, codes=16)
    tokenizer = ImageTokenizer(config)
    initialize(tokenizer, seed)
    save_weights(tokenizer, RunConfig(image_tokenizer=config), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return _save_tokenizer(tmp_path_factory.mktemp("tokenizer"), seed=0)


def _image(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def _read(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


MEMBERS = {
    "a.png": _image(0),
    "a.txt": b"zero",
    "b.0.jpg": _image(1, "JPEG"),
    "b.1.webp": _image(2, "WEBP"),
    "b.json": b"{}",
    "../evil.png": _image(3),  # a key like any other: nothing is extracted
}


def _run(checkpoint: Path, *shards: Path | str) -> int:
    return encode_images.main(["--checkpoint", str(checkpoint), "--batch", "2", "--shards", *map(str, shards)])


def test_every_image_gets_its_codes_and_the_rest_stays(checkpoint, tmp_path):
    shard = _write(tmp_path / "x.tar", MEMBERS)
    assert _run(checkpoint, tmp_path / "*.tar") == 0
    members = _read(shard)
    assert list(members) == [
        "a.png",
        "a.codes.json",
        "a.txt",
        "b.0.jpg",
        "b.0.codes.json",
        "b.1.webp",
        "b.1.codes.json",
        "b.json",
        "../evil.png",
        "../evil.codes.json",
    ]
    assert {name: members[name] for name in MEMBERS} == MEMBERS
    tokenizer = load_image_tokenizer(checkpoint)
    for name in ("a.png", "b.0.jpg", "b.1.webp"):
        pixels = square_image(decode_image(MEMBERS[name]), 8)
        codes = json.loads(members[encode_images.codes_name(name)])["codes"]
        assert codes == tokenizer.encode(signed_pixels(pixels[None]))[0].tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_running_again_changes_nothing_and_another_tokenizer_replaces_codes(checkpoint, tmp_path):
    shard = _write(tmp_path / "x.tar", MEMBERS)
    assert _run(checkpoint, shard) == 0
    first, inode = shard.read_bytes(), shard.stat().st_ino
    assert _run(checkpoint, shard) == 0
    assert shard.read_bytes() == first
    assert shard.stat().st_ino == inode
    assert _run(_save_tokenizer(tmp_path / "other", seed=1), shard) == 0
    again = _read(shard)
    assert len(again) == len(_read_names(first))
    assert again["a.codes.json"] != _read_names(first)["a.codes.json"]


def _read_names(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_shard_without_images_is_left_alone(checkpoint, tmp_path):
    shard = _write(tmp_path / "x.tar", {"a.txt": b"text"})
    before = shard.read_bytes()
    assert _run(checkpoint, shard) == 0
    assert shard.read_bytes() == before


def test_bad_image_is_skipped_and_counted(checkpoint, tmp_path, capsys):
    shard = _write(tmp_path / "x.tar", {"a.png": _image(0), "b.png": b"no image"})
    assert _run(checkpoint, shard) == 0
    assert "1 skipped (1 image_unreadable)" in capsys.readouterr().out
    assert "b.codes.json" not in _read(shard)


def _break_second_header(data: bytes) -> bytes:
    broken = bytearray(data)
    size = int(data[124:135], 8)
    second = 512 + -(-size // 512) * 512
    broken[second : second + 20] = b"\xff" * 20
    return bytes(broken)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "x.tar"),
        (lambda data: b"noise" * 300, "not a whole tar"),
        (lambda data: data[:700], "x.tar"),
        (_break_second_header, "damaged"),
        (lambda data: data[: 512 + 512 * -(-len(MEMBERS["a.png"]) // 512)], "x.tar"),  # cut between two members
    ],
)
def test_damaged_shard_is_refused_in_one_line_and_left_alone(damage, words, checkpoint, tmp_path, capsys):
    shard = _write(tmp_path / "x.tar", MEMBERS)
    shard.write_bytes(damage(shard.read_bytes()))
    before = shard.read_bytes()
    assert _run(checkpoint, shard) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert shard.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_missing_input_and_all_bad_images_are_refused_in_one_line(checkpoint, tmp_path, capsys):
    shard = _write(tmp_path / "x.tar", {"a.png": b"no image"})
    assert _run(checkpoint, shard) == 2
    assert _run(checkpoint, tmp_path / "gone-*.tar") == 2
    assert _run(tmp_path / "gone", shard) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_pictures_of_every_ending_get_codes_and_shards_without_any_are_counted(checkpoint, tmp_path, capsys):
    kinds = {"a.png": "PNG", "b.gif": "GIF", "c.tif": "TIFF", "d.JPG": "JPEG"}
    shard = _write(tmp_path / "pictures.tar", {name: _image(i, kind) for i, (name, kind) in enumerate(kinds.items())})
    texts = _write(tmp_path / "texts.tar", {"a.txt": b"no picture"})
    encode_images.encode_shards(checkpoint, [shard, texts], batch=8, device="cpu")
    assert {name for name in _read(shard) if name.endswith(".codes.json")} == {f"{key}.codes.json" for key in "abcd"}
    assert "4 images encoded" in (printed := capsys.readouterr().out)
    assert "1 of the shards hold no image" in printed
