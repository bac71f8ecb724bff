"""What is asked of a sample: fields to the prompt and answer of one document."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_gemini.data.samples.document import Item, Text

# Several phrasings each, so that a user need not hit one exact wording. {text} is the sample's caption.
PROMPTS: dict[str, tuple[str, ...]] = {
    "caption": ("what is this?", "What is this?", "what is shown?", "describe the image.", "Describe this image."),
    "generate": ("draw {text}", "Draw {text}.", "draw {text}.", "paint {text}", "an image of {text}", "{text}"),
    "transcribe": ("what was said?", "What was said?", "transcribe this.", "Transcribe the speech."),
    "speech_to_image": ("draw what was said.", "draw what was said", "Draw what was said.", "paint what you hear."),
    "video_caption": ("what is shown?", "What is shown?", "what is this?", "describe the video.", "what happens?"),
}
DRAWING = ("generate", "speech_to_image")


class Example(NamedTuple):
    """The two sides of a document; `answer` is None where the whole of it is learned (text, interleave)."""

    prompt: list[Item]
    answer: list[Item] | None


def random_stream(*key: object) -> np.random.Generator:
    """Random numbers that depend on the key alone (Philox, keyed by a hash), the same on every rank and resume."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def check_prompts(task: str, prompts: Sequence[str], source: str) -> None:
    """Raise ValueError for prompts that the task cannot use."""
    if prompts and task not in PROMPTS:
        raise ValueError(f"the data source {source!r} has prompts, and the task {task!r} asks none; leave them out")
    for prompt in prompts:
        if task == "generate" and "{text}" not in prompt:
            raise ValueError(f"the prompt {prompt!r} of the data source {source!r} has no {{text}} for the caption")


def format_example(
    task: str,
    fields: dict[str, Any],
    prompts: Sequence[str],
    random: np.random.Generator,
    caption_dropout: float = 0.0,
) -> Example:
    """Form the question that `task` makes of a decoded sample.

    prompts: to choose from; the task's own when empty. caption_dropout: how often the prompt of a drawing is left
    empty, which is the unconditional half of classifier-free guidance (Ho and Salimans 2022).
    """
    if task == "text":
        return Example([Text(fields["text"])], None)
    if task == "interleave":
        return Example(fields["items"], None)
    if task == "chat":  # its first exchange; as a document it has all of them
        turns = fields["messages"]
        first = next(place for place, turn in enumerate(turns) if turn.answer)
        return Example([item for turn in turns[:first] for item in turn.items], list(turns[first].items))
    choices = prompts or PROMPTS[task]
    words = choices[int(random.integers(len(choices)))]
    answer: list[Item] = [fields["codes"] if task in DRAWING else Text(fields["text"])]
    if task in DRAWING and random.random() < caption_dropout:
        return Example([], answer)
    if task == "generate":
        return Example([Text(words.replace("{text}", fields["text"]))], answer)
    medium = {"caption": "image", "video_caption": "video"}.get(task, "audio")
    return Example([fields[medium], Text(words)], answer)
