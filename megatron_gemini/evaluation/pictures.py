"""The sample sheet: what a model draws, sees and hears, on one picture.

Shape suffixes: H rows and W columns of pixels, F frames of a clip, L log-mel frames, M mel bins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_gemini.evaluation.page import HEADING, INK, MUTED, PAD, Page

WIDTH, MARGIN, GAP = 1600, 48, 28
SLACK = 16  # of a last row, since the card's own edge follows
RIGHT, WRONG = "#16794a", "#c2331f"


@dataclass
class Answer:
    """What the model said about one input, beside what is right."""

    said: str
    right: str

    @property
    def correct(self) -> bool:
        return self.said.split() == self.right.split()


class Section(ABC):
    """A card of the sheet. `share` is its part of a row's width; `items` what it shows."""

    heading: str
    share: float
    items: Sequence

    @abstractmethod
    def height(self, width: float) -> float:
        """Pixels that the content needs below the heading."""

    @abstractmethod
    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        """Draws the content at (x, y)."""

    @property
    def note(self) -> str:
        return ""


def _score(answers: Sequence[Answer]) -> str:
    return f"{sum(answer.correct for answer in answers)} of these {len(answers)} right"


def _answer(page: Page, x: float, y: float, answer: Answer, size: float, room: float, ha: str = "left") -> None:
    """The model's words, green or red, and what was right below them where they were wrong."""
    color = RIGHT if answer.correct else WRONG
    page.text(x, y, answer.said.strip() or "(no answer)", size=size, color=color, weight="bold", room=room, ha=ha)
    if not answer.correct:
        page.text(x, y + size * 1.75, f"not {answer.right}", size=size - 2, color=MUTED, room=room, ha=ha)


@dataclass
class DrawnFromText(Section):
    """items: a prompt and the images drawn from it, uint8[H, W, 3]."""

    items: Sequence[tuple[str, Sequence[np.ndarray]]]
    heading = "Drawn from text"
    share = 0.6
    label, step = 170, 66

    def _step(self, width: float) -> float:
        longest = max(len(images) for _, images in self.items)
        return min(self.step, (width - self.label) / longest)

    def height(self, width: float) -> float:
        return self._step(width) * len(self.items)

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        step = self._step(width)
        for row, (prompt, images) in enumerate(self.items):
            top = y + row * step
            page.text(x, top + step / 2 - 3, prompt, size=12, room=self.label - 16)
            for column, image_HW3 in enumerate(images):
                page.image(x + self.label + column * step, top, step - 6, image_HW3)


@dataclass
class Captions(Section):
    """items: an image, uint8[H, W, 3], and what was said about it."""

    items: Sequence[tuple[np.ndarray, Answer]]
    heading = "Images described"
    share = 0.4
    side, cell_width, cell_height = 84, 104, 132

    @property
    def note(self) -> str:
        return _score([answer for _, answer in self.items])

    def _columns(self, width: float) -> int:
        return max(int((width + self.cell_width - self.side) // self.cell_width), 1)

    def height(self, width: float) -> float:
        return -(-len(self.items) // self._columns(width)) * self.cell_height - SLACK

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        columns = self._columns(width)
        step = (width - self.side) / max(columns - 1, 1)
        for i, (image_HW3, answer) in enumerate(self.items):
            left, top = x + i % columns * step, y + i // columns * self.cell_height
            page.image(left, top, self.side, image_HW3)
            _answer(page, left + self.side / 2, top + self.side + 14, answer, 10.5, step, ha="center")


@dataclass
class Transcripts(Section):
    """items: a spectrogram, float32[L, M], and what was heard."""

    items: Sequence[tuple[np.ndarray, Answer]]
    heading = "Speech written down"
    share = 1.0
    columns, picture, cell_height, space = 4, 84, 138, 24

    @property
    def note(self) -> str:
        return _score([answer for _, answer in self.items])

    def height(self, width: float) -> float:
        return -(-len(self.items) // self.columns) * self.cell_height - SLACK

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        step = (width + self.space) / self.columns
        for i, (mel_LM, answer) in enumerate(self.items):
            left, top = x + i % self.columns * step, y + i // self.columns * self.cell_height
            page.spectrogram(left, top, step - self.space, self.picture, mel_LM)
            _answer(page, left, top + self.picture + 16, answer, 11.5, step - self.space)


@dataclass
class Clips(Section):
    """items: frames of a clip, uint8[F, H, W, 3], and what was said about it."""

    items: Sequence[tuple[np.ndarray, Answer]]
    heading = "Clips described"
    share = 0.5
    columns, cell_height, space = 2, 132, 28
    frames = 4  # shown at most, evenly spaced

    @property
    def note(self) -> str:
        return _score([answer for _, answer in self.items])

    def height(self, width: float) -> float:
        return -(-len(self.items) // self.columns) * self.cell_height - SLACK

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        step = (width + self.space) / self.columns
        for i, (frames_FHW3, answer) in enumerate(self.items):
            left, top = x + i % self.columns * step, y + i // self.columns * self.cell_height
            shown = frames_FHW3[np.linspace(0, len(frames_FHW3) - 1, min(len(frames_FHW3), self.frames)).astype(int)]
            side = min((step - self.space) / len(shown), 84)
            for number, frame_HW3 in enumerate(shown):
                page.image(left + number * side, top, side - 4, frame_HW3)
            _answer(page, left, top + side + 14, answer, 11.5, step - self.space)


@dataclass
class DrawnFromSpeech(Section):
    """items: a spectrogram, float32[L, M], its words, and the image drawn from it, uint8[H, W, 3]."""

    items: Sequence[tuple[np.ndarray, str, np.ndarray]]
    heading = "Drawn from speech"
    share = 0.5
    columns, side, cell_height, space = 2, 80, 132, 28

    def height(self, width: float) -> float:
        return -(-len(self.items) // self.columns) * self.cell_height - SLACK

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        step = (width + self.space) / self.columns
        sound = step - self.space - self.side - 40
        for i, (mel_LM, words, image_HW3) in enumerate(self.items):
            left, top = x + i % self.columns * step, y + i // self.columns * self.cell_height
            page.spectrogram(left, top, sound, self.side, mel_LM)
            page.text(left + sound + 20, top + self.side / 2, "→", size=16, color=MUTED, ha="center")
            page.image(left + sound + 40, top, self.side, image_HW3)
            page.text(left, top + self.side + 16, f"“{words}”", size=11.5, color=INK, room=step - self.space)


@dataclass
class Rebuilt(Section):
    """items: an image and what the image tokenizer makes of its codes, uint8[H, W, 3]."""

    items: Sequence[tuple[np.ndarray, np.ndarray]]
    heading = "Image tokenizer"
    share = 1.0
    label, step = 110, 84

    @property
    def note(self) -> str:
        return "above: validation images; below: the same from their codes"

    def _shown(self, width: float) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        return self.items[: int((width - self.label) // self.step)]

    def height(self, width: float) -> float:
        return 2 * self.step

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        for row, name in enumerate(("original", "rebuilt")):
            page.text(x, y + (row + 0.46) * self.step, name, size=12)
        for column, pair in enumerate(self._shown(width)):
            for row, image_HW3 in enumerate(pair):
                page.image(x + self.label + column * self.step, y + row * self.step, self.step - 8, image_HW3)


@dataclass
class Sheet:
    """A page of sections in rows; sections without items are left out and their neighbors take the room."""

    title: str
    subtitle: str
    rows: list[list[Section]] = field(default_factory=list)

    def save(self, path: Path, scale: float = 1.0) -> None:
        """Writes a PNG, 1600 pixels wide at scale 1."""
        rows = [kept for row in self.rows if (kept := [section for section in row if section.items])]
        heights = [max(s.height(w - 2 * PAD) for s, w in self._widths(row)) + HEADING + PAD for row in rows]
        header = 132
        page = Page(WIDTH, round(header + sum(heights) + GAP * len(rows) + MARGIN - GAP), scale)
        page.text(MARGIN, 54, self.title, size=25, weight="bold")
        page.text(MARGIN, 96, self.subtitle, size=13, color=MUTED, room=WIDTH - 2 * MARGIN)
        y: float = header
        for row, height in zip(rows, heights, strict=True):
            x: float = MARGIN
            for section, width in self._widths(row):
                page.card(x, y, width, height, section.heading, section.note)
                section.draw(page, x + PAD, y + HEADING, width - 2 * PAD)
                x += width + GAP
            y += height + GAP
        page.save(path)

    def _widths(self, row: list[Section]) -> list[tuple[Section, float]]:
        room = WIDTH - 2 * MARGIN - GAP * (len(row) - 1)
        return [(section, room * section.share / sum(s.share for s in row)) for section in row]
