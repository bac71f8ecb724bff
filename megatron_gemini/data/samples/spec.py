"""What a data task is: the fields that it needs of a sample, and the example that it makes of them.

A task is an entry of `registry.TASKS`, in a file of its own or of a plugin's. Importable without torch and without a
media library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.items import Codes, EncoderInput, Example, Item, RawItem, Text, Turn

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

FieldValue: TypeAlias = "Item | Turn | Plain | Sequence[FieldValue] | Mapping[str, FieldValue]"
"""A decoded field: text as str, an item, the items of a document, the turns of a conversation, or a task's own JSON."""
ReadItem: TypeAlias = Callable[[str, str], Item]
"""(kind, text or name) -> an item that a document names: the text itself, or what the member or file of that name
holds. Raises BadSample."""
Wanted = TypeVar("Wanted")


class Fields(dict[str, FieldValue]):
    """The decoded fields of a sample by name. The methods give one as the type that a task knows it to have."""

    def text(self, name: str = TEXT) -> str:
        return self.of(name, str)

    def item(self, name: str) -> Item:
        value = self[name]
        assert isinstance(value, (Text, Codes, EncoderInput, RawItem)), name
        return value

    def plain(self, name: str) -> Plain:
        """A field that holds JSON."""
        return cast("Plain", self[name])

    def of(self, name: str, kind: type[Wanted]) -> Wanted:
        """A field of that type, such as the list of a document's items."""
        value = self[name]
        assert isinstance(value, kind), name
        return value


@dataclass(frozen=True)
class FieldSpec:
    """A field that is no item of a modality.

    members: endings of the members of a tar, or columns of a table, that hold it, in the order of preference.
    decode: (a member's bytes, what reads the items that it names) -> its value. Raises BadSample.
    texts: a member's bytes -> the texts in it, to train a text tokenizer on. Raises BadSample. keys: names of which a
        JSON description of this kind has one; by them it is told from a sample's other metadata. reads: further names
        that it may have; whoever has others is told that nothing reads them.
    """

    name: str
    members: tuple[str, ...]
    decode: Callable[[bytes, ReadItem], FieldValue]
    texts: Callable[[bytes], list[str]] = lambda data: []
    keys: tuple[str, ...] = ()
    reads: Callable[[], tuple[str, ...]] = tuple


@dataclass(frozen=True)
class TaskSpec:
    """What is asked of a sample.

    fields: what the task needs, in the order in which it is decoded: names of modalities and of their codes
        (`modalities.spec.CodesSpec.field`), and fields of the task's own.
    form: (fields, words) -> the example. words: one of the prompts; empty for a task without prompts.
    prompts: the usual ones, several phrasings each, so that a user need not hit one exact wording.
    placeholder: what every prompt must contain, such as {text}; `form` fills it in.
    draws: the answer is a run of codes, so that caption dropout may leave the prompt empty.
    """

    name: str
    fields: tuple[str | FieldSpec, ...]
    form: Callable[[Fields, str], Example]
    prompts: tuple[str, ...] = ()
    placeholder: str = ""
    draws: bool = False

    @property
    def field_names(self) -> tuple[str, ...]:
        return tuple(each if isinstance(each, str) else each.name for each in self.fields)

    @property
    def own_fields(self) -> tuple[FieldSpec, ...]:
        return tuple(each for each in self.fields if isinstance(each, FieldSpec))
