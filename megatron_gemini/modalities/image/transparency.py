"""Pictures of every mode as RGB, with what is transparent on white.

Shape suffixes: H height, W width.
"""

from __future__ import annotations

import io
from typing import cast

import numpy as np
from PIL import Image, ImageFile, ImageOps

from megatron_gemini.modalities.bad_sample import BadSample

_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # where the bits of a sample stand, in the header that begins the file


def to_rgb(data: bytes, image: Image.Image, covered: tuple[int, int, int, int] | None) -> Image.Image:
    """The picture `image`, decoded from `data` and turned upright, in mode RGB.

    covered: the part (left, upper, right, lower) that the first frame of a GIF fills, around which there is nothing;
    None for other formats. Raises BadSample: image_no_range.
    """
    if image.mode == "F" or (image.mode == "I" and not data.startswith(_PNG)):
        raise BadSample("image_no_range", "a pixel has 32 bits or is a float, and nothing says which value is white")
    depth = data[_PNG_DEPTH] if data.startswith(_PNG) else 8
    color = image.info.get("transparency")
    if image.mode in _SIXTEEN_BIT:  # Pillow's own conversion of mode I clips at 255 instead of scaling
        values_HW = np.asarray(image).astype(np.int64)
        grey_HW = np.clip(values_HW >> 8, 0, 255).astype(np.uint8)
        if isinstance(color, int):
            grey_HW[values_HW == color] = 255
        return Image.fromarray(grey_HW).convert("RGB")
    if image.mode == "RGB" and depth == 16 and isinstance(color, tuple):
        pixels_HW3 = np.array(image)
        pixels_HW3[(_sixteen_bits_HW3(data, pixels_HW3) == color).all(axis=-1)] = 255
        return Image.fromarray(pixels_HW3)
    if image.mode == "L" and depth in (2, 4) and isinstance(color, int):
        # Pillow scales the samples to 8 bits, and not the one that is transparent.
        image.info["transparency"] = color * 255 // (2**depth - 1)
    if image.has_transparency_data:  # what lies below transparent pixels is arbitrary, and dropping alpha would show it
        colors = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    if covered in (None, (0, 0, *image.size)):
        return image.convert("RGB")
    # Pillow fills the rest with a color of the palette, where every viewer shows nothing.
    white = Image.new("RGB", image.size, "white")
    white.paste(image.crop(covered).convert("RGB"), covered)
    return white


def _sixteen_bits_HW3(data: bytes, high_HW3: np.ndarray) -> np.ndarray:
    """The samples of a PNG of 16-bit colors, int64[H, W, 3], of which Pillow gives the upper bytes alone."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        # Read as if the lower byte came first, so that it is taken for the upper one.
        image.tile = cast("list[ImageFile._Tile]", [(*tile[:3], "RGB;16L") for tile in image.tile])
        image.load()
        low = np.asarray(ImageOps.exif_transpose(image))
    return high_HW3.astype(np.int64) * 256 + low
