"""What a build leaves out, and the reason that it counts for each."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gemini.config.schema import Plain

SCRIPT_SHARE = 0.9  # of a caption's letters


@dataclass(frozen=True)
class Filters:
    """All are off or wide as they stand; sides in pixels, captions in characters.

    scripts: Unicode names of writing systems (LATIN, CYRILLIC, HAN, ...) of which a caption's letters must be. That is
    no language identification: it tells Russian from English, and not French from English.
    minimum, maximum: limits of a table's numeric columns. only: the values of a column that are let through.
    """

    min_side: int = 1
    max_aspect: float = 200.0
    min_caption: int = 1
    max_caption: int = 100_000
    scripts: tuple[str, ...] = ()
    minimum: tuple[tuple[str, float], ...] = ()
    maximum: tuple[tuple[str, float], ...] = ()
    only: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ValueError(f"--min-side is {self.min_side}; it is a number of pixels, at least 1")
        if not self.max_aspect >= 1:
            raise ValueError(f"--max-aspect is {self.max_aspect}; it is the longer side over the shorter, at least 1")
        if not 0 <= self.min_caption <= self.max_caption:
            raise ValueError(f"captions of {self.min_caption} to {self.max_caption} characters; exchange the two")

    def check_columns(self, columns: Mapping[str, Plain]) -> str:
        """The reason why a table's row is left out, or ''. A value that is missing or no number is one."""
        for name, limit in self.minimum:
            value = _number(columns.get(name))
            if value is None or value < limit:
                return f"no_{name}" if value is None else f"low_{name}"
        for name, limit in self.maximum:
            value = _number(columns.get(name))
            if value is None or value > limit:
                return f"no_{name}" if value is None else f"high_{name}"
        for name, values in self.only:
            if str(columns.get(name, "")) not in values:
                return f"other_{name}"
        return ""

    def check_caption(self, caption: str) -> str:
        """The reason why a caption is left out, or ''."""
        if len(caption) < self.min_caption:
            return "caption_short"
        if len(caption) > self.max_caption:
            return "caption_long"
        return "caption_script" if self.scripts and not in_scripts(caption, self.scripts) else ""

    def check_size(self, width: int, height: int) -> str:
        """The reason why a picture of that size is left out, or ''."""
        if min(width, height) < self.min_side:
            return "image_small"
        return "image_aspect" if max(width, height) > self.max_aspect * min(width, height) else ""


def in_scripts(text: str, scripts: tuple[str, ...]) -> bool:
    """Whether at least nine in ten letters of the text are of these scripts; a text without letters is."""
    found = [script(character) for character in text if character.isalpha()]
    return sum(name in scripts for name in found) >= SCRIPT_SHARE * len(found)


def script(letter: str) -> str:
    """The writing system as the first word of the letter's Unicode name, with HAN for Chinese characters."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return "HAN" if name == "CJK" else name


def _number(value: Plain) -> float | None:
    if value is None or isinstance(value, (list, dict)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    # NaN is neither below nor above a limit, and would pass both.
    return number if math.isfinite(number) else None
