"""Operations on samples: dicts of fields to dicts of fields, by name, without ranks or devices.

An operation is made of the run's settings and its own arguments. It returns a new dict and leaves the given one alone.
One that draws random numbers says so: what stands before the first of these is the same in every epoch, and is cached.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.data.samples.document import Encodes
from megatron_gemini.data.sources.schema import Schema

Sample = dict[str, Any]
Operation = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class Setting:
    """What operations may depend on beside their own arguments."""

    task: str
    decoder: SampleDecoder
    schema: Schema
    layout: TokenLayout
    text_tokenizer: Encodes
    prompts: Sequence[str] = ()
    caption_dropout: float = 0.0


@dataclass(frozen=True)
class OperationEntry:
    """A registered operation."""

    make: Callable[..., Operation]
    random: bool


OPERATIONS: dict[str, OperationEntry] = {}
_CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*")


def operation(name: str, random: bool = False) -> Callable[[Callable[..., Operation]], Callable[..., Operation]]:
    """Registers what makes an operation: `make(setting, **arguments)`. Arguments are numbers with defaults.

    The maker raises ValueError for an argument out of range.
    """

    def register(make: Callable[..., Operation]) -> Callable[..., Operation]:
        OPERATIONS[name] = OperationEntry(make, random)
        return make

    return register


def make_operation(text: str, setting: Setting) -> tuple[Operation, bool]:
    """The operation that `name` or `name(argument=number, ...)` says, and whether it is random.

    Raises ValueError for an unknown name or argument, with the nearest known one, and for a value out of range.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise ValueError(f"the operation {text!r} is written like resize or resize(tokens=256)")
    name, inside = match.group(1), match.group(2) or ""
    if name not in OPERATIONS:
        raise ValueError(f"{name!r} is no operation{_nearest(name, OPERATIONS)}")
    entry = OPERATIONS[name]
    known = list(inspect.signature(entry.make).parameters)[1:]
    arguments: dict[str, float] = {}
    for part in filter(None, map(str.strip, inside.split(","))):
        argument, _, value = map(str.strip, part.partition("="))
        if argument not in known:
            raise ValueError(f"{argument!r} is no argument of the operation {name}{_nearest(argument, known)}")
        try:
            arguments[argument] = int(value) if re.fullmatch(r"-?\d+", value) else float(value)
        except ValueError:
            raise ValueError(f"the operation {text!r}: {argument} is {value!r}; it must be a number") from None
    try:
        return entry.make(setting, **arguments), entry.random
    except ValueError as error:
        raise ValueError(f"the operation {text!r}: {error}") from None


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(known)}" if known else "; it has none"
