"""The sections of the sample sheet, a class each: its heading, its place and how an item is drawn.

Shape suffixes: H rows and W columns of pixels, F frames of a clip, L log-mel frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_gemini.evaluation.metrics.inputs import ImageHW3
from megatron_gemini.evaluation.page import INK, MUTED, Page
from megatron_gemini.evaluation.section import Answer, Answered, Grid, ReportSection

Frames = NDArray[np.uint8]
LogMel = NDArray[np.float32]


class DrawnFromText(ReportSection[tuple[str, Sequence[ImageHW3]]]):
    """items: a prompt and the images drawn from it, uint8[H, W, 3]."""

    heading, share = "Drawn from text", 0.6
    label, step = 170, 66

    def height(self, width: float) -> float:
        return self._step(width) * len(self.items)

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        step = self._step(width)
        for row, (prompt, images) in enumerate(self.items):
            top = y + row * step
            page.text(x, top + step / 2 - 3, prompt, size=12, room=self.label - 16)
            for column, image_HW3 in enumerate(images):
                page.image(x + self.label + column * step, top, step - 6, image_HW3)

    def _step(self, width: float) -> float:
        # Smaller where the card is narrow, so that no image is cut off.
        longest = max(len(images) for _, images in self.items)
        return min(self.step, (width - self.label) / longest)


class Captions(Answered[ImageHW3]):
    """items: an image, uint8[H, W, 3], and what was said about it."""

    heading, share = "Images described", 0.4
    side, space = 84, 0

    def columns_and_step(self, width: float) -> tuple[int, float]:
        # As many as fit, from the left edge to the right one: the card is as wide as its neighbor leaves room.
        columns = max(int((width + 20) // (self.side + 20)), 1)
        return columns, (width - self.side) / max(columns - 1, 1)

    def cell(self, page: Page, left: float, top: float, room: float, item: tuple[ImageHW3, Answer]) -> None:
        image_HW3, answer = item
        page.image(left, top, self.side, image_HW3)
        answer.draw(page, left + self.side / 2, top + self.side + 14, 10.5, room, ha="center")


class Transcripts(Answered[LogMel]):
    """items: a spectrogram, float32[L, M], and what was heard."""

    heading = "Speech written down"
    columns, cell_height, space = 4, 138, 24
    picture = 84

    def cell(self, page: Page, left: float, top: float, room: float, item: tuple[LogMel, Answer]) -> None:
        mel_LM, answer = item
        page.spectrogram(left, top, room, self.picture, mel_LM)
        answer.draw(page, left, top + self.picture + 16, 11.5, room)


class Clips(Answered[Frames]):
    """items: frames of a clip, uint8[F, H, W, 3], and what was said about it."""

    heading, share = "Clips described", 0.5
    columns = 2
    frames = 4  # shown at most, evenly spaced

    def cell(self, page: Page, left: float, top: float, room: float, item: tuple[Frames, Answer]) -> None:
        frames_FHW3, answer = item
        # The first and the last frame are always among them: a clip is told by what changes.
        shown = frames_FHW3[np.linspace(0, len(frames_FHW3) - 1, min(len(frames_FHW3), self.frames)).astype(int)]
        side = min(room / len(shown), 84)
        for number, frame_HW3 in enumerate(shown):
            page.image(left + number * side, top, side - 4, frame_HW3)
        answer.draw(page, left, top + side + 14, 11.5, room)


class DrawnFromSpeech(Grid[tuple[LogMel, str, ImageHW3]]):
    """items: a spectrogram, float32[L, M], its words, and the image drawn from it, uint8[H, W, 3]."""

    heading, share = "Drawn from speech", 0.5
    columns, side = 2, 80

    def cell(self, page: Page, left: float, top: float, room: float, item: tuple[LogMel, str, ImageHW3]) -> None:
        mel_LM, words, image_HW3 = item
        sound = room - self.side - 40
        page.spectrogram(left, top, sound, self.side, mel_LM)
        page.text(left + sound + 20, top + self.side / 2, "→", size=16, color=MUTED, ha="center")
        page.image(left + sound + 40, top, self.side, image_HW3)
        page.text(left, top + self.side + 16, f"“{words}”", size=11.5, color=INK, room=room)


class Rebuilt(ReportSection[tuple[ImageHW3, ImageHW3]]):
    """items: an image and what the image tokenizer makes of its codes, uint8[H, W, 3]."""

    heading = "Image tokenizer"
    label, step = 110, 84

    @property
    def note(self) -> str:
        return "above: validation images; below: the same from their codes"

    def height(self, width: float) -> float:
        return 2 * self.step

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        for row, name in enumerate(("original", "rebuilt")):
            page.text(x, y + (row + 0.46) * self.step, name, size=12)
        for column, pair in enumerate(self.items[: int((width - self.label) // self.step)]):
            for row, image_HW3 in enumerate(pair):
                page.image(x + self.label + column * self.step, y + row * self.step, self.step - 8, image_HW3)
