"""A page of small pictures with their captions, to see at a glance what some shards hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_gemini.data.sources.shards import Shards
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.text.preprocess import decode_text
from megatron_gemini.registry import MODALITIES

TILE, TEXT, GAP, COLUMNS = 160, 40, 8, 8  # pixels of a picture, of the text below it and between two; pictures a row
_LETTERS, _LINES = 27, 3  # that fit under a picture


def contact_sheet(shards: Shards, count: int = 48) -> Image.Image:
    """At most `count` samples, evenly spaced. What cannot be shown is a grey tile that says the reason."""
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(int)).tolist()
    rows = -(-len(chosen) // COLUMNS)
    columns = min(COLUMNS, len(chosen))
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, rows * (TILE + TEXT + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, sample in enumerate(chosen):
        left = GAP + place % COLUMNS * (TILE + GAP)
        top = GAP + place // COLUMNS * (TILE + TEXT + GAP)
        picture, caption = _tile(shards, sample)
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        draw.multiline_text((left, top + TILE + 2), _wrapped(caption), fill="black", font=font, spacing=1)
    return sheet


def _tile(shards: Shards, sample: int) -> tuple[Image.Image, str]:
    try:
        endings = shards.endings(sample)
        # Of several items the one of the first modality: a picture tells more than a sound.
        shown = [(spec.preview, spec.members) for spec in MODALITIES.entries() if spec.preview is not None]
        found = [(preview, ending) for preview, members in shown for ending in endings if ending in members]
        if not found:
            raise BadSample("nothing_to_see", ", ".join(endings))
        preview, ending = found[0]
        members = shards.read(sample, [ending, "txt"])
        picture = Image.fromarray(preview(members[ending]))
        # thumbnail never enlarges: a small picture is shown as small as it is.
        picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        return picture, decode_text(members["txt"]) if "txt" in members else ""
    except BadSample as error:
        return Image.new("RGB", (TILE, TILE), "lightgrey"), f"{error.reason}: {error}"


def _wrapped(text: str) -> str:
    lines: Sequence[str] = [""]
    # Cut before it is split: a caption may be a megabyte.
    for word in text[: _LETTERS * _LINES * 2].split():
        piece = word[:_LETTERS]
        lines = (
            [*lines[:-1], f"{lines[-1]} {piece}".strip()] if len(lines[-1]) + len(piece) < _LETTERS else [*lines, piece]
        )
    return "\n".join(line for line in list(lines)[: _LINES + 1] if line)
