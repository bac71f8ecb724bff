"""A source's list of operations: what is the same in every epoch, and what is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_gemini.data.operations.make import make_operation
from megatron_gemini.data.operations.spec import Sample, Setting
from megatron_gemini.data.samples.document import Document
from megatron_gemini.modalities.bad_sample import guarded

USUAL_OPERATIONS = ("decode", "resize", "prepare", "format", "tokenize")


class OperationPipeline:
    """The operations in `names`, or `USUAL_OPERATIONS` if there are none.

    Raises ValueError for an operation that does not exist or cannot stand where it does.
    """

    def __init__(self, names: Sequence[str], setting: Setting) -> None:
        names = tuple(names) or USUAL_OPERATIONS
        made = [make_operation(name, setting) for name in names]  # first, so that a misspelled name is told as such
        plain = [name.partition("(")[0].strip() for name in names]
        if plain[:1] != ["decode"] or plain[-2:] != ["format", "tokenize"] or len(set(plain)) < len(plain):
            raise ValueError(
                f"the operations {', '.join(names)} must begin with decode, end with format and tokenize, and name "
                f"each one once; the usual ones are {', '.join(USUAL_OPERATIONS)}"
            )
        first = next(place for place, (_, random) in enumerate(made) if random)
        operations = [(name, operation) for name, (operation, _) in zip(plain, made, strict=True)]
        self._fixed, self._random = operations[:first], operations[first:]
        self._none = np.random.default_rng(0)  # which a fixed operation never asks

    def fixed(self, sample: Sample) -> Sample:
        """From `members`, and perhaps `fetch`, to what is the same in every epoch. Raises BadSample."""
        for name, operation in self._fixed:
            with guarded(name, sample.key):
                sample = operation(sample, self._none)
        return sample

    def document(self, sample: Sample, random: np.random.Generator) -> Document:
        """From there to a document, by `random` alone. Raises BadSample."""
        for name, operation in self._random:
            with guarded(name, sample.key):
                sample = operation(sample, random)
        assert sample.document is not None  # tokenize stands last
        return sample.document
