"""Images, and the vision encoder, which clips share.

Shape suffixes: I items, P patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_gemini.config.encoders import VisionConfig
from megatron_gemini.modalities.counting import attention, feed_forward, linear, spread
from megatron_gemini.modalities.image.operations import crop, resize
from megatron_gemini.modalities.spec import (
    CodesSpec,
    EncoderSpec,
    Grid,
    ItemOperation,
    ModalitySpec,
    Picture,
    Prepared,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from megatron_gemini.modalities.image.item import Image

CHANNELS = 3
FP32 = 4


def spans(grid_I3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A grid is (frames, rows, columns) of patches; each gives one embedding, and each frame is a span."""
    return grid_I3[:, 0], grid_I3[:, 1] * grid_I3[:, 2]


def parameters(vision: VisionConfig) -> int:
    width = vision.width
    blocks = vision.layers * (attention(width) + feed_forward(width, vision.mlp_width)) + 2 * width
    return blocks + linear(vision.patch**2 * CHANNELS, width) + linear(width, width, bias=False)


def saved_bytes(vision: VisionConfig, patches: int, element: int) -> float:
    """Bytes that the vision encoder keeps of `patches` in one forward with a graph."""
    width = vision.width
    # 8 widths: the block's input, both norms' outputs, queries, keys, values, attention's output and the sum behind it.
    # The feed-forward layer keeps what is before and behind its activation.
    block = 8 * width + 2 * vision.mlp_width
    ends = vision.patch**2 * CHANNELS + 2 * width
    # float32 whatever the element is: mean and deviation of every norm, and attention's log-sum-exp of a head.
    statistics = vision.layers * (4 + vision.heads) + 2
    return patches * ((vision.layers * block + ends) * element + statistics * FP32)


def image_patches(vision: VisionConfig) -> int:
    """Patches of the largest image."""
    return (vision.max_side // vision.patch) ** 2


def grids(vision: VisionConfig, count: int) -> list[Grid]:
    """Square images: a clip costs the sum of its frames."""
    return [(1, side, side) for side in spread(vision.max_side // vision.patch, count)]


def build(vision: VisionConfig) -> nn.Module:
    from megatron_gemini.modalities.image.encoder import VisionEncoder

    return VisionEncoder(vision)


def decode(data: bytes, vision: VisionConfig) -> Image:
    from megatron_gemini.modalities.image.item import Image
    from megatron_gemini.modalities.image.preprocess import decode_image

    # JPEGs decoded at a fraction of their size are what sets this loader's rate apart (docs/performance.md).
    return Image(decode_image(data, shrink_to=vision.max_side))


def sizes(data: bytes) -> dict[str, float]:
    from megatron_gemini.modalities.image.preprocess import decode_image

    height, width = decode_image(data).shape[:2]
    return {"image width": width, "image height": height}


def preview(data: bytes) -> np.ndarray:
    from megatron_gemini.modalities.image.preprocess import decode_image

    return decode_image(data)


def prepare(image: Image, vision: VisionConfig) -> Prepared:
    """The image fitted to the patch grid and cut into patches."""
    return prepare_frames(image.pixels_HW3[None], 0.0, vision)


def prepare_frames(frames_FHW3: np.ndarray, seconds: float, vision: VisionConfig) -> Prepared:
    """Every frame fitted to the patch grid; they share one grid. seconds: between two frames."""
    import numpy as np

    from megatron_gemini.modalities.image.preprocess import fit_image, patchify, vision_grid

    fitted_FHW3 = np.stack([fit_image(frame_HW3, vision.patch, vision.max_side) for frame_HW3 in frames_FHW3])
    return Prepared(patchify(fitted_FHW3, vision.patch), vision_grid(fitted_FHW3, vision.patch), float(seconds))


def picture(prepared: Prepared, vision: VisionConfig) -> Picture:
    """The pixels as the encoder takes them."""
    (frames, rows, columns), patch = prepared.grid, vision.patch
    # The inverse of `patchify`: the values of a patch are in the order row, column, channel.
    tiles = prepared.values_PC.view(frames, rows, columns, patch, patch, CHANNELS).transpose(2, 3)
    images_FHW3 = tiles.reshape(frames, rows * patch, columns * patch, CHANNELS)
    return Picture(frames_FHW3=((images_FHW3.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


VISION = EncoderSpec(
    name="vision",
    section=VisionConfig,
    input_width=lambda vision: vision.patch**2 * CHANNELS,
    output_width=lambda vision: vision.width,
    spans=spans,
    parameters=parameters,
    saved_bytes=saved_bytes,
    largest_item=image_patches,
    longest_item=lambda vision: vision.max_frames * image_patches(vision),
    build=build,
    grids=grids,
)
IMAGE: ModalitySpec[VisionConfig, Image] = ModalitySpec(
    name="image",
    encoder="vision",
    control="image",
    members=("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "image"),
    files="PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF",
    beside=("image", "images"),
    mark="<image>",
    parts=("image_url",),
    decode=decode,
    prepare=prepare,
    picture=picture,
    sizes=sizes,
    preview=preview,
    operations={"resize": ItemOperation(resize), "crop": ItemOperation(crop, random=True)},
    codes=CodesSpec(
        field="codes",
        members=("codes.json", "codes"),
        size=lambda config: config.image_tokenizer.codes,
        length=lambda config: config.image_tokenizer.codes_per_image,
        setting="image_tokenizer.codes",
        begin="image_begin",
        end="image_end",
        made_by="tools/encode_images.py",
        tokenizer="train.image_tokenizer",
    ),
)
