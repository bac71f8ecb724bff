"""Tasks in which the model draws an image: its answer is a run of the image's codes."""

from __future__ import annotations

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.items import Example, Text
from megatron_gemini.data.samples.spec import Fields, TaskSpec

CAPTION_HERE = "{text}"
"""Where a prompt has the sample's caption."""


def draw_text(fields: Fields, words: str) -> Example:
    return Example([Text(words.replace(CAPTION_HERE, fields.text()))], [fields.item("codes")])


def draw_speech(fields: Fields, words: str) -> Example:
    return Example([fields.item("audio"), Text(words)], [fields.item("codes")])


# The caption alone is among the prompts, as a person may type it.
GENERATE = TaskSpec(
    "generate",
    fields=(TEXT, "codes"),
    form=draw_text,
    prompts=("draw {text}", "Draw {text}.", "draw {text}.", "paint {text}", "an image of {text}", "{text}"),
    placeholder=CAPTION_HERE,
    draws=True,
)
SPEECH_TO_IMAGE = TaskSpec(
    "speech_to_image",
    fields=("audio", "codes"),
    form=draw_speech,
    prompts=("draw what was said.", "draw what was said", "Draw what was said.", "paint what you hear."),
    draws=True,
)
