"""A card of the sample sheet, and the kinds of card that several sections share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megatron_gemini.evaluation.page import MUTED, Page

SLACK = 16  # of a last row, since the card's own edge follows
RIGHT, WRONG = "#16794a", "#c2331f"
Shown = TypeVar("Shown")


@dataclass
class Answer:
    """What the model said about one input, beside what is right."""

    said: str
    right: str

    @property
    def correct(self) -> bool:
        # Stricter than the figure of exact matches, which forgives case and closing marks: here a person sees them.
        return self.said.split() == self.right.split()

    def draw(self, page: Page, x: float, y: float, size: float, room: float, ha: str = "left") -> None:
        """The model's words, green or red, and what was right below them where they were wrong."""
        color = RIGHT if self.correct else WRONG
        page.text(x, y, self.said.strip() or "(no answer)", size=size, color=color, weight="bold", room=room, ha=ha)
        if not self.correct:
            page.text(x, y + size * 1.75, f"not {self.right}", size=size - 2, color=MUTED, room=room, ha=ha)


@dataclass
class ReportSection(ABC, Generic[Shown]):
    """A card of the sheet. `share` is its part of a row's width; `items` what it shows; `note` stands at its corner."""

    items: Sequence[Shown]
    heading = ""
    share = 1.0

    @abstractmethod
    def height(self, width: float) -> float:
        """Pixels that the content needs below the heading."""

    @abstractmethod
    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        """Draws the content at (x, y)."""

    @property
    def note(self) -> str:
        return ""


class Grid(ReportSection[Shown]):
    """Cells of one size in rows, each with one item."""

    columns, cell_height, space = 1, 132, 28

    @abstractmethod
    def cell(self, page: Page, left: float, top: float, room: float, item: Shown) -> None:
        """Draws an item that has `room` pixels from left to right."""

    def columns_and_step(self, width: float) -> tuple[int, float]:
        """Cells of a row, and pixels from the left edge of one to that of the next."""
        return self.columns, (width + self.space) / self.columns

    def height(self, width: float) -> float:
        return -(-len(self.items) // self.columns_and_step(width)[0]) * self.cell_height - SLACK

    def draw(self, page: Page, x: float, y: float, width: float) -> None:
        columns, step = self.columns_and_step(width)
        for i, item in enumerate(self.items):
            self.cell(page, x + i % columns * step, y + i // columns * self.cell_height, step - self.space, item)


class Answered(Grid[tuple[Shown, Answer]]):
    """A grid of inputs with what was said about them."""

    @property
    def note(self) -> str:
        return f"{sum(answer.correct for _, answer in self.items)} of these {len(self.items)} right"
