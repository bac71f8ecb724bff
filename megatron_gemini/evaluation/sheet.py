"""The sample sheet: what a model draws, sees and hears, on one picture.

Shape suffixes: F frames, H rows and W columns of pixels, L log-mel frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_gemini.config.encoders import EncoderConfig
from megatron_gemini.data.samples.items import EncoderInput, Item
from megatron_gemini.evaluation.asking import Drawn
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
Shown = TypeVar("Shown")
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
    captions = _answered(results, "caption", IMAGES, lambda item: pixels(item, encoders)[0])
    clips = _answered(results, "video_caption", CLIPS, lambda item: pixels(item, encoders))
    transcripts = _answered(results, "transcribe", SOUNDS, lambda item: spectrogram(item, encoders))
    nothing = Drawn([], [])
    # By what was asked for and not by the words: several prompts may ask for the same in other words.
    by_label: dict[str, tuple[ValidationExample, list[ImageHW3]]] = {}
    for example, drawing in results.drawn.get("generate", nothing).existing():
        by_label.setdefault(example.label, (example, []))[1].append(drawing.pixels_HW3)
    drawn = [(f"“{example.text}”", images[:OF_A_CLASS]) for example, images in some(list(by_label.values()), CLASSES)]
    spoken = [
        (spectrogram(_input(example.prompt), encoders), example.text, drawing.pixels_HW3)
        for example, drawing in some(results.drawn.get("speech_to_image", nothing).existing(), SPOKEN)
    ]
    rebuilt = some(list(zip(results.validation.images, results.rebuilt, strict=True)), REBUILT)
    # Sections of similar heights share a row, which is as high as its highest.
    rows: list[list[ReportSection]] = [
        [DrawnFromText(drawn), Captions(captions)],
        [Transcripts(transcripts)],
        [Clips(clips), DrawnFromSpeech(spoken)],
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


def pixels(item: EncoderInput, encoders: Encoders) -> Frames:
    """uint8[F, H, W, 3] of an image or clip as its encoder takes it."""
    frames_FHW3 = _picture(item, encoders).frames_FHW3
    assert frames_FHW3 is not None, f"{item.modality} is not seen"
    return frames_FHW3


def spectrogram(item: EncoderInput, encoders: Encoders) -> LogMel:
    """float32[L, M] of a recording as its encoder takes it."""
    spectrum_LM = _picture(item, encoders).spectrum_LM
    assert spectrum_LM is not None, f"{item.modality} is not heard"
    return spectrum_LM


def _picture(item: EncoderInput, encoders: Encoders) -> Picture:
    draw = MODALITIES.get(item.modality).picture
    assert draw is not None, f"{item.modality} cannot be shown"
    return draw(item.prepared, encoders[item.encoder])


def _input(prompt: Sequence[Item]) -> EncoderInput:
    return next(item for item in prompt if isinstance(item, EncoderInput))


def _answered(
    results: Results, task: str, count: int, show: Callable[[EncoderInput], Shown]
) -> list[tuple[Shown, Answer]]:
    answers = some(results.said.get(task, []), count)
    return [(show(_input(example.prompt)), Answer(said, right)) for example, said, right in answers]
