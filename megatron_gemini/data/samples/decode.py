"""Members of one sample, bytes by name, to the fields that its task needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.captions import captions
from megatron_gemini.data.samples.items import Codes, EncoderInput, Item, RawItem, Text, Turn
from megatron_gemini.data.samples.kinds import decode_item, made_as
from megatron_gemini.data.samples.prepare import prepare
from megatron_gemini.data.samples.references import Fetch, named_item, read_reference
from megatron_gemini.data.samples.spec import Fields, FieldSpec, FieldValue
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.text.preprocess import check_text

if TYPE_CHECKING:
    from megatron_gemini.config.run import RunConfig
    from megatron_gemini.data.sources.schema import Schema

CAPTIONS = "captions"
"""The field with every text that a sample has: data sets come with several captions of one image."""


class MissingField(BadSample):
    """A sample without one of the fields that its task needs."""


@dataclass(frozen=True)
class SampleDecoder:
    """Decodes samples by the settings of a run: its encoders' and those of its codes."""

    config: RunConfig

    def decode(self, members: Mapping[str, bytes], key: str, schema: Schema, fetch: Fetch | None = None) -> Fields:
        """`fields`, with every item ready for its encoder. Raises BadSample as `fields` does."""
        return over_items(self.fields(members, key, schema, fetch), lambda item: prepare(item, self.config.encoders))

    def fields(self, members: Mapping[str, bytes], key: str, schema: Schema, fetch: Fetch | None = None) -> Fields:
        """The fields of the schema's task, decoded: text as str, others as items, or as their `FieldSpec` says. Beside
        a text stand as `captions` all texts that the sample has.

        fetch: where files that a document names come from, `members` if it is None.
        Raises BadSample with the decoder's own reason, or missing_<field>, bad_json, bad_codes, empty_text.
        """
        fields = Fields()
        for field in schema.task.fields:
            name = field if isinstance(field, str) else field.name
            found = schema.find(name, members)
            try:
                if name == TEXT and (texts := captions(found)):
                    fields[TEXT], fields[CAPTIONS] = texts[0], list(texts)
                elif name != TEXT and found:
                    fields[name] = self._value(field, found[0][1], fetch or members.get)
            except BadSample as error:
                raise BadSample(error.reason, f"{key}.{found[0][0]}: {error}") from None
            if name not in fields:
                made, where = made_as(name), " or ".join(schema.names[name])
                hint = f"; {made[1].made_by} adds it" if made is not None and made[1].made_by else ""
                raise MissingField(f"missing_{name}", f"{key} has no member or column {where}{hint}")
        return fields

    def _value(self, field: str | FieldSpec, content: bytes, fetch: Fetch) -> FieldValue:
        if isinstance(field, str):
            return self._item(field, content, fetch)
        decoded: dict[tuple[str, str], Item] = {}  # an image that is named twice is decoded once

        def read_item(kind: str, value: str) -> Item:
            if kind == TEXT:
                return Text(check_text(value))
            if (kind, value) not in decoded:
                data = read_reference(value, fetch)
                if data is None:
                    raise BadSample(f"missing_{kind}", f"the document names {value[:80]!r}, which is not there")
                decoded[kind, value] = decode_item(kind, data, self.config)
            return decoded[kind, value]

        return field.decode(content, read_item)

    def _item(self, kind: str, content: bytes, fetch: Fetch) -> Item:
        """An item of a member's content, or of the file that a column names."""
        name = named_item(content)
        if not name:
            return decode_item(kind, content, self.config)
        try:
            data, problem = read_reference(name, fetch), BadSample(f"missing_{kind}", f"{name[:80]!r} is not there")
        except BadSample as error:
            data, problem = None, error
        if data is not None:
            return decode_item(kind, data, self.config)
        # There are modalities whose files are text, so that what is no file's name may be the content itself.
        try:
            return decode_item(kind, bytes(content), self.config)
        except BadSample:
            raise problem from None


def over_items(fields: Fields, change: Callable[[Item], Item]) -> Fields:
    """The fields with every item of a modality changed, those in documents and turns as well.

    An item that stands in several places is changed once.
    """
    changed: dict[int, Item] = {}  # by identity: to compare pixels would cost more than to change them

    def once(item: Item) -> Item:
        if isinstance(item, (Text, Codes)):
            return item
        if id(item) not in changed:
            changed[id(item)] = change(item)
        return changed[id(item)]

    def within(value: FieldValue) -> FieldValue:
        if isinstance(value, str):  # at once: to ask whether it is a raw item, a protocol, takes 28 us
            return value
        if isinstance(value, Turn):
            return Turn(value.answer, [once(item) for item in value.items])
        if isinstance(value, list):
            return [within(each) for each in value]
        return once(value) if isinstance(value, (EncoderInput, RawItem)) else value

    return Fields({name: within(value) for name, value in fields.items()})


def codes_in(value: FieldValue) -> Iterator[Codes]:
    """The codes in a decoded field, those in documents and turns as well."""
    if isinstance(value, Codes):
        yield value
    elif isinstance(value, (Turn, list)):
        for each in value.items if isinstance(value, Turn) else value:
            yield from codes_in(each)


def field_bytes(value: FieldValue) -> int:
    """About how much memory a decoded field takes."""
    if isinstance(value, str):
        return 2 * len(value) + 128
    if isinstance(value, Turn):
        return sum(map(field_bytes, value.items))
    if isinstance(value, list):
        return sum(map(field_bytes, value))
    if isinstance(value, (EncoderInput, RawItem)):
        return value.nbytes + 512
    # The constants are about what Python's own objects take.
    text = value.text if isinstance(value, Text) else ""
    return 2 * len(text) + 8 * (len(value.codes) if isinstance(value, Codes) else 0) + 128
