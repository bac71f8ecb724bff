"""What an operation on samples is: a sample to a sample, by name, without ranks or devices.

An operation is made of the run's settings and its own arguments. It returns a new sample and leaves the given one
alone. One that draws random numbers says so: what stands before the first of these is the same in every epoch, and is
cached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from megatron_gemini.data.samples.items import Example
from megatron_gemini.data.samples.spec import Fields

if TYPE_CHECKING:
    import numpy as np

    from megatron_gemini.contracts import TokenLayout
    from megatron_gemini.data.samples.decode import SampleDecoder
    from megatron_gemini.data.samples.document import Document, Encodes
    from megatron_gemini.data.samples.references import Fetch
    from megatron_gemini.data.sources.schema import Schema


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample on its way from bytes to a document; what later operations make of it is missing at first.

    members: its content by ending or column. fetch: gives the files that it names.
    """

    key: str
    members: Mapping[str, bytes] = field(default_factory=dict)
    fetch: Fetch | None = None
    fields: Fields = field(default_factory=Fields)
    example: Example | None = None
    document: Document | None = None


Operation: TypeAlias = "Callable[[Sample, np.random.Generator], Sample]"


@dataclass(frozen=True)
class Setting:
    """What operations may depend on beside their own arguments. schema: with the source's task."""

    decoder: SampleDecoder
    schema: Schema
    layout: TokenLayout
    text_tokenizer: Encodes
    prompts: Sequence[str] = ()
    caption_dropout: float = 0.0


@dataclass(frozen=True)
class OperationSpec:
    """An operation on whole samples. (Those on single items are `modalities.spec.ItemOperation`.)

    make: (setting, **arguments) -> the operation. Arguments are numbers with defaults. Raises ValueError for one out of
        range.
    random: whether it asks the generator.
    """

    make: Callable[..., Operation]
    random: bool = False
