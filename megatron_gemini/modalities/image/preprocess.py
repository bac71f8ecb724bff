"""Images from files to patches: limits first, then RGB, then a native-aspect size, then patches.

Shape suffixes: F frames (1 for a still image), H height, W width, P patches, C values of a patch.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps, features

from megatron_gemini.modalities.bad_sample import BadSample, one_line
from megatron_gemini.modalities.image.transparency import to_rgb

# Not all that Pillow reads: its EPS reader starts Ghostscript, another program, on whatever the file says. AVIF came
# with Pillow 11.3, and not every build has it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))
MAX_PIXELS = 50_000_000  # 150 MB decoded; a PNG of a few hundred bytes may say to have any number
MAX_ASPECT = 200
_LEAST_SHORTER = 64


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, shrink_to: int = 0) -> np.ndarray:
    """The first frame of an image file as uint8[H, W, 3].

    The format is found from the content, whatever the file was called. Palette, grey, CMYK and 16-bit images
    become 8-bit RGB; transparency is composited on white; the EXIF orientation is applied. The size is read
    from the header and checked before anything is decoded.

    shrink_to: the caller will make the longer side at most this. A JPEG of at least twice the size is then decoded at
    1/2, 1/4 or 1/8 of it, which skips most of the inverse transform. The longer side stays at least this long, the
    shorter one 64 pixels.

    Raises BadSample: image_empty, image_unreadable, image_too_large, image_too_narrow, image_corrupt,
    image_no_range.
    """
    if not data:
        raise BadSample("image_empty", "the image file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image_too_large", f"the image is too large: {one_line(error)}") from None
    except Exception:  # a foreign parser meets arbitrary bytes here
        raise BadSample(
            "image_unreadable", f"not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
        ) from None
    with image:
        check_size(*image.size, max_pixels)  # from the header: nothing is decoded yet
        try:
            # Twice as many samples a second as decoding 512 x 512 JPEGs whole for 224 x 224 (docs/performance.md).
            if shrink_to and image.format == "JPEG":
                _shrink(image, shrink_to)
            covered = image.tile[0][1] if image.format == "GIF" and image.tile else None
            image.load()
            return np.asarray(to_rgb(data, ImageOps.exif_transpose(image), covered))
        except BadSample:
            raise
        except Exception as error:  # as above: truncated data, bad checksums, broken color tables
            raise BadSample("image_corrupt", f"the image cannot be decoded: {one_line(error)}") from None


def _shrink(image: Image.Image, side: int) -> None:
    """Let a JPEG that is not loaded yet be decoded at a fraction of its size, of which the longer side is >= `side`.

    The shorter side of a strip stays long enough that rounding it to whole patches does not enlarge it by much.
    """
    longer, shorter = max(image.size), min(image.size)
    enough = (factor for factor in (8, 4, 2) if longer >= factor * side and shorter >= factor * _LEAST_SHORTER)
    factor = next(enough, 1)
    if factor > 1:
        width, height = image.size
        image.draft(image.mode, (width // factor, height // factor))


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS, kind: str = "image") -> None:
    """Refuses sides of zero, more than `max_pixels` pixels, and strips longer than `MAX_ASPECT` times their width.

    Raises BadSample: {kind}_empty, {kind}_too_large, {kind}_too_narrow.
    """
    if min(width, height) < 1:
        raise BadSample(f"{kind}_empty", f"the {kind} is {width} x {height} pixels; both sides must be at least 1")
    if width * height > max_pixels:
        raise BadSample(f"{kind}_too_large", f"the {kind} is {width} x {height} pixels; the limit is {max_pixels:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(
            f"{kind}_too_narrow",
            f"the {kind} is {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other",
        )


def fitted_size(height: int, width: int, patch: int, max_side: int) -> tuple[int, int]:
    """(height, width) nearest to the native size and aspect, in whole patches, no side above `max_side`."""
    scale = min(1.0, max_side / max(height, width))

    def whole_patches(side: int) -> int:
        return min(max(round(side * scale / patch), 1), max_side // patch) * patch

    return whole_patches(height), whole_patches(width)


def fit_image(image_HW3: np.ndarray, patch: int, max_side: int) -> np.ndarray:
    """Resizes uint8[H, W, 3] to whole patches at its native aspect, at most `max_side` a side (bicubic).

    An image that already fits is returned as it is. Raises BadSample: image_empty.
    """
    height, width = image_HW3.shape[:2]
    check_size(width, height)
    fitted = fitted_size(height, width, patch, max_side)
    if fitted == (height, width):
        return image_HW3
    resized = Image.fromarray(image_HW3).resize(fitted[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized)


def square_image(image_HW3: np.ndarray, size: int) -> np.ndarray:
    """The central square of uint8[H, W, 3], resized to uint8[size, size, 3] (bicubic), for the image code tokenizer.

    An image of that size is returned as it is. Raises BadSample: image_empty.
    """
    height, width = image_HW3.shape[:2]
    check_size(width, height)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image_HW3[top : top + side, left : left + side]
    if side == size:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


def signed_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 of any shape as float32 in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32, order="C")).div_(127.5).sub_(1.0)


def vision_grid(images_FHW3: np.ndarray, patch: int) -> tuple[int, int, int]:
    """(frames, patch rows, patch columns) of fitted frames; their product is the encoder's output length."""
    frames, height, width = images_FHW3.shape[:3]
    return frames, height // patch, width // patch


def patchify(images_FHW3: np.ndarray, patch: int) -> torch.Tensor:
    """Cuts uint8[F, H, W, 3] into float32[F * rows * columns, patch * patch * 3] in [-1, 1].

    Patches are in the order frame, row, column; the values of a patch in the order row, column, channel.
    Raises ValueError when `patch` does not divide a side.
    """
    frames, height, width, channels = images_FHW3.shape
    if height % patch or width % patch:
        raise ValueError(f"an image of {width} x {height} pixels is not whole patches of {patch}; use fit_image first")
    grid = signed_pixels(images_FHW3).view(frames, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(2, 3).reshape(-1, patch * patch * channels)
