"""Image files of every kind become RGB patches, and unusable ones one counted reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.image.preprocess import (
    FORMATS,
    decode_image,
    fit_image,
    fitted_size,
    patchify,
    signed_pixels,
    square_image,
    vision_grid,
)


def _file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 100) + b"IDAT"


def _photo(height: int = 24, width: int = 32) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 7 % 256, y * 9 % 256, (x + y) * 5 % 256], axis=-1).astype(np.uint8)


def test_rgb_png_comes_back_exactly():
    assert np.array_equal(decode_image(_file(Image.fromarray(_photo()))), _photo())


MODES = {  # what Pillow can write
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_rgb(kind, mode):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    image = Image.fromarray(np.full((8, 8), 128 << 8, np.uint16)) if mode == "I;16" else red.convert(mode)
    decoded = decode_image(_file(image, kind))
    assert decoded.shape == (8, 8, 3)
    assert decoded.dtype == np.uint8
    if mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr"):
        assert np.abs(decoded.astype(int) - (255, 0, 0)).max() < 8


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert decode_image(_file(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_jpeg_keeps_its_colors():
    decoded = decode_image(_file(Image.new("RGB", (16, 16), (200, 40, 30)).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - (200, 40, 30)).max() < 12


def test_transparency_is_composited_on_white():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 128))
    assert decode_image(_file(half))[0, :, 0].tolist() == [255, 127]
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([0, 0, 0] * 4)
    assert decode_image(_file(palette, transparency=3))[0, 0].tolist() == [255, 255, 255]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), color) for color in ("lime", "blue")]
    data = _file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [0, 255, 0]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    data = _file(Image.fromarray(_photo(24, 32)), "JPEG", exif=exif, quality=95)
    decoded = decode_image(data)
    assert decoded.shape == (32, 24, 3)
    assert np.abs(decoded.astype(int) - np.rot90(_photo(24, 32), -1)).mean() < 20


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image_empty"),
        (b"not an image at all", "image_unreadable"),
        (_png_header(60_000, 60_000), "image_too_large"),
        (_png_header(8_000, 7_000), "image_too_large"),
        (_png_header(100_000, 1), "image_too_narrow"),
        (_png_header(16, 16), "image_corrupt"),
        (_file(Image.fromarray(_photo(200, 200)))[:-200], "image_corrupt"),
        (_file(Image.fromarray(_photo(200, 200)), "JPEG")[:-200], "image_corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unreadable"),  # would start a program
    ],
)
def test_unusable_images_have_one_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_header_of_zero_size_is_refused():
    with pytest.raises(BadSample):
        decode_image(_png_header(0, 7))


def test_limit_is_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    bomb = _file_of_black(3000)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadSample, match="3000 x 3000"):
        decode_image(bomb, max_pixels=1_000_000)


def _file_of_black(side: int) -> bytes:
    rows = zlib.compress(bytes((side + 1) * side))
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + rows, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP"]))
def test_random_damage_never_raises_anything_else(noise, at, kind):
    data = _file(Image.fromarray(_photo()), kind)
    try:
        decode_image(data[:at] + noise + data[at + len(noise) :])
    except BadSample as error:
        assert error.reason.startswith("image_")


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 32), st.integers(1, 16))
def test_fitted_size_is_whole_patches_near_the_native_aspect(height, width, patch, patches):
    max_side = patch * patches
    h, w = fitted_size(height, width, patch, max_side)
    assert h % patch == w % patch == 0
    assert patch <= h <= max_side
    assert patch <= w <= max_side
    scale = min(1.0, max_side / max(height, width))
    for fitted, native in ((h, height), (w, width)):
        assert abs(fitted - native * scale) <= patch / 2 + 1e-9 or fitted == patch


def test_small_image_keeps_its_size_and_large_one_is_reduced():
    small = _photo(16, 16)
    assert fit_image(small, 4, 64) is small
    assert fit_image(_photo(100, 200), 4, 64).shape == (32, 64, 3)
    assert fit_image(_photo(1, 90), 4, 64).shape == (4, 64, 3)
    with pytest.raises(BadSample):
        fit_image(np.zeros((0, 5, 3), np.uint8), 4, 64)


def test_patches_are_in_the_stated_order():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    values_PC = patchify(images, 4)
    assert vision_grid(images, 4) == (2, 2, 3)
    assert values_PC.shape == (12, 48)
    frame, row, column = 1, 1, 2
    tile = images[frame, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
    expected = torch.from_numpy(tile.reshape(-1).astype(np.float32) / 127.5 - 1)
    assert torch.equal(values_PC[(frame * 2 + row) * 3 + column], expected)


def test_partial_patches_are_refused():
    with pytest.raises(ValueError, match="fit_image"):
        patchify(np.zeros((1, 10, 8, 3), np.uint8), 4)


def test_square_image_takes_the_center():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 255
    assert (square_image(image, 4) == 255).all()
    assert square_image(_photo(30, 20), 16).shape == (16, 16, 3)
    assert signed_pixels(np.array([0, 255], np.uint8)).tolist() == [-1.0, 1.0]


def jpeg(height: int, width: int) -> bytes:
    """A JPEG of soft shapes and an edge, as photographs have them."""
    y, x = np.mgrid[:height, :width] / 64
    pixels_HW3 = np.stack([127 + 100 * np.sin(x + phase) * np.cos(y * (1 + phase)) for phase in range(3)], axis=-1)
    pixels_HW3[height // 3 : height // 2] = 30
    file = io.BytesIO()
    Image.fromarray(pixels_HW3.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(512, 512, 2), (447, 300, 1), (448, 300, 2), (900, 1000, 4), (1800, 1800, 8), (300, 1800, 4), (100, 1800, 1)],
)
def test_a_jpeg_is_decoded_at_the_smallest_fraction_that_the_target_allows(height, width, factor):
    data = jpeg(height, width)
    small_HW3 = decode_image(data, shrink_to=224)
    assert small_HW3.shape[:2] == (-(-height // factor), -(-width // factor))
    assert max(small_HW3.shape) >= 224 or factor == 1
    whole_HW3 = decode_image(data)
    assert whole_HW3.shape[:2] == (height, width)
    one, other = (fit_image(image_HW3, 14, 224).astype(int) for image_HW3 in (small_HW3, whole_HW3))
    assert one.shape == other.shape
    error = np.abs(one - other)
    assert error.mean() < 2.0  # of 255
    assert np.percentile(error, 99) <= 16


def test_other_formats_are_decoded_whole():
    file = io.BytesIO()
    Image.new("RGB", (600, 600)).save(file, "PNG")
    assert decode_image(file.getvalue(), shrink_to=100).shape == (600, 600, 3)


@pytest.mark.parametrize(
    "kind",
    ["TIFF", pytest.param("AVIF", marks=pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has none"))],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_scans_and_pictures_of_phones_are_read(kind, mode):
    image = Image.fromarray(_photo()).convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    decoded = decode_image(_file(image, kind, **({"quality": 95} if kind == "AVIF" else {})))
    assert np.abs(decoded.astype(int) - (_photo() if mode == "RGB" else 255)).mean() < 8


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_tiff_without_a_known_range_is_refused(dtype):
    with pytest.raises(BadSample) as caught:
        decode_image(_file(Image.fromarray(_photo()[:, :, 0].astype(dtype)), "TIFF"))
    assert caught.value.reason == "image_no_range"


def test_a_tiff_of_16_bits_is_scaled():
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert decode_image(_file(Image.fromarray(grey), "TIFF"))[0, :, 0].tolist() == [0, 1, 128, 255]
