"""Tasks in which the model is shown something, asked about it, and answers in words."""

from __future__ import annotations

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.items import Example, Text
from megatron_gemini.data.samples.spec import Fields, TaskSpec


def question_about(name: str, medium: str, prompts: tuple[str, ...]) -> TaskSpec:
    """A task that asks of an item of the modality `medium`; the sample's text is the answer."""

    def form(fields: Fields, words: str) -> Example:
        return Example([fields.item(medium), Text(words)], [Text(fields.text())])

    return TaskSpec(name, fields=(medium, TEXT), form=form, prompts=prompts)


CAPTION = question_about(
    "caption",
    "image",
    ("what is this?", "What is this?", "what is shown?", "describe the image.", "Describe this image."),
)
TRANSCRIBE = question_about(
    "transcribe",
    "audio",
    ("what was said?", "What was said?", "transcribe this.", "Transcribe the speech."),
)
VIDEO_CAPTION = question_about(
    "video_caption",
    "video",
    ("what is shown?", "What is shown?", "what is this?", "describe the video.", "what happens?"),
)
