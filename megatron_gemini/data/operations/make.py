"""Operations from what a source's list says, such as resize(tokens=256)."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from megatron_gemini.data.operations.spec import Operation, Sample, Setting
from megatron_gemini.data.samples.decode import over_items
from megatron_gemini.data.samples.items import Codes, EncoderInput, Item, Text
from megatron_gemini.modalities.spec import ItemOperation
from megatron_gemini.registry import MODALITIES, OPERATIONS, nearest

if TYPE_CHECKING:
    import numpy as np

Made = TypeVar("Made")
_CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*")


def make_operation(text: str, setting: Setting) -> tuple[Operation, bool]:
    """The operation that `name` or `name(argument=number, ...)` says, and whether it is random.

    A name is one of `registry.OPERATIONS`, or of the operations of modalities: every item is then changed as its
    modality says, with those of the arguments that this one knows. Raises ValueError for an unknown name or argument,
    with the nearest known one, and for a value out of range.
    """
    match = _CALL.fullmatch(text)  # read, never evaluated: a YAML may come from a stranger
    if match is None:
        raise ValueError(f"the operation {text!r} is written like resize or resize(tokens=256)")
    name, inside = match.group(1), match.group(2) or ""
    make: Callable[..., Operation]
    if name in OPERATIONS:
        spec = OPERATIONS.get(name)
        make, known, random = partial(spec.make, setting), _argument_names(spec.make), spec.random
    else:
        of_items = {each.name: each.operations[name] for each in MODALITIES.entries() if name in each.operations}
        if not of_items:
            known = [*OPERATIONS.names, *(each for spec in MODALITIES.entries() for each in spec.operations)]
            raise ValueError(f"{name!r} is no operation; {nearest(name, known)}")
        make = partial(_change_items, of_items, setting)
        known = list(dict.fromkeys(each for one in of_items.values() for each in _argument_names(one.make)))
        random = any(operation.random for operation in of_items.values())
    arguments = _arguments(text, name, inside, known)
    try:
        return make(**arguments), random
    except ValueError as error:
        raise ValueError(f"the operation {text!r}: {error}") from None


def _argument_names(make: Callable[..., Made]) -> list[str]:
    """All but the first, which is the settings."""
    return list(inspect.signature(make).parameters)[1:]


def _arguments(text: str, name: str, inside: str, known: Sequence[str]) -> dict[str, float]:
    """What stands between the brackets."""
    arguments: dict[str, float] = {}
    for part in filter(None, map(str.strip, inside.split(","))):
        argument, _, value = map(str.strip, part.partition("="))
        if argument not in known:
            others = nearest(argument, known) if known else "it has none"
            raise ValueError(f"{argument!r} is no argument of the operation {name}; {others}")
        try:
            arguments[argument] = int(value) if re.fullmatch(r"-?\d+", value) else float(value)
        except ValueError:
            raise ValueError(f"the operation {text!r}: {argument} is {value!r}; it must be a number") from None
    return arguments


def _change_items(of_items: Mapping[str, ItemOperation], setting: Setting, **arguments: float) -> Operation:
    """The operation that changes every raw item of these modalities, wherever in the sample it stands."""
    encoders = setting.decoder.config.encoders
    changes = {}
    for modality, operation in of_items.items():
        own = {name: arguments[name] for name in _argument_names(operation.make) if name in arguments}
        changes[modality] = operation.make(encoders[MODALITIES.get(modality).encoder], **own)

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        def change(item: Item) -> Item:
            if isinstance(item, (Text, Codes, EncoderInput)) or item.modality not in changes:
                return item
            changed: Item = changes[item.modality](item, random)
            return changed

        return dataclasses.replace(sample, fields=over_items(sample.fields, change))

    return apply
