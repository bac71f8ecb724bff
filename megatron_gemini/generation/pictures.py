"""The sample sheet: what a model draws, sees and hears, on one picture.

Shape suffixes: H rows and W columns of pixels, F frames of a clip, M mel bins, L log-mel frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PAPER, CARD, INK, MUTED, RIGHT, WRONG = "#f4f2ee", "#ffffff", "#1d2433", "#6c7484", "#1a7f4b", "#c0392b"
FONT = "DejaVu Sans"
WIDTH, MARGIN, GAP, PAD, HEADING = 1600, 48, 28, 26, 62
DPI = 100


@dataclass
class Answer:
    """What the model said about one input, beside what was right."""

    said: str
    right: str

    @property
    def colour(self) -> str:
        return RIGHT if self.said.strip() == self.right.strip() else WRONG


@dataclass
class Sheet:
    """Images are uint8[H, W, 3], clips uint8[F, H, W, 3], spectrograms float32[L, M]. Empty parts are left out."""

    title: str
    subtitle: str
    drawn: list[tuple[str, list[np.ndarray]]] = field(default_factory=list)
    """Prompt and the images drawn from it."""
    captions: list[tuple[np.ndarray, Answer]] = field(default_factory=list)
    transcripts: list[tuple[np.ndarray, Answer]] = field(default_factory=list)
    clips: list[tuple[np.ndarray, Answer]] = field(default_factory=list)
    spoken: list[tuple[np.ndarray, str, np.ndarray]] = field(default_factory=list)
    """Spectrogram of an utterance, its words, and the image drawn from it."""
    rebuilt: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """An image and what the image tokenizer makes of its codes."""


class _Page:
    """A figure addressed in pixels from its upper left corner."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, w: float, h: float) -> Axes:
        box = (x / WIDTH, 1 - (y + h) / self.height, w / WIDTH, h / self.height)
        axes = self.figure.add_axes(box)
        axes.set_axis_off()
        return axes

    def card(self, x: float, y: float, w: float, h: float, heading: str) -> None:
        axes = self.figure.add_axes((x / WIDTH, 1 - (y + h) / self.height, w / WIDTH, h / self.height))
        axes.set(xticks=[], yticks=[], facecolor=CARD)
        for spine in axes.spines.values():
            spine.set(color="#e3dfd8", linewidth=1)
        self.text(x + PAD, y + PAD + 8, heading, size=13, weight="bold")

    def text(self, x: float, y: float, text: str, *, size: float, colour: str = INK, **style: str) -> None:
        style = {"ha": "left", "va": "center", "weight": "normal", **style}
        self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=size, color=colour, family=FONT, **style)

    def image(self, x: float, y: float, side: float, image_HW3: np.ndarray) -> None:
        """Fits the image into a square, its aspect kept; tiny images keep their honest pixels."""
        shape = image_HW3.shape
        scale = side / max(shape[:2])
        w, h = shape[1] * scale, shape[0] * scale
        smooth = "nearest" if max(shape[:2]) < side / 2 else "antialiased"
        axes = self.axes(x + (side - w) / 2, y + (side - h) / 2, w, h)
        axes.imshow(image_HW3, interpolation=smooth, aspect="auto")

    def spectrogram(self, x: float, y: float, w: float, h: float, mel_LM: np.ndarray) -> None:
        low, high = np.percentile(mel_LM, [5, 99.5])
        self.axes(x, y, w, h).imshow(mel_LM.T, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high)


def draw_sheet(sheet: Sheet, path: Path) -> None:
    """Writes the sheet as a PNG, 1600 pixels wide."""
