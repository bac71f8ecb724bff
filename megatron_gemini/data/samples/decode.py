"""Members of one sample (dict of bytes) to what a task needs of it (dict of fields)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gemini.config.encoders import EncoderConfig
from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.document import EncoderInput, ImageCodes, Item, RawItem, Text, Turn, prepare
from megatron_gemini.data.samples.interleaved import conversation, document_entries
from megatron_gemini.data.sources.schema import TASK_FIELDS, USUAL, Schema
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import MODALITIES

Fetch = Callable[[str], bytes | None]  # a file that a document or conversation names; None if there is none


@dataclass(frozen=True)
class SampleDecoder:
    """The settings that decoding depends on."""

    encoders: Mapping[str, EncoderConfig]
    image_tokenizer: ImageTokenizerConfig

    @classmethod
    def from_config(cls, config: RunConfig) -> SampleDecoder:
        return cls(config.encoders, config.image_tokenizer)

    def decode(
        self, members: dict[str, bytes], task: str, key: str, schema: Schema = USUAL, fetch: Fetch | None = None
    ) -> dict[str, Any]:
        """The fields of `TASK_FIELDS[task]`, ready for their encoders.

        text: str; codes: ImageCodes; image, audio, video: EncoderInput; items: list of items; messages: list of Turn.
        Raises BadSample as `fields` does.
        """
        fields = self.fields(members, task, key, schema, fetch)
        return over_media(fields, lambda item: prepare(item, self.encoders))

    def fields(
        self, members: dict[str, bytes], task: str, key: str, schema: Schema = USUAL, fetch: Fetch | None = None
    ) -> dict[str, Any]:
        """The fields of `TASK_FIELDS[task]`, decoded: text, codes, image, audio and video as str, ImageCodes, Image,
        Audio and Video, items as a list of these, messages as a list of Turn; and `captions`, every text there is.

        fetch: where files that a document names come from, `members` if it is None.
        Raises BadSample with the decoder's own reason, or missing_<field>, bad_json, bad_codes, empty_text.
        """
        fields: dict[str, Any] = {}
        for name in TASK_FIELDS[task]:
            found = schema.find(name, members)
            if not found:
                hint = "; tools/encode_images.py adds it" if name == "codes" else ""
                where = " or ".join(schema.names[name])
                raise BadSample(f"missing_{name}", f"{key} has no member or column {where}{hint}")
            try:
                fields[name] = self._described(name, found[0][1], fetch or members.get) or self.field(name, found[0][1])
                if name == "text":
                    fields["captions"] = [
                        fields["text"],
                        *(decode_text(content) for _, content in found[1:] if content.strip()),
                    ]
            except BadSample as error:
                raise BadSample(error.reason, f"{key}.{found[0][0]}: {error}") from None
        return fields

    def field(self, name: str, data: bytes) -> Any:
        """One member's content."""
        if name == "text":
            return decode_text(data)
        if name == "codes":
            return decode_codes(data, self.image_tokenizer)
        spec = MODALITIES.get(name)
        assert spec.decode is not None, name
        return spec.decode(data, self.encoders[spec.encoder])

    def _described(self, name: str, data: bytes, fetch: Fetch) -> list[Item] | list[Turn] | None:
        """The items of a document or the turns of a conversation; None for any other field."""
        decoded: dict[tuple[str, str], Item] = {}  # an image that is named twice is decoded once
        if name == "items":
            return [self._item(*entry, fetch, decoded) for entry in document_entries(decode_json(data))]
        if name == "messages":
            return [
                Turn(answer, [self._item(*entry, fetch, decoded) for entry in entries])
                for answer, entries in conversation(decode_json(data))
            ]
        return None

    def _item(self, kind: str, value: str, fetch: Fetch, decoded: dict[tuple[str, str], Item]) -> Item:
        if kind == "text":
            return Text(value)
        if (kind, value) not in decoded:
            data = fetch(value)
            if data is None:
                raise BadSample(f"missing_{kind}", f"the document names {value[:80]!r}, which is not there")
            decoded[kind, value] = self.field(kind, data)
        return decoded[kind, value]


def over_media(fields: dict[str, Any], change: Callable[[Item], Item]) -> dict[str, Any]:
    """The fields with every item in them changed: images, clips and sounds as well as those in documents and turns.

    An item that stands in several places is changed once.
    """
    changed: dict[int, Item] = {}

    def once(value: Any) -> Any:
        if isinstance(value, list):
            return [once(item) for item in value]
        if isinstance(value, Turn):
            return Turn(value.answer, once(value.items))
        if not isinstance(value, (EncoderInput, RawItem)):
            return value
        if id(value) not in changed:
            changed[id(value)] = change(value)
        return changed[id(value)]

    return {name: once(value) for name, value in fields.items()}


def decode_text(data: bytes) -> str:
    """UTF-8 text without the white space around it. Raises BadSample: bad_text, empty_text."""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("bad_text", "the text is not UTF-8") from None
    if not text:
        raise BadSample("empty_text", "the text is empty")
    return text


def decode_codes(data: bytes, image_tokenizer: ImageTokenizerConfig) -> ImageCodes:
    """`{"codes": [...]}`: the codes of one image, as many as the image tokenizer makes. Raises BadSample: bad_codes."""
    value = decode_json(data)
    codes = value.get("codes") if isinstance(value, dict) else None
    expected = image_tokenizer.codes_per_image
    if not isinstance(codes, list) or len(codes) != expected:
        found = f"{len(codes)} codes" if isinstance(codes, list) else "no list of codes"
        raise BadSample("bad_codes", f"it holds {found}; the image tokenizer makes {expected}")
    for code in codes:
        if type(code) is not int or not 0 <= code < image_tokenizer.codes:
            raise BadSample(
                "bad_codes", f"image code {str(code)[:20]}; the codebook has 0..{image_tokenizer.codes - 1}"
            )
    return ImageCodes(tuple(codes))


def field_bytes(value: Any) -> int:
    """About how much memory a decoded field takes."""
    if isinstance(value, Turn):
        return field_bytes(value.items)
    if isinstance(value, list):
        return sum(map(field_bytes, value))
    if isinstance(value, (EncoderInput, RawItem)):
        return value.nbytes + 512
    text = value.text if isinstance(value, Text) else value if isinstance(value, str) else ""
    return 2 * len(text) + 8 * len(getattr(value, "codes", ())) + 128
