"""What is asked of a sample: fields to the example of its task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from megatron_gemini.data.samples.items import Example
    from megatron_gemini.data.samples.spec import Fields, TaskSpec


def check_prompts(task: TaskSpec, prompts: Sequence[str], source: str) -> None:
    """Raise ValueError for prompts that the task cannot use."""
    if prompts and not task.prompts:
        raise ValueError(
            f"the data source {source!r} has prompts, and the task {task.name!r} asks none; leave them out"
        )
    for prompt in prompts:
        if task.placeholder not in prompt:
            raise ValueError(
                f"the prompt {prompt!r} of the data source {source!r} has no {task.placeholder} for the caption"
            )


def form_example(
    task: TaskSpec,
    fields: Fields,
    prompts: Sequence[str],
    random: np.random.Generator,
    caption_dropout: float = 0.0,
) -> Example:
    """The example that `task` makes of a decoded sample.

    prompts: to choose from; the task's own when empty. caption_dropout: how often the prompt of a drawing is left
    empty, which is the unconditional half of classifier-free guidance (Ho and Salimans 2022).
    """
    choices = prompts or task.prompts
    words = choices[int(random.integers(len(choices)))] if choices else ""
    example = task.form(fields, words)
    # Asked only of drawings: the other tasks' random numbers do not depend on whether there is such a dropout.
    empty = task.draws and random.random() < caption_dropout
    return dataclasses.replace(example, prompt=[]) if empty else example
