"""From the results of an evaluation to the sample sheet.

Shape suffixes: F frames, H rows and W columns of pixels, L log-mel frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from megatron_gemini.data.samples.items import EncoderInput, Item
from megatron_gemini.evaluation.pictures import (
    Answer,
    Captions,
    Clips,
    DrawnFromSpeech,
    DrawnFromText,
    Rebuilt,
    Section,
    Sheet,
    Transcripts,
)
from megatron_gemini.evaluation.report import Results
from megatron_gemini.evaluation.validation import Example, spaced

CLASSES, OF_A_CLASS, IMAGES, SOUNDS, CLIPS, SPOKEN, REBUILT = 10, 10, 25, 8, 4, 4, 20
_FIGURES = (
    ("caption_accuracy", "images described"),
    ("speech_accuracy", "speech understood"),
    ("video_accuracy", "clips described"),
    ("image_recognized", "drawings recognized"),
)
Shown = TypeVar("Shown")
Anything = TypeVar("Anything")


def make_sheet(results: Results, title: str, report: Mapping[str, Any], patch: int) -> Sheet:
    """The sheet of a report. patch: side of the vision encoder's patches, to show images as the model got them."""
    text = DrawnFromText(_by_prompt(results))
    captions = Captions(_answered(results, "caption", IMAGES, lambda item: pixels(item, patch)[0]))
    transcripts = Transcripts(_answered(results, "transcribe", SOUNDS, spectrogram))
    clips = Clips(_answered(results, "video_caption", CLIPS, lambda item: pixels(item, patch)))
    rebuilt = Rebuilt(some(list(zip(results.validation.images, results.rebuilt, strict=False)), REBUILT))
    spoken = DrawnFromSpeech(_from_speech(results))
    rows: list[list[Section]] = [[text, captions], [transcripts], [clips, spoken], [rebuilt]]
    return Sheet(title, subtitle(report), rows)


def subtitle(report: Mapping[str, Any]) -> str:
    """The main figures in a line."""
    parts = [f"{what} {report[name]:.0%}" for name, what in _FIGURES if report.get(name) is not None]
    if report.get("train_seconds"):
        minutes, seconds = divmod(round(report["train_seconds"]), 60)
        parts.append(f"trained in {minutes} min {seconds} s")
    return "  ·  ".join([*parts, "all on validation data"] if parts else [])


def pixels(item: EncoderInput, patch: int) -> np.ndarray:
    """uint8[F, H, W, 3] of an image or clip as the vision encoder takes it."""
    frames, rows, columns = item.grid
    tiles = item.values_PC.view(frames, rows, columns, patch, patch, 3).transpose(2, 3)
    images_FHW3 = tiles.reshape(frames, rows * patch, columns * patch, 3)
    return ((images_FHW3.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def spectrogram(item: EncoderInput) -> np.ndarray:
    """float32[L, M] of a recording as the audio encoder takes it."""
    return item.values_PC.numpy()


def some(items: Sequence[Anything], count: int) -> list[Anything]:
    """At most `count` of the items, evenly spaced."""
    return [items[i] for i in spaced(len(items), count)]


def _input(prompt: Sequence[Item]) -> EncoderInput:
    return next(item for item in prompt if isinstance(item, EncoderInput))


def _answered(
    results: Results, task: str, count: int, show: Callable[[EncoderInput], Shown]
) -> list[tuple[Shown, Answer]]:
    answers = some(results.answers.get(task, []), count)
    return [(show(_input(example.prompt)), Answer(said, right)) for example, said, right in answers]


def _by_prompt(results: Results) -> list[tuple[str, list[np.ndarray]]]:
    if "generate" not in results.drawn:
        return []
    by_text: dict[str, tuple[Example, list[np.ndarray]]] = {}
    for example, drawing in results.drawn["generate"].existing():
        by_text.setdefault(example.label, (example, []))[1].append(drawing.pixels_HW3)
    return [(f"“{example.text}”", images[:OF_A_CLASS]) for example, images in some(list(by_text.values()), CLASSES)]


def _from_speech(results: Results) -> list[tuple[np.ndarray, str, np.ndarray]]:
    if "speech_to_image" not in results.drawn:
        return []
    pairs = some(results.drawn["speech_to_image"].existing(), SPOKEN)
    return [(spectrogram(_input(e.prompt)), e.text, drawing.pixels_HW3) for e, drawing in pairs]
