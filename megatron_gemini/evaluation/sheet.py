"""The sample sheet: what a model draws, sees and hears, on one picture.

Shape suffixes: F frames, H rows and W columns of pixels, L log-mel frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gemini.config.encoders import EncoderConfig
from megatron_gemini.data.samples.items import EncoderInput, Item
from megatron_gemini.evaluation.json_data import Json
from megatron_gemini.evaluation.metrics.inputs import ImageHW3
from megatron_gemini.evaluation.page import HEADING, MUTED, PAD, Page
from megatron_gemini.evaluation.report import Results
from megatron_gemini.evaluation.section import Answer, ReportSection
from megatron_gemini.evaluation.sections import (
    Captions,
    Clips,
    DrawnFromSpeech,
    DrawnFromText,
    Frames,
    LogMel,
    Rebuilt,
    Transcripts,
)
from megatron_gemini.evaluation.validation import ValidationExample, some
from megatron_gemini.modalities.spec import Picture
from megatron_gemini.registry import MODALITIES

WIDTH, MARGIN, GAP, HEADER = 1600, 48, 28, 132
CLASSES, OF_A_CLASS, IMAGES, SOUNDS, CLIPS, SPOKEN, REBUILT = 10, 10, 25, 8, 4, 4, 20
Encoders = Mapping[str, EncoderConfig]


@dataclass
class Sheet:
    """A page of sections in rows; sections without items are left out and their neighbors take the room."""

    title: str
    subtitle: str
    rows: Sequence[Sequence[ReportSection]] = field(default_factory=list)

    def save(self, path: Path, scale: float = 1.0) -> None:
        """Writes a PNG, 1600 pixels wide at scale 1."""
        rows = [kept for row in self.rows if (kept := [section for section in row if section.items])]
        heights = [max(s.height(w - 2 * PAD) for s, w in self._widths(row)) + HEADING + PAD for row in rows]
        page = Page(WIDTH, round(HEADER + sum(heights) + GAP * len(rows) + MARGIN - GAP), scale)
        page.text(MARGIN, 54, self.title, size=25, weight="bold")
        page.text(MARGIN, 96, self.subtitle, size=13, color=MUTED, room=WIDTH - 2 * MARGIN)
        # The cards of a row are as high as the highest of them, so that their lower edges are in line.
        y: float = HEADER
        for row, height in zip(rows, heights, strict=True):
            x: float = MARGIN
            for section, width in self._widths(row):
                page.card(x, y, width, height, section.heading, section.note)
                section.draw(page, x + PAD, y + HEADING, width - 2 * PAD)
                x += width + GAP
            y += height + GAP
        page.save(path)

    def _widths(self, row: Sequence[ReportSection]) -> list[tuple[ReportSection, float]]:
        # Shares of what is in the row: a section that was left out gives its room to its neighbors.
        room = WIDTH - 2 * MARGIN - GAP * (len(row) - 1)
        return [(section, room * section.share / sum(s.share for s in row)) for section in row]


def make_sheet(results: Results, title: str, subtitle: str, encoders: Encoders) -> Sheet:
    """The sheet of an evaluation. encoders: their settings by name, to show inputs as the model got them."""
    images, clips, sounds = _answered(results, encoders)
    # By what was asked for and not by the words: several prompts may ask for the same in other words.
    by_label: dict[str, tuple[ValidationExample, list[ImageHW3]]] = {}
    heard: list[tuple[LogMel, str, ImageHW3]] = []
    for example, drawing in (pair for drawn in results.drawn.values() for pair in drawn.existing()):
        shown = pictures(example.prompt, encoders)
        if not shown:
            by_label.setdefault(example.label, (example, []))[1].append(drawing.pixels_HW3)
        elif shown[0].spectrum_LM is not None:
            heard.append((shown[0].spectrum_LM, example.text, drawing.pixels_HW3))
    written = [(f"“{example.text}”", images[:OF_A_CLASS]) for example, images in some(list(by_label.values()), CLASSES)]
    rebuilt = some(list(zip(results.validation.images, results.rebuilt, strict=True)), REBUILT)
    # Sections of similar heights share a row, which is as high as its highest.
    rows: list[list[ReportSection]] = [
        [DrawnFromText(written), Captions(some(images, IMAGES))],
        [Transcripts(some(sounds, SOUNDS))],
        [Clips(some(clips, CLIPS)), DrawnFromSpeech(some(heard, SPOKEN))],
        [Rebuilt(rebuilt)],
    ]
    return Sheet(title, subtitle, rows)


def subtitle(report: Mapping[str, Json], phrases: Mapping[str, str] | None = None) -> str:
    """The main figures of a report in a line.

    phrases: the figures, all of them shares, and what each is called; without them, the exact matches by their names.
    """
    phrases = phrases or {name: name.replace("_", " ") for name in report if name.endswith("exact_match")}
    parts = [f"{what} {value:.0%}" for name, what in phrases.items() if isinstance(value := report.get(name), float)]
    seconds = report.get("train_seconds")
    if isinstance(seconds, (int, float)) and seconds:
        parts.append(f"trained in {round(seconds) // 60} min {round(seconds) % 60} s")
    return "  ·  ".join([*parts, "all on validation data"] if parts else [])


def pictures(prompt: Sequence[Item], encoders: Encoders) -> list[Picture]:
    """What a prompt shows, as the encoders take it."""
    inputs = [item for item in prompt if isinstance(item, EncoderInput)]
    drawn = ((MODALITIES.get(item.modality).picture, item) for item in inputs)
    return [draw(item.prepared, encoders[item.encoder]) for draw, item in drawn if draw is not None]


def _answered(
    results: Results, encoders: Encoders
) -> tuple[list[tuple[ImageHW3, Answer]], list[tuple[Frames, Answer]], list[tuple[LogMel, Answer]]]:
    """What was said of images, of clips and of sounds: of whatever looks so, some of each task."""
    images, clips, sounds = (
        list[tuple[ImageHW3, Answer]](),
        list[tuple[Frames, Answer]](),
        list[tuple[LogMel, Answer]](),
    )
    for said in results.said.values():
        for example, text, right in some(said, IMAGES):
            for picture in pictures(example.prompt, encoders)[:1]:
                answer = Answer(text, right)
                if picture.spectrum_LM is not None:
                    sounds.append((picture.spectrum_LM, answer))
                elif picture.frames_FHW3 is not None and len(picture.frames_FHW3) > 1:
                    clips.append((picture.frames_FHW3, answer))
                elif picture.frames_FHW3 is not None:
                    images.append((picture.frames_FHW3[0], answer))
    return images, clips, sounds
