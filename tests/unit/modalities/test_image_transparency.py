"""Whatever way a picture has to be transparent, what is transparent is white and the rest is as it was."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_gemini.modalities.image.preprocess import decode_image

GREY, COLORS, PALETTE, GREY_ALPHA, COLORS_ALPHA = 0, 2, 3, 4, 6  # PNG's own numbers


def png(bits: int, kind: int, row: bytes, palette: bytes = b"", transparent: bytes = b"", exif: bytes = b"") -> bytes:
    """Of two pixels beside each other."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)]
    chunks += [name + content for name, content in ((b"PLTE", palette), (b"tRNS", transparent)) if content]
    chunks += [b"eXIf" + exif] if exif else []
    chunks += [b"IDAT" + zlib.compress(b"\0" + row), b"IEND"]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def samples(bits: int, first: int, second: int) -> bytes:
    """Two grey samples, packed as a PNG packs them."""
    if bits == 16:
        return struct.pack(">HH", first, second)
    return ((first << 8 | second) if bits == 8 else (first << 8 - bits | second << 8 - 2 * bits)).to_bytes(
        2 if bits == 8 else 1, "big"
    )


def pixels(data: bytes) -> list[list[int]]:
    return decode_image(data).reshape(-1, 3).tolist()


def whites_and(grey: int) -> list[list[int]]:
    return [[255] * 3, [grey] * 3]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("share", [0, 1 / 3, 1])
def test_a_grey_that_is_transparent_is_white(bits, share):
    top = 2**bits - 1
    clear = round(share * top)
    other = 0 if clear else top
    data = png(bits, GREY, samples(bits, clear, other), transparent=struct.pack(">H", clear))
    assert pixels(data) == whites_and(other * 255 // top)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("share", [0, 0.07, 1])
def test_a_color_that_is_transparent_is_white(bits, share):
    top = 2**bits - 1
    clear = round(share * top)
    other = 0 if clear else top
    letter = "B" if bits == 8 else "H"
    row = struct.pack(f">6{letter}", *[clear] * 3, *[other] * 3)
    assert pixels(png(bits, COLORS, row, transparent=struct.pack(">3H", *[clear] * 3))) == whites_and(
        other * 255 // top
    )


@pytest.mark.parametrize("clear", [0, 0x1234, 0xFFFE])
def test_a_neighbor_of_a_transparent_color_of_16_bits_is_not_transparent(clear):
    """One that differs in its lower byte alone, also in one of three colors."""
    row = struct.pack(">6H", *[clear] * 3, clear, clear, clear ^ 1)
    data = png(16, COLORS, row, transparent=struct.pack(">3H", *[clear] * 3))
    assert pixels(data) == whites_and(clear >> 8)
    grey = png(16, GREY, struct.pack(">HH", clear, clear ^ 1), transparent=struct.pack(">H", clear))
    assert pixels(grey) == whites_and(clear >> 8)


def test_a_transparent_color_of_16_bits_is_found_in_a_turned_picture():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the two change places
    row = struct.pack(">6H", *[0x1234] * 3, *[0x5678] * 3)
    data = png(
        16, COLORS, row, transparent=struct.pack(">3H", *[0x1234] * 3), exif=exif.tobytes().removeprefix(b"Exif\0\0")
    )
    assert pixels(data) == [[0x56] * 3, [255] * 3]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [0, 128])
def test_a_palette_with_transparency_is_put_on_white(bits, alpha):
    data = png(bits, PALETTE, samples(bits, 0, 1), bytes(3) + bytes([40] * 3), bytes([alpha, 255]))
    first, second = pixels(data)
    assert first == [255 - alpha] * 3
    assert second == [40] * 3


@pytest.mark.parametrize(
    ("bits", "kind", "row"),
    [
        (8, GREY_ALPHA, bytes([7, 0, 50, 255])),
        (16, GREY_ALPHA, struct.pack(">4H", 7, 0, 50 * 257, 65535)),
        (8, COLORS_ALPHA, bytes([7, 7, 7, 0, 50, 50, 50, 255])),
        (16, COLORS_ALPHA, struct.pack(">8H", 7, 7, 7, 0, *[50 * 257] * 3, 65535)),
    ],
)
def test_alpha_is_put_on_white(bits, kind, row):
    assert pixels(png(bits, kind, row)) == whites_and(50)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("apart", [False, True])
def test_the_first_frame_of_an_animation_is_put_on_white(kind, apart):
    frames = [Image.new("RGBA", (2, 1)), Image.new("RGBA", (2, 1), "red")]
    frames[0].putpixel((1, 0), (50, 50, 50, 255))
    options = {"lossless": True} if kind == "WEBP" else {"default_image": apart} if kind == "PNG" else {}
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(file.getvalue()) == whites_and(50)


def gif(width: int, left: int, numbers: list[int], transparent: int | None) -> bytes:
    """One row of `width`, of which the frame fills `numbers` from `left` on; palette: black, red, green, blue."""
    bits = [
        bit for code in [each for n in numbers for each in (4, n)] + [5] for bit in (code & 1, code >> 1 & 1, code >> 2)
    ]
    packed = np.packbits(bits, bitorder="little").tobytes()
    palette = bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    control = b"\x21\xf9\x04" + bytes([transparent is not None, 0, 0, transparent or 0, 0])
    frame = b"," + struct.pack("<HHHHB", left, 0, len(numbers), 1, 0)
    screen = b"GIF89a" + struct.pack("<HHBBB", width, 1, 0xF1, 0, 0)
    return screen + palette + control + frame + bytes([2, len(packed)]) + packed + b"\0;"


@pytest.mark.parametrize(("transparent", "second"), [(None, [0, 255, 0]), (2, [255] * 3), (3, [0, 255, 0])])
def test_what_the_first_frame_of_a_gif_leaves_open_is_white(transparent, second):
    assert pixels(gif(4, 1, [1, 2], transparent)) == [[255] * 3, [255, 0, 0], second, [255] * 3]
    assert pixels(gif(2, 0, [1, 2], transparent)) == [[255, 0, 0], second]
