"""A picture laid out in pixels from its upper left corner: cards, text, images, spectrograms.

Shape suffixes: H rows and W columns of pixels, L log-mel frames, M mel bins.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PAPER, CARD, EDGE, INK, MUTED = "#f3f1ec", "#ffffff", "#e2ddd3", "#1b2230", "#737b8a"
PAD, HEADING = 28, 70  # inside a card: to its edges, and above its content
DPI = 100


class Page:
    """`scale` renders more pixels than the layout counts, for screens that show the picture enlarged."""

    def __init__(self, width: int, height: int, scale: float = 1.0) -> None:
        self.width, self.height, self.scale = width, height, scale
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
        # The canvas by hand and not pyplot's: no display is looked for, and no figure stays in a global list.
        FigureCanvasAgg(self.figure)
        self._sheet = self.axes(0, 0, width, height)
        # Upside down, because a layout is counted from the top, as text is read.
        self._sheet.set(xlim=(0, width), ylim=(height, 0))

    def save(self, path: Path) -> None:
        """Writes a PNG."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a model may write in any script; the font shows boxes
            # Without the name and version of matplotlib, so that the same page is the same file.
            self.figure.savefig(path, dpi=DPI * self.scale, format="png", metadata={"Software": None})

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )
        axes.set_axis_off()
        return axes

    def card(self, x: float, y: float, width: float, height: float, heading: str, note: str) -> None:
        box = FancyBboxPatch(
            (x + 12, y + 12), width - 24, height - 24, boxstyle="round,pad=12", facecolor=CARD, edgecolor=EDGE, lw=1
        )
        self._sheet.add_patch(box)
        self.text(x + PAD, y + 38, heading, size=14, weight="bold")
        self.text(x + width - PAD, y + 38, note, size=10.5, color=MUTED, ha="right")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        color: str = INK,
        weight: str = "normal",
        ha: str = "left",
        room: float | None = None,
    ) -> None:
        """One line, centered on y; shortened with an ellipsis to `room` pixels."""
        line = "".join(letter if letter.isprintable() else "□" for letter in " ".join(text.split()))
        shown = self._sheet.text(x, y, line, fontsize=size, color=color, weight=weight, ha=ha, va="center_baseline")
        shown.set_parse_math(False)  # a model's words may hold dollar signs
        while room is not None and len(shown.get_text()) > 2 and shown.get_window_extent().width > room:
            shown.set_text(shown.get_text().rstrip("…")[:-1].rstrip() + "…")

    def image(self, x: float, y: float, side: float, image_HW3: np.ndarray) -> None:
        """Fits an image into a square, its aspect kept; tiny images keep their honest pixels."""
        height, width = image_HW3.shape[:2]
        zoom = side / max(height, width)
        left, top = x + (side - width * zoom) / 2, y + (side - height * zoom) / 2
        axes = self.axes(left, top, width * zoom, height * zoom)
        axes.imshow(image_HW3, interpolation="nearest" if zoom > 2 else "antialiased", aspect="auto")

    def spectrogram(self, x: float, y: float, width: float, height: float, mel_LM: np.ndarray) -> None:
        """Time to the right, pitch upwards."""
        # From the noise up, and without the loudest clicks, each of which alone would darken all the rest.
        low, high = np.percentile(mel_LM, [10, 99.8])
        self.axes(x, y, width, height).imshow(
            mel_LM.T, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=max(high, low + 1e-6)
        )
